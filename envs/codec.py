"""What the environment needs to know of a speech model: how audio and text become tokens and come back."""

from typing import Protocol

import torch


class Codec(Protocol):
    """Audio and text to tokens and back, for one speech model.

    Shapes: `B` episodes, `N` samples, `T` frames; codes are int64.

    Attributes:
        sample_rate: Hz of the audio; frame_rate: frames a second; frame_samples: samples of a frame.
        agent_codebooks, user_codebooks: audio streams of the agent and of the user in a frame.
        audio_cardinality: codes of one codebook; the value `audio_cardinality` itself means "no audio yet".
        text_cardinality: tokens of the text stream; the value `text_cardinality` means "no text yet".
        device: where codes live.
    """

    sample_rate: int
    frame_rate: float
    frame_samples: int
    agent_codebooks: int
    user_codebooks: int
    audio_cardinality: int
    text_cardinality: int
    device: torch.device

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """User audio `(B, N)`, N a whole number of frames, to codes `(B, user_codebooks, T)`."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Agent codes `(B, agent_codebooks, T)` to audio `(B, T * frame_samples)`."""
        ...

    def decode_text(self, tokens: list[int]) -> str:
        """Words of a text stream, paddings left out."""
        ...

    def decode_words(self, tokens: list[int]) -> list[tuple[str, int, int]]:
        """The same words, each with the frame of its first token and the frame after its last."""
        ...
