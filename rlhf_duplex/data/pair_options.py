"""What can be chosen about pairs. No heavy imports: the command line reads the defaults for its help."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made. Options that only one source reads say so; times are seconds.

    Attributes:
        seed: of everything random.
        device, dtype: of the policy.
        heldout: share of the dialogues whose pairs are held out.
        balance: cut every kind to as many pairs as the rarest has.
        context: conversations: how much of the dialogue before the problem a pair keeps.
        gap: conversations: silence between the user's end and a moved reply.
        response: conversations: a turn unanswered for so long is a problem.
        accept: conversations: a drawn reply must begin so soon after the turn.
        reply: conversations: room for a drawn reply, from its turn's end.
        candidates: conversations: replies drawn for an unanswered turn.
        content_at_most: conversations: a content mark of the judge so low is a problem.
        max_pairs: conversations: pairs of one dialogue.
        strict: conversations: a bad recording ends the run.
        group_size: rollouts: episodes of a segment.
        segment_pairs: rollouts: most pairs of a segment: best against worst, second best against second worst...
        margin: rollouts: least difference of reward between chosen and rejected.
        lead_in: rollouts: silence before a segment.
        batch_size: episodes, or dialogues, at once.
        text_temperature, audio_temperature, audio_top_k: of the policy.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    heldout: float = 0.1
    balance: bool = False
    context: float = 30.0
    gap: float = 0.24
    response: float = 3.0
    accept: float = 1.5
    reply: float = 8.0
    candidates: int = 4
    content_at_most: int = 2
    max_pairs: int = 2
    strict: bool = False
    group_size: int = 8
    segment_pairs: int = 1
    margin: float = 0.5
    lead_in: float = 1.0
    batch_size: int = 64
    text_temperature: float = 0.7
    audio_temperature: float = 0.8
    audio_top_k: int = 250

    def __post_init__(self) -> None:
        from envs.errors import InputError  # `envs` imports torch

        counts = {
            "candidates": 1,
            "max_pairs": 1,
            "group_size": 2,
            "segment_pairs": 1,
            "batch_size": 1,
            "audio_top_k": 0,
            "seed": 0,
        }
        for name, low in counts.items():
            if getattr(self, name) < low:
                raise InputError(f"{_flag(name)} must be at least {low}, found {getattr(self, name)}")
        for name in ("context", "gap", "response", "accept", "reply", "margin", "lead_in"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_flag(name)} must be a number of at least 0, found {value}")
        for name in ("text_temperature", "audio_temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{_flag(name)} must be a number of at least 0, found {getattr(self, name)}")
        if not 0 <= self.heldout < 1:
            raise InputError(f"--heldout must be a share of at least 0 and below 1, found {self.heldout}")
        if not 1 <= self.content_at_most <= 5:
            raise InputError(f"--content-at-most must be a mark from 1 to 5, found {self.content_at_most}")
        if not 0 < self.accept <= self.response:
            raise InputError(
                f"--accept must be above 0 and at most --response ({self.response}), found {self.accept}: a reply that "
                "comes later than that is no answer"
            )
        if self.reply <= self.accept:
            raise InputError(f"--reply must be above --accept ({self.accept}), found {self.reply}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"--dtype '{self.dtype}' is not known: choose float32 or bfloat16")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
