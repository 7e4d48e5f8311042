"""What was done at a frame, as a loss sees it: the text token, or only what of it is timing.

Shapes: `B` episodes, `T` frames, `V` text vocabulary.
"""

from dataclasses import dataclass

import torch

OBJECTIVES = ("tokens", "speaking", "onsets")
_NOTHING = -1e30  # log-probability of what cannot be drawn, finite


@dataclass(frozen=True)
class Objective:
    """Which log-probability a frame contributes.

    Attributes:
        name: `tokens`, the text token that was drawn; `speaking`, whether it was the padding token or any other
            (ASPIRin, arXiv 2604.10065): timing is learned, which words are said is not; or `onsets`, the token where
            the agent has been silent for `onset_frames` and may begin, `speaking` elsewhere: also with which word to
            begin is learned (an "mm-hm" or a sentence), how a sentence goes on is not.
        silent: the padding token; announcing: the token that announces a word (PAD and EPAD, 3 and 0 in Moshi).
        onset_frames: must be longer than the pauses between the words of a sentence (8 frames are 0.64 s).
        apart: of `onsets`, tokens that are told from others where the agent may begin (those of "mm-hm"), beside
            `silent` and `announcing`: all others are one choice, "a sentence", and with which word it begins is not
            learned. Empty: every token is a choice.
    """

    name: str = "tokens"
    silent: int = 3
    announcing: int = 0
    onset_frames: int = 8
    apart: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective '{self.name}' is not known: choose one of {', '.join(OBJECTIVES)}")

    def log_probs(
        self, distribution: torch.Tensor, text: torch.Tensor, onsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, T)` from log-probabilities `(B, T, V)` and text tokens `(B, T)` (-1 counts as token 0: mask it).

        `onsets`, where these are some frames of many and not whole episodes in order: `self.onsets` at them.
        """
        tokens = distribution.gather(-1, text.clamp(min=0)[..., None])[..., 0]
        if self.name == "tokens":
            return tokens
        spoke = (text != self.silent).long()
        speaking = speaking_log_probs(distribution, self.silent).gather(-1, spoke[..., None])[..., 0]
        if self.name == "speaking":
            return speaking
        if self.apart:
            kinds = self._told_apart.to(text.device)
            kind = (text[..., None] == kinds).long()
            kind = torch.where(kind.any(dim=-1), kind.argmax(dim=-1), len(kinds))
            tokens = self.choices(distribution).gather(-1, kind[..., None])[..., 0]
        return torch.where(self.onsets(text) if onsets is None else onsets, tokens, speaking)

    @property
    def _told_apart(self) -> torch.Tensor:
        return torch.tensor([self.silent, self.announcing, *self.apart])

    def choices(self, log_policy: torch.Tensor) -> torch.Tensor:
        """What is chosen of where the agent may begin: log-probabilities `(..., V)` to `(..., C)`.

        {silent, speak}; with `apart` {silent, announcing, each token apart, any other}.
        """
        if not self.apart:
            return speaking_log_probs(log_policy, self.silent)
        kinds = self._told_apart.to(log_policy.device)
        others = _mass(log_policy.index_fill(-1, kinds, float("-inf")))
        return torch.cat([log_policy[..., kinds], others[..., None]], dim=-1)

    def onsets(self, text: torch.Tensor) -> torch.Tensor:
        """`(B, T)` bool of text tokens `(B, T)`: the agent was silent for `onset_frames` and may begin."""
        return onset_mask((text >= 0) & (text != self.silent) & (text != self.announcing), self.onset_frames)


def speaking_log_probs(log_policy: torch.Tensor, silent: int) -> torch.Tensor:
    """The policy projected on {silent, speak}: `(..., V)` log-probabilities to `(..., 2)`.

    The mass of the padding token against that of all others, probabilities summed and not logits (arXiv 2604.10065).
    Every token but `silent` speaks, the one that announces a word too.
    """
    others = torch.cat([log_policy[..., :silent], log_policy[..., silent + 1 :]], dim=-1)
    return torch.stack([log_policy[..., silent], _mass(others)], dim=-1)


def _mass(log_probs: torch.Tensor) -> torch.Tensor:
    """`logsumexp` over the last dimension; where `top_k` left no token, a mass of 0 with a gradient of 0, not NaN."""
    return log_probs.clamp(min=_NOTHING).logsumexp(dim=-1)


def onset_mask(spoken: torch.Tensor, frames: int) -> torch.Tensor:
    """Where an agent that is silent may begin: `(B, T)` bool, True where none of the `frames` frames before has a word.

    Args:
        spoken: `(B, T)` bool, a word's token was drawn at this frame.
    """
    before = torch.nn.functional.pad(spoken.float(), (frames, 0))[:, None, :-1]
    return torch.nn.functional.max_pool1d(before, frames, stride=1)[:, 0] == 0
