"""The work of a run on Ray: rollout workers and learners, weights from these to those, and what to do when one dies."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from rich.console import Console

from envs.segments import Segment
from rlhf_duplex.batch import Batch
from rlhf_duplex.cluster.learners import LearnerGroup
from rlhf_duplex.cluster.local import LearnersLostError
from rlhf_duplex.cluster.pool import RolloutPool
from rlhf_duplex.cluster.processes import ClusterError, GoneError, Process, connect, wait_all
from rlhf_duplex.cluster.roles import Played, Unit, all_left_out
from rlhf_duplex.config import Config
from rlhf_duplex.inputs import Inputs

log = logging.getLogger(__name__)


def _absolute(segment: Segment) -> Segment:
    agent = segment.agent_recording
    return replace(
        segment, recording=segment.recording.resolve(), agent_recording=None if agent is None else agent.resolve()
    )


class RayCluster:
    """See `Cluster`. The process that makes it holds no model.

    Raises:
        InputError: Ray cannot be had, or is too small.
        ClusterError: the processes do not start.
    """

    def __init__(self, config: Config, inputs: Inputs, console: Console) -> None:
        cluster = config.cluster
        self.config, self._console, self.workers = config, console, cluster.workers
        self.unit = config.rollout.batch_size
        self._colocated = cluster.placement == "colocated"
        self.failures = 0
        # Version 0 is the checkpoint that everybody loads; later ones are published before they are played with.
        self._version, self._published = 0, 0
        self._broadcasters: list[Process] = []
        self._sync_seconds, self._sync_bytes = 0.0, 0
        count = cluster.workers + (0 if self._colocated else cluster.learners)
        with console.status(f"starting {count} processes on Ray"):
            self._started_ray = connect(config, count)
            self._segments = ray.put([_absolute(segment) for segment in inputs.segments])
            try:
                self._learners = self._start_learners()
                self.pool = self._make_pool()
            except BaseException:
                if self._started_ray:
                    ray.shutdown()
                raise
        self.frame_rate = self._learners.frame_rate

    def _start_learners(self) -> LearnerGroup:
        while True:
            try:
                return LearnerGroup(self.config)
            except GoneError as error:
                self._failed(str(error))

    def _make_pool(self) -> RolloutPool:
        own = self._learners.processes if self._colocated else ()
        pool = RolloutPool(self.config, self._segments, self._failed, lambda: self._learners.weights(), own)
        pool.set_weights(0, None)
        if self._colocated:
            pool.mark_version(0, own)
        return pool

    def _failed(self, why: str) -> None:
        """Count a failure, and say so.

        Raises:
            ClusterError: there were too many.
        """
        self.failures += 1
        limit = self.config.cluster.max_failures
        if self.failures > limit:
            raise ClusterError(
                f"gave up after {self.failures} failures (cluster.max_failures={limit}), the last: {why}; "
                "go on from the last checkpoint with resume=true"
            )
        self._console.print(f"failure {self.failures} of at most {limit}: {why}", style="yellow", soft_wrap=True)

    def begin(self, units: Sequence[Unit]) -> None:
        self._publish()
        self.pool.begin(units)

    def _publish(self) -> None:
        """Let the workers have the weights of now."""
        if self._published == self._version:
            return
        started = time.monotonic()
        if self._colocated:
            self._learners.call("share_weights", "sharing weights", self._version)
            self.pool.set_weights(self._version, None)
            self.pool.mark_version(self._version, self._learners.processes)
        elif self.config.cluster.weights == "broadcast" and self._broadcast():
            self.pool.set_weights(self._version, None)
        else:
            self.pool.set_weights(self._version, self._learners.weights())
        self._published = self._version
        self._sync_seconds += time.monotonic() - started

    def _broadcast(self) -> bool:
        """A collective broadcast to all workers that have started; False where it did not come about."""
        self.pool.look_for_dead()
        workers, learners, seconds = self.pool.processes, self._learners.processes, self.config.cluster.timeout
        if not workers:
            return False
        members = [learners[0], *workers]
        try:
            if [id(member) for member in members] != [id(member) for member in self._broadcasters]:
                address = self._learners.call("place", "meeting for a broadcast")["address"]
                joining = [
                    member.handle.join_broadcast.remote(rank, len(members), address)
                    for rank, member in enumerate(members)
                ]
                wait_all(members, joining, seconds, "meeting for a broadcast")
                self._broadcasters = members
            names = self._learners.call("trained_names", "naming its weights")
            refs = [learner.handle.send_weights.remote() for learner in learners]
            refs += [worker.handle.receive_weights.remote(self._version, names) for worker in workers]
            self._sync_bytes += wait_all([*learners, *workers], refs, seconds, "broadcasting weights")[0]
        except (GoneError, ClusterError) as error:
            # Whoever is dead is found out when it is asked next; the others get the weights in the other way.
            self._broadcasters = []
            self._console.print(f"no broadcast this time: {error}", style="yellow", soft_wrap=True)
            return False
        self.pool.mark_version(self._version, workers)
        return True

    def played(self, advance: Callable[[float], None] | None = None) -> list[Played]:
        lead_in = self.config.context.lead_in

        def on_unit(unit: Unit | None) -> None:
            if advance is not None:
                seconds = 0.0 if unit is None else sum(segment.duration + lead_in for segment in unit.segments)
                advance(seconds * self.frame_rate)

        played = self.pool.results(on_unit)
        for name, left in all_left_out(played).items():  # what the workers themselves log, nobody sees
            if left.many:
                log.warning("%s: %s", name, left)
        return played

    def learn(self, batch: Batch, update: int) -> dict[str, float]:
        diagnostics = self._learners.learn(ray.put(batch), update, self.pool if self.config.trainer.ahead else None)
        self._version = update + 1
        return diagnostics

    def save(self, run_dir: Path, update: int) -> Path:
        return self._learners.save(run_dir, update)

    def restore(self, folder: Path) -> int:
        self._version = self._learners.call("restore", "reading a checkpoint", str(folder.resolve()))
        self._published = -1
        return self._version

    def recover(self) -> None:
        self._learners.close()
        self._learners = self._start_learners()
        if self._colocated:
            self.pool = self._make_pool()
        self.pool.forget_weights()
        self._published = -1

    def lost(self, error: LearnersLostError) -> None:
        """Count the learners' loss."""
        self._failed(f"{error}; the learners start again from the last checkpoint")

    def figures(self) -> dict[str, float]:
        found = self.pool.figures()
        found["time/sync"] = found.get("time/sync", 0.0) + self._sync_seconds
        found["cluster/sync_megabytes"] = found.get("cluster/sync_megabytes", 0.0) + self._sync_bytes / 2**20
        self._sync_seconds, self._sync_bytes = 0.0, 0
        return {**found, "cluster/failures": float(self.failures)}

    def close(self) -> None:
        if not ray.is_initialized():  # lost; asked to end a process, Ray would join whatever runs on this machine
            return
        self.pool.close()
        self._learners.close()
        if self._started_ray:
            ray.shutdown()
