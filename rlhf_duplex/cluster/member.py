"""A process of the cluster: plays one of the roles or both, and is told what to do by the run's own process."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from envs.segments import Segment
from envs.speech import make_detector
from rewards.aggregate import RewardFunction, RewardSpec
from rlhf_duplex.batch import Batch
from rlhf_duplex.cluster.roles import LearnerRole, Played, RolloutRole, Unit, load_policy
from rlhf_duplex.cluster.weights import Broadcast
from rlhf_duplex.config import Config
from rlhf_duplex.parallel import Alone, DataParallel, Sharded


class Member:
    """What Ray runs as an actor. Its methods are called one after another."""

    def __init__(self, config: Config, folder: str) -> None:
        if os.path.isdir(folder):  # where paths of the configuration lead from
            os.chdir(folder)
        torch.manual_seed(config.seed)
        self.config = config
        self.learner: LearnerRole | None = None
        self.rollout: RolloutRole | None = None
        self._broadcast: Broadcast | None = None

    def place(self) -> dict[str, Any]:
        """Where this is: process, node, and an address that the others of a group can meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        node = ray.get_runtime_context().get_node_id()
        ip = ray.util.get_node_ip_address()
        return {"pid": os.getpid(), "node": node, "ip": ip, "address": f"{ip}:{port}"}

    def start_learner(self, rank: int, world: int, address: str) -> float:
        """Load the policy and meet the other learners; gives the frame rate."""
        config, cluster = self.config, self.config.cluster
        device = torch.device(config.device)
        parallel: Alone | None = None
        cut = cluster.strategy == "fsdp"
        if cut:
            half = cluster.mixed_precision == "bfloat16"
            parallel = Sharded(rank, world, address, device, cluster.timeout, half)
        elif world > 1:
            parallel = DataParallel(rank, world, address, device, cluster.timeout)
        bundle, policy = load_policy(config, "cpu" if cut else "")  # whole only until it is cut
        frame_rate = bundle.codec.frame_rate
        self.learner = LearnerRole(config, policy, bundle, parallel)
        return frame_rate

    def start_rollout(self, segments: Sequence[Segment]) -> int:
        """Load the policy, or share the learner's if it is here and whole; and the environment. Gives the version."""
        config = self.config
        shared = self.learner is not None and config.cluster.strategy != "fsdp"
        if shared and self.learner is not None:
            bundle, policy = self.learner.bundle, self.learner.learner.policy
        else:
            bundle, policy = load_policy(config, number_type=config.cluster.rollout_dtype)
        function = RewardFunction({name: RewardSpec.from_config(options) for name, options in config.rewards.items()})
        function.prepare(segments)
        detector = make_detector(config.detector.name, **config.detector.options)
        self.rollout = RolloutRole(config, segments, detector, function, policy, bundle)
        return self.rollout.version

    def play(self, unit: Unit) -> int:
        """See `RolloutRole.play`; gives the version of the policy that played."""
        assert self.rollout is not None
        self.rollout.play(unit)
        return self.rollout.version

    def collect(self) -> list[Played]:
        """See `RolloutRole.collect`."""
        assert self.rollout is not None
        return self.rollout.collect()

    def learn(self, batch: Batch, update: int) -> dict[str, float]:
        """See `LearnerRole.learn`."""
        assert self.learner is not None
        return self.learner.learn(batch, update)

    def save(self, run_dir: str, update: int) -> str:
        """See `LearnerRole.save`."""
        assert self.learner is not None
        return str(self.learner.save(Path(run_dir), update))

    def restore(self, folder: str) -> int:
        """See `LearnerRole.restore`."""
        assert self.learner is not None
        return self.learner.restore(Path(folder))

    def weights(self) -> dict[str, torch.Tensor]:
        """What training changes, on the CPU; of a group all must be asked, and the first has it."""
        assert self.learner is not None
        return {name: self._acting(value).cpu() for name, value in self.learner.learner.trained_weights().items()}

    def _acting(self, value: torch.Tensor) -> torch.Tensor:
        """A weight in the number type of the policy that acts."""
        name = self.config.cluster.rollout_dtype
        return value.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[name]) if name else value

    def load_weights(self, version: int, weights: dict[str, torch.Tensor]) -> int:
        """See `RolloutRole.load_weights`; gives the bytes that came."""
        assert self.rollout is not None
        self.rollout.load_weights(version, weights)
        return sum(value.nbytes for value in weights.values())

    def share_weights(self, version: int) -> None:
        """Give this process' own rollouts the learner's weights (colocated)."""
        assert self.learner is not None
        assert self.rollout is not None
        learner = self.learner.learner
        if self.rollout.policy is not learner.policy:
            for name, value in learner.parameters.items():  # one at a time: never a second whole model
                whole = learner.parallel.whole({name: value.detach()}, everywhere=True)
                self.rollout.load_weights(version, whole)
        self.rollout.version = version

    def join_broadcast(self, rank: int, world: int, address: str) -> None:
        """Meet the others of a broadcast."""
        self._broadcast = None
        self._broadcast = Broadcast(rank, world, address, self.config.device, self.config.cluster.timeout)

    def send_weights(self) -> int:
        """The first learner's part of a broadcast, and that of the other learners, who gather; gives the bytes.

        Raises:
            RuntimeError: one of those who receive is gone. The learners have gathered everything all the same: none of
                them waits for another.
        """
        assert self.learner is not None
        learner, count = self.learner.learner, 0
        failure: RuntimeError | None = None
        for name, value in learner.parameters.items():
            whole = learner.parallel.whole({name: value.detach()})
            if self._broadcast is not None and failure is None:
                sent = self._acting(whole[name])
                try:
                    self._broadcast.send(sent)
                except RuntimeError as error:
                    failure = error
                count += sent.nbytes
        if failure is not None:
            raise failure
        return count

    def receive_weights(self, version: int, names: Sequence[str]) -> None:
        """A worker's part of a broadcast."""
        assert self.rollout is not None
        assert self._broadcast is not None
        own = self.rollout.policy.lm.state_dict()
        for name in names:
            self._broadcast.receive(own[name])
        self.rollout.version = version

    def trained_names(self) -> list[str]:
        """Of the weights that a broadcast brings, in its order."""
        assert self.learner is not None
        return list(self.learner.learner.parameters)
