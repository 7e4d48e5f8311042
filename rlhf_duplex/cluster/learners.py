"""The learner group on Ray: its processes in one placement group, and calls that all of them take part in."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_duplex.cluster.local import LearnersLostError
from rlhf_duplex.cluster.pool import RolloutPool
from rlhf_duplex.cluster.processes import (
    ClusterError,
    GoneError,
    Process,
    gpus_of,
    result_of,
    start_member,
    wait_all,
)
from rlhf_duplex.config import Config


class LearnerGroup:
    """As many learners as the configuration asks for, all there or none.

    Raises:
        GoneError: one did not start.
        ClusterError: there is no room for them.
    """

    def __init__(self, config: Config) -> None:
        self.config, cluster = config, config.cluster
        count = cluster.workers if cluster.placement == "colocated" else cluster.learners
        bundle = {"CPU": cluster.cpus, "GPU": gpus_of(config)}
        self._placement = placement_group([{k: v for k, v in bundle.items() if v}] * count, strategy="PACK")
        self.processes: list[Process] = []
        if not self._placement.wait(cluster.start_timeout):
            remove_placement_group(self._placement)
            raise ClusterError(
                f"no room for {count} learners within {cluster.start_timeout:g} s: each needs {bundle}, "
                f"and Ray has {ray.available_resources()} left"
            )
        for rank in range(count):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            self.processes.append(start_member(f"learner {rank}", config, strategy))
        try:
            places = self._all("place", cluster.start_timeout, "starting")
            for process, where in zip(self.processes, places, strict=True):
                process.where = where
            refs = [
                process.handle.start_learner.remote(rank, count, places[0]["address"])
                for rank, process in enumerate(self.processes)
            ]
            self.frame_rate = wait_all(self.processes, refs, cluster.start_timeout, "loading the model")[0]
        except (GoneError, ClusterError):
            self.close()
            raise

    def _all(self, method: str, seconds: float, doing: str, *inputs: Any) -> list[Any]:
        refs = [getattr(process.handle, method).remote(*inputs) for process in self.processes]
        try:
            return wait_all(self.processes, refs, seconds, doing)
        except ClusterError as error:
            raise self._explained(error) from error

    def _explained(self, error: ClusterError) -> Exception:
        """A learner that loses another in the middle of an exchange fails as well: then it is the other that counts."""
        refs = {process.handle.place.remote(): process for process in self.processes}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=10.0)  # those that wait for the dead one do not
        for ref in ready:
            try:
                result_of(refs[ref], ref)
            except GoneError as gone:
                return gone
        return error

    def call(self, method: str, doing: str, *inputs: Any) -> Any:
        """What the first learner's method gives, with all of them taking part.

        Raises:
            LearnersLostError: one died or hung.
        """
        try:
            return self._all(method, self.config.cluster.timeout, doing, *inputs)[0]
        except GoneError as error:
            raise LearnersLostError(str(error)) from error

    def learn(self, batch: Any, update: int, meanwhile: RolloutPool | None) -> dict[str, float]:
        """An update; the pool goes on handing out work while it is waited for.

        Raises:
            LearnersLostError: one died or hung.
        """
        refs = {process.handle.learn.remote(batch, update): process for process in self.processes}
        try:
            if meanwhile is None:
                return wait_all(list(refs.values()), list(refs), self.config.cluster.timeout, "learning")[0]
            found, deadline = [], time.monotonic() + self.config.cluster.timeout
            while refs:
                ready, _ = ray.wait(list(refs), timeout=0.05)
                found += [result_of(refs.pop(ref), ref) for ref in ready]
                meanwhile.pump_meanwhile()
                if refs and time.monotonic() > deadline:
                    raise GoneError(f"{next(iter(refs.values()))} did not finish update {update} in time")
            return found[0]
        except GoneError as error:
            raise LearnersLostError(str(error)) from error
        except ClusterError as error:
            explained = self._explained(error)
            if isinstance(explained, GoneError):
                raise LearnersLostError(str(explained)) from error
            raise

    def weights(self) -> Any:
        """Reference to what the first learner has of the trained weights; they do not pass through this process.

        Raises:
            LearnersLostError: one died or hung.
        """
        refs = [process.handle.weights.remote() for process in self.processes]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=self.config.cluster.timeout, fetch_local=False)
        if late:
            raise LearnersLostError(f"{self.processes[0]} did not give its weights in time")
        self.call("place", "giving weights")  # dead, it would be taken for the workers' fault
        return refs[0]

    def save(self, run_dir: Path, update: int) -> Path:
        """A checkpoint; the first learner writes it, so that the run folder must be on a disk that it sees."""
        folder = Path(self.call("save", "saving a checkpoint", str(run_dir.resolve()), update))
        if not folder.is_dir():
            raise ClusterError(
                f"{self.processes[0]} wrote {folder}, which this process does not see: put run_dir on a shared disk"
            )
        return run_dir / "checkpoints" / folder.name

    def close(self) -> None:
        """End all learners."""
        for process in self.processes:
            ray.kill(process.handle)
        remove_placement_group(self._placement)
