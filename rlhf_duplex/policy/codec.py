"""Mimi and the tokenizer as the environment's `Codec`."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from envs.cores import map_on_cores
from envs.errors import InputError
from rlhf_duplex.policy.decoder import SeanetDecoder, UnknownLayerError

# Of all dialogues that are decoded at once on a GPU. A frame of Mimi's own size takes 1.7 MB on the way to audio.
DECODED_FRAMES = 3000
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes the space before a word


def agent_codebooks(n_q: int, dep_q: int) -> int:
    """Audio streams of the agent. PersonaPlex predicts the user's streams too (dep_q = n_q): half are the agent's."""
    return n_q // 2 if dep_q == n_q else dep_q


def mimi_fingerprint(mimi: MimiModel) -> str:
    """What tells one Mimi's weights from another's: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(mimi.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shared_beginnings(codes: torch.Tensor) -> tuple[list[int], list[int]]:
    """For each row of `(B, K, T)` the earlier row that begins like it for longest, and for how many frames.

    The first row shares nothing: row 0, 0 frames.
    """
    sources, frames = [0], [0]
    for row in range(1, len(codes)):
        same = (codes[:row] == codes[row]).all(dim=1).long().cumprod(dim=-1).sum(dim=-1)
        longest, source = same.max(dim=0)
        sources.append(int(source))
        frames.append(int(longest))
    return sources, frames


def first_tokens(tokenizer: sentencepiece.SentencePieceProcessor, words: Sequence[str]) -> list[int]:
    """The token that each word begins with.

    Raises:
        InputError: a word without tokens, or two that begin with the same one.
    """
    found: dict[int, str] = {}
    for word in words:
        pieces = tokenizer.encode(word)
        if not pieces or pieces[0] == tokenizer.unk_id():
            raise InputError(f"trainer.onset_words: the tokenizer of this model has no token for '{word}'")
        if pieces[0] in found:
            piece = tokenizer.id_to_piece(pieces[0])
            raise InputError(
                f"trainer.onset_words: '{found[pieces[0]]}' and '{word}' begin with the same token '{piece}': keep one"
            )
        found[pieces[0]] = word
    return list(found)


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
        self._decoder: SeanetDecoder | None = None
        if self.device.type == "cpu":
            with suppress(UnknownLayerError):  # then it is Mimi's own, slower
                self._decoder = SeanetDecoder(mimi)
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
            return self._decode_in_parts(codes.to(self.device))
        # On a CPU one dialogue at a time, so that what is between two layers stays in a core's cache: outside
        # streaming mode Mimi keeps no state. What begins like another one (silence, while the user speaks) sounds
        # like it so far, for every part of Mimi is causal, and is decoded once.
        sources, shared = shared_beginnings(codes)
        parts = zip(codes, shared if self._decoder is not None else [0] * len(codes), strict=True)
        ends = list(map_on_cores(self._decode_from, parts, self.device))
        audio = torch.empty(len(codes), codes.shape[-1] * self.frame_samples, dtype=ends[0].dtype)
        for row, (source, end) in enumerate(zip(sources, ends, strict=True)):
            known = audio.shape[1] - len(end)
            audio[row, :known] = audio[source, :known]
            audio[row, known:] = end
        return audio

    def _decode_in_parts(self, codes: torch.Tensor) -> torch.Tensor:
        """Audio of a batch, of so many dialogues at once as memory is meant for."""
        together = max(1, DECODED_FRAMES // codes.shape[-1])
        return torch.cat([self.mimi.decode(part)[:, 0] for part in codes.split(together)])

    @torch.no_grad()
    def _decode_from(self, part: tuple[torch.Tensor, int]) -> torch.Tensor:
        """Audio of one dialogue from a frame on: codes `(agent_codebooks, T)` and that frame."""
        codes, frame = part
        mimi = self.mimi
        if self._decoder is None:
            return mimi.decode(codes[None])[0, 0]
        if frame == codes.shape[-1]:
            return torch.empty(0)
        latent = mimi._to_encoder_framerate(mimi.decode_latent(codes[None]))
        if mimi.decoder_transformer is not None:
            (latent,) = mimi.decoder_transformer(latent)
        return self._decoder(latent[0], frame * latent.shape[-1] // codes.shape[-1])

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
