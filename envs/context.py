"""What precedes a segment in an episode: a lead-in of silence, then some seconds of the recording before it.

arXiv 2606.11167, section 3 (training details): with probability 0.5 an episode starts U[0, l_max] seconds before its
segment, and l_max rises linearly from 0 to 30 s over training. Neither part is scored or trained on.
"""

from dataclasses import dataclass

import numpy as np

from envs.errors import InputError


@dataclass(frozen=True)
class ContextSchedule:
    """How much context an episode gets, as training goes on.

    Attributes:
        probability: share of the groups that get any.
        max_seconds: l_max at the end of training.
        schedule: `linear` (0 to `max_seconds`) or `constant`.
    """

    probability: float = 0.5
    max_seconds: float = 30.0
    schedule: str = "linear"

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "constant"):
            raise InputError(f"context schedule '{self.schedule}' is not known: choose linear or constant")
        if not (0 <= self.probability <= 1 and self.max_seconds >= 0):
            raise InputError(
                f"context needs 0 <= probability <= 1 and max_seconds >= 0, "
                f"found {self.probability}, {self.max_seconds}"
            )

    def limit(self, progress: float) -> float:
        """l_max in seconds at `progress` in [0, 1] of the training."""
        return self.max_seconds * (min(max(progress, 0.0), 1.0) if self.schedule == "linear" else 1.0)

    def draw(self, rng: np.random.Generator, progress: float) -> float:
        """Seconds of context for one group."""
        use, share = (
            rng.random(),
            rng.random(),
        )  # two draws always, so that the stream does not depend on the outcome
        return share * self.limit(progress) if use < self.probability else 0.0
