"""Everything in the process itself (`cluster.workers: 0`): one policy that acts and is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rlhf_duplex.batch import Batch
from rlhf_duplex.cluster.roles import LearnerRole, Played, RolloutRole, Unit, load_policy
from rlhf_duplex.config import Config
from rlhf_duplex.inputs import Inputs


class LearnersLostError(RuntimeError):
    """A learner died or hung, and what it had not saved is lost: `recover` goes back to the last checkpoint."""


class Cluster(Protocol):
    """Who does the work, as the loop sees it.

    Attributes:
        frame_rate: of the policy.
        workers: that play at the same time.
        unit: episodes that a worker is given at once, at most; 0: all that are to be played, if need be in batches.
    """

    frame_rate: float
    workers: int
    unit: int

    def begin(self, units: Sequence[Unit]) -> None:
        """Have units played with the weights of now."""

    def played(self, advance: Callable[[float], None] | None = None) -> list[Played]:
        """Wait for what was begun; `advance` is told of the frames that were played.

        Raises:
            LearnersLostError: nothing of it counts.
        """

    def learn(self, batch: Batch, update: int) -> dict[str, float]:
        """An update; see `Learner.update`.

        Raises:
            LearnersLostError: it is not known whether it took place.
        """

    def save(self, run_dir: Path, update: int) -> Path:
        """A checkpoint of now; raises as `learn`."""

    def restore(self, folder: Path) -> int:
        """Go on from a checkpoint; gives its update."""

    def lost(self, error: LearnersLostError) -> None:
        """Count a loss, and say so; raises where there were too many."""

    def recover(self) -> None:
        """Start learners anew. `restore` is to follow."""

    def figures(self) -> dict[str, float]:
        """Figures for the log since the last call."""

    def close(self) -> None:
        """End it."""


class LocalCluster:
    """See `Cluster`."""

    workers = 1
    unit = 0

    def __init__(self, config: Config, inputs: Inputs) -> None:
        torch.manual_seed(config.seed)
        self.bundle, self.policy = load_policy(config)
        self.rollout = RolloutRole(
            config, inputs.segments, inputs.detector, inputs.reward_function, self.policy, self.bundle
        )
        self.learner = LearnerRole(config, self.policy, self.bundle)
        self.frame_rate = self.bundle.codec.frame_rate
        self._waiting: list[Unit] = []

    def begin(self, units: Sequence[Unit]) -> None:
        self._waiting = list(units)

    def played(self, advance: Callable[[float], None] | None = None) -> list[Played]:
        for unit in self._waiting:
            self.rollout.play(unit, advance)
        self._waiting = []
        return self.rollout.collect()

    def learn(self, batch: Batch, update: int) -> dict[str, float]:
        diagnostics = self.learner.learn(batch, update)
        self.rollout.version = update + 1
        return diagnostics

    def save(self, run_dir: Path, update: int) -> Path:
        return self.learner.save(run_dir, update)

    def restore(self, folder: Path) -> int:
        self.rollout.version = self.learner.restore(folder)
        return self.rollout.version

    def lost(self, error: LearnersLostError) -> None:
        raise error  # what is in the process itself cannot be lost alone

    def recover(self) -> None:
        return

    def figures(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
