"""A dialogue on the frame grid: words placed on the text stream, and what is heard turned into the model's columns.

There are two ways to lay tokens out. *As heard*: column f holds the agent's and the user's codes of frame f of the
recording, and the text token of a word at its onset's frame; here audio is encoded, moved and replaced. *As the model
has it* (`rlhf_duplex.data.pair`): column n holds the agent's tokens that are heard in frame n + max_delay, and the
user's codes of frame n + 1.

Shapes: `K` streams (text, agent's codebooks, user's codebooks), `F` frames as heard, `T` columns of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch

from envs.episode import Word
from envs.frames import frame_at, frames_in
from rlhf_duplex.policy.bundle import Bundle
from rlhf_duplex.policy.codec import MimiCodec

SILENCE_SETTLES = 25  # frames of silence after which Mimi's codes of silence no longer know of a beginning
WORD_SECONDS = 0.6  # the longest that a word of the inner monologue is taken to last


@dataclass(frozen=True)
class TextAligner:
    """Words to a text stream, as moshi-finetune's `Interleaver` does it with its defaults.

    A word's tokens begin in the frame of its onset, one a frame; the frame before gets EPAD where it held PAD; all else
    is PAD. A word that begins before the tokens of the one before are used up cuts them off. Words of no duration are
    left out.

    Attributes:
        tokenizer: SentencePiece; each word is encoded by itself.
        pad, epad: the two padding tokens.
        frame_rate: frames a second.
    """

    tokenizer: sentencepiece.SentencePieceProcessor
    pad: int
    epad: int
    frame_rate: float

    @classmethod
    def of(cls, bundle: Bundle) -> "TextAligner":
        lm = bundle.lm
        return cls(bundle.tokenizer, lm.text_padding_token_id, lm.end_of_text_padding_id, float(bundle.mimi.frame_rate))

    def place(self, words: Sequence[Word], frames: int) -> torch.Tensor:
        """Words (seconds from the stream's beginning) as a text stream `(frames,)` int64, as heard."""
        stream = [self.pad] * frames
        queue: list[int] = []
        coming = sorted((w for w in words if w.end > w.start), key=lambda w: w.start)
        for frame in range(frames):
            while coming and frame_at(coming[0].start, self.frame_rate) <= frame:
                queue = self.tokenizer.encode(coming.pop(0).text)
            if queue:
                if frame and stream[frame - 1] == self.pad:
                    stream[frame - 1] = self.epad
                stream[frame] = queue.pop(0)
        return torch.tensor(stream, dtype=torch.long)

    def sayable(self, word: str) -> bool:
        """Whether the tokenizer has the word: some tokens, none of them unknown or a padding."""
        tokens = self.tokenizer.encode(word)
        return bool(tokens) and not any(
            token in (self.pad, self.epad) or self.tokenizer.is_unknown(token) or self.tokenizer.is_control(token)
            for token in tokens
        )


class Streams:
    """Encodes and converts dialogues for one bundle.

    Attributes:
        codec: audio to codes.
        aligner: words to text.
        max_delay: frames by which the agent's codes are heard after their step.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.codec: MimiCodec = bundle.codec
        self.aligner = TextAligner.of(bundle)
        self.max_delay = max(bundle.lm.delays)
        self._silence = torch.zeros(self.codec.agent_codebooks, 0, dtype=torch.long)

    @property
    def frame_rate(self) -> float:
        return self.codec.frame_rate

    def heard(self, agent: np.ndarray, user: np.ndarray, words: Sequence[Word], frames: int) -> torch.Tensor:
        """A dialogue as heard, `(K, F)` int64 with F = `frames`: both channels encoded once, the words placed.

        Args:
            agent, user: `(N,)` audio of both; cut or filled up with silence to `frames`.
            words: of the agent.
            frames: how many.
        """
        audio = np.zeros((2, frames * self.codec.frame_samples), dtype=np.float32)
        for row, channel in zip(audio, (agent, user), strict=True):
            row[: len(channel)] = channel[: len(row)]
        codes = self.codec.encode(torch.from_numpy(audio)).cpu()
        agent_codes, user_codes = codes[0, : self.codec.agent_codebooks], codes[1, : self.codec.user_codebooks]
        return torch.cat([self.aligner.place(words, frames)[None], agent_codes, user_codes])

    def words(self, stream: Sequence[int]) -> list[Word]:
        """The words of a text stream as heard (the inner monologue), with their times.

        A word begins at its first token; it ends where the next begins, at most `WORD_SECONDS` after its last token.
        """
        found = self.codec.decode_words(list(stream))
        begins = [*(first for _, first, _ in found), len(stream)][1:]
        return [
            Word(text, first / self.frame_rate, min(following / self.frame_rate, last / self.frame_rate + WORD_SECONDS))
            for (text, first, last), following in zip(found, begins, strict=True)
        ]

    def silence(self, frames: int) -> torch.Tensor:
        """Codes of a silent agent, `(agent_codebooks, frames)`, with no beginning in them."""
        if self._silence.shape[1] < frames:
            length = (SILENCE_SETTLES + max(frames, 125)) * self.codec.frame_samples
            codes = self.codec.encode(torch.zeros(1, length)).cpu()
            self._silence = codes[0, : self.codec.agent_codebooks, SILENCE_SETTLES:]
        return self._silence[:, :frames]

    def columns(self, heard: torch.Tensor) -> torch.Tensor:
        """`(K, F)` as heard to `(K, T)` as the model has it, T = F - max(max_delay, 1)."""
        count = heard.shape[1] - max(self.max_delay, 1)
        agent = heard[: 1 + self.codec.agent_codebooks, self.max_delay :]
        return torch.cat([agent[:, :count], heard[1 + self.codec.agent_codebooks :, 1 : 1 + count]])

    def agent_frames(self, columns: torch.Tensor) -> torch.Tensor:
        """The agent's codes as heard, `(agent_codebooks, F)`, of columns `(K, T)`: F = T + max_delay.

        The first `max_delay` frames, which no column holds, and codes that never came to be are silence.
        """
        codes = columns[1 : 1 + self.codec.agent_codebooks]
        codes = torch.where(codes < 0, self.silence(codes.shape[1]), codes)
        return torch.cat([self.silence(self.max_delay), codes], dim=1)

    def user_frames(self, columns: torch.Tensor) -> torch.Tensor:
        """The user's codes as heard, `(user_codebooks, F)`: F = T + 1, of which the first and the missing repeat."""
        codes = columns[1 + self.codec.agent_codebooks :]
        codes = torch.cat([codes[:, :1], codes], dim=1).clone()
        for frame in range(1, codes.shape[1]):
            missing = codes[:, frame] < 0
            codes[missing, frame] = codes[missing, frame - 1]
        return codes.clamp(min=0)

    def frame_at(self, seconds: float) -> int:
        return frame_at(seconds, self.frame_rate)

    def frames_in(self, seconds: float) -> int:
        return frames_in(seconds, self.frame_rate)
