"""Mimi frame by frame, and a second policy as the user of live dialogues."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from envs.segments import Segment
from rlhf_duplex.policy.codec import MimiCodec
from rlhf_duplex.policy.moshi import MoshiPolicy


class MimiStream:
    """Mimi's own streaming mode, encoder and decoder, of B dialogues (see `envs.scripted_user.CodecStream`).

    It has a copy of the weights: streaming is a state of the modules, and the codec itself goes on being used whole.

    Args:
        codec: whose Mimi is copied.
    """

    def __init__(self, codec: MimiCodec) -> None:
        self._mimi = copy.deepcopy(codec.mimi).eval()
        self._device = codec.device
        self._user_codebooks = codec.user_codebooks
        self._streaming: ExitStack | None = None
        self._batch = 0

    @torch.no_grad()
    def begin(self, batch: int) -> None:
        """Start B streams from silence."""
        if self._streaming is not None and batch == self._batch:
            self._mimi.reset_streaming()
            return
        if self._streaming is not None:
            self._streaming.close()
        self._streaming, self._batch = self._mimi.streaming(batch), batch

    @torch.no_grad()
    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """A frame of audio `(B, frame_samples)` to codes `(B, user_codebooks)`."""
        return self._mimi.encode(audio.to(self._device)[:, None])[:, : self._user_codebooks, 0]

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """A frame of codes `(B, agent_codebooks)` to audio `(B, frame_samples)`."""
        return self._mimi.decode(codes[..., None].to(self._device))[:, 0]


class PolicyUser:
    """A second policy as the user (`envs.scripted_user.LiveUser`): it hears the agent's codes, and answers in codes.

    Both sides must share the codec, with as many codebooks for the user as for the agent.

    Args:
        policy: who plays the user; not the policy under test itself (a policy is in one batch of dialogues at a time).
        codec: of both.
        frames: of a dialogue.
        seed_of: the seed of a dialogue's draws, from its segment.
    """

    def __init__(self, policy: MoshiPolicy, codec: MimiCodec, frames: int, seed_of: Callable[[Segment], int]) -> None:
        self._policy, self._codec, self._frames, self._seed_of = policy, codec, frames, seed_of

    def begin(self, dialogues: Sequence[Segment]) -> torch.Tensor:
        """See `LiveUser.begin`. In the first frame nothing is complete yet: it is silence."""
        self._dialogues = list(dialogues)
        self._policy.begin([self._seed_of(dialogue) for dialogue in dialogues], self._frames)
        silence = torch.zeros(1, self._codec.frame_samples)
        self._silence = self._codec.encode(silence)[0, :, 0]
        self._codes = [self._silence.expand(len(dialogues), -1).clone()]
        return self._codes[0]

    def hear(self, actions: torch.Tensor) -> torch.Tensor:
        """See `LiveUser.hear`."""
        heard = actions[:, 1:]
        missing = heard >= self._codec.audio_cardinality
        said = self._policy.act(torch.where(missing, self._silence, heard))[:, 1:]
        self._codes.append(torch.where(said >= self._codec.audio_cardinality, self._silence, said))
        return self._codes[-1]

    def sides(self) -> list[tuple[np.ndarray, Segment]]:
        """See `LiveUser.sides`."""
        self._policy.end()
        audio = self._codec.decode(torch.stack(self._codes, dim=-1)).float().cpu().numpy()
        return list(zip(audio, self._dialogues, strict=True))
