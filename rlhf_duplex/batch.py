"""Episodes as tensors. Shapes: `B` episodes, `T` frames, `K` streams."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from envs.episode import Episode


@dataclass(frozen=True)
class Batch:
    """Episodes as tensors, padded at the end to the longest.

    Attributes:
        codes: `(B, K, T)` int64, -1 in the padding.
        log_probs: `(B, T)` of the behaviour policy.
        mask: `(B, T)` bool, the frames that the loss is about.
        advantages: `(B,)`, or `(B, T)`; with PPO the rewards `(B,)`, until the update has made advantages of them.
        weights: `(B, T)` importance weights, or None.
        values, returns: `(B, T)` of the value function before the update and what it is taught; None without one.
    """

    codes: torch.Tensor
    log_probs: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the episodes, cut to the longest of them."""
        length = int(self.mask[index].any(dim=0).nonzero().max()) + 1 if self.mask[index].any() else 1
        advantages = self.advantages[index]
        return Batch(
            self.codes[index, :, :length],
            self.log_probs[index, :length],
            self.mask[index, :length],
            advantages if advantages.ndim == 1 else advantages[:, :length],
            None if self.weights is None else self.weights[index, :length],
            None if self.values is None else self.values[index, :length],
            None if self.returns is None else self.returns[index, :length],
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


def make_batch(episodes: Sequence[Episode], advantages: torch.Tensor, frame_rate: float, device: torch.device) -> Batch:
    """Episodes and their advantages `(B,)` as tensors on a device.

    Raises:
        ValueError: an episode without tokens (no policy acted in it).
    """
    for episode in episodes:
        if episode.text_tokens is None or episode.audio_tokens is None or episode.log_probs is None:
            raise ValueError(f"the episode of segment '{episode.segment.id}' has no tokens: no policy acted in it")
    rows = [np.concatenate([e.text_tokens[None], e.audio_tokens]) for e in episodes]  # type: ignore[index]
    frames = max(row.shape[1] for row in rows)
    codes = torch.full((len(rows), rows[0].shape[0], frames), -1, dtype=torch.long)
    log_probs = torch.zeros(len(rows), frames)
    mask = torch.zeros(len(rows), frames, dtype=torch.bool)
    for index, (episode, row) in enumerate(zip(episodes, rows, strict=True)):
        count = row.shape[1]
        codes[index, :, :count] = torch.tensor(row)
        log_probs[index, :count] = torch.tensor(episode.log_probs)
        mask[index, :count] = torch.from_numpy(episode.frame_mask(frame_rate))
    return Batch(codes.to(device), log_probs.to(device), mask.to(device), advantages.to(device))
