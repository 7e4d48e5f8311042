"""Mimi and the tokenizer as the environment's `Codec`."""

import os
from concurrent.futures import ThreadPoolExecutor

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

CPU_DECODE_BATCH = 2
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes the space before a word


def agent_codebooks(n_q: int, dep_q: int) -> int:
    """Audio streams of the agent. PersonaPlex predicts the user's streams too (dep_q = n_q): half are the agent's."""
    return n_q // 2 if dep_q == n_q else dep_q


class MimiCodec:
    """Audio and text to tokens and back, at the sizes that the bundle has (see `envs.codec.Codec`)."""

    def __init__(self, mimi: MimiModel, lm: LMModel, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.mimi = mimi
        self.tokenizer = tokenizer
        self.sample_rate = int(mimi.sample_rate)
        self.frame_rate = float(mimi.frame_rate)
        self.frame_samples = int(mimi.frame_size)
        self.agent_codebooks = agent_codebooks(lm.n_q, lm.dep_q)
        self.user_codebooks = lm.n_q - self.agent_codebooks
        self.audio_cardinality = lm.card
        self.text_cardinality = lm.text_card
        self.device = next(mimi.parameters()).device
        # Not words: the two paddings, and every special piece of the tokenizer.
        self._silent = {lm.text_padding_token_id, lm.end_of_text_padding_id, lm.text_card, -1}

    @torch.no_grad()
    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """User audio `(B, N)` to codes `(B, user_codebooks, T)`."""
        return self.mimi.encode(audio.to(self.device)[:, None])[:, : self.user_codebooks]

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Agent codes `(B, agent_codebooks, T)` to audio `(B, T * frame_samples)`."""
        if self.device.type != "cpu":
            return self.mimi.decode(codes.to(self.device))[:, 0]
        # On a CPU a few at a time, so that the activations at audio rate stay in its cache (twice as fast), and the
        # parts side by side on its cores: outside streaming mode Mimi keeps no state.
        parts = codes.split(CPU_DECODE_BATCH)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return torch.cat(list(pool.map(self._decode_part, parts)))

    @torch.no_grad()
    def _decode_part(self, codes: torch.Tensor) -> torch.Tensor:
        return self.mimi.decode(codes)[:, 0]

    def decode_text(self, tokens: list[int]) -> str:
        """Words of a text stream, paddings and special pieces left out."""
        return self.tokenizer.decode([token for token in tokens if self._is_text(token)]).strip()

    def decode_words(self, tokens: list[int]) -> list[tuple[str, int, int]]:
        """The same words, each with the frame of its first token and the frame after its last."""
        words: list[tuple[list[int], int, int]] = []
        for frame, token in enumerate(tokens):
            if not self._is_text(token):
                continue
            if not words or self.tokenizer.id_to_piece(token).startswith(_WORD_START):
                words.append(([], frame, frame))
            pieces, first, _ = words[-1]
            pieces.append(token)
            words[-1] = (pieces, first, frame + 1)
        spelled = [(self.tokenizer.decode(pieces).strip(), first, last) for pieces, first, last in words]
        return [word for word in spelled if word[0]]

    def _is_text(self, token: int) -> bool:
        size = self.tokenizer.vocab_size()
        return token not in self._silent and 0 <= token < size and not self.tokenizer.is_control(token)
