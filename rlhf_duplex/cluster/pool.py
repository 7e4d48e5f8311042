"""The rollout workers: units handed out, lost ones handed out again, the dead started anew."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rlhf_duplex.cluster.local import LearnersLostError
from rlhf_duplex.cluster.processes import ClusterError, GoneError, Process, kill, result_of, start_member
from rlhf_duplex.cluster.roles import Played, Unit
from rlhf_duplex.config import Config


@dataclass
class _Worker:
    """A rollout worker and the one call that it is busy with.

    Attributes:
        doing: `starting`, `taking weights`, `playing`, `scoring`, or nothing.
        unit: that it plays; units: those that it played and has not handed in.
        version: of its weights; -1 before it has any.
        taking: the version that it was sent.
    """

    process: Process
    doing: str = "starting"
    ref: Any = None
    since: float = 0.0
    unit: int | None = None
    units: list[int] = field(default_factory=list)
    version: int = -1
    taking: int = -1


class RolloutPool:
    """As many workers as the configuration asks for, as far as there is room for them.

    Args:
        config: of the run.
        segments: reference to all segments, in Ray's object store.
        failed: is told of every process that died or hung; raises where that is too many.
        late_weights: gives the weights of now to a worker that came after a broadcast of them.
        learners: where workers and learners are the same processes, these; one that dies is not started anew here.
    """

    def __init__(
        self,
        config: Config,
        segments: Any,
        failed: Callable[[str], None],
        late_weights: Callable[[], Any],
        learners: Sequence[Process] = (),
    ) -> None:
        self._late_weights = late_weights
        self.config, self._segments, self._failed, self._learners = config, segments, failed, list(learners)
        self._units: list[Unit] = []
        self._queue: deque[int] = deque()
        self._results: dict[int, Played] = {}
        self._places: dict[tuple[int, ...], int] = {}
        self._on_unit: Callable[[Unit | None], None] | None = None
        self._weights: tuple[int, Any] | None = None
        self._begun = time.monotonic()
        self._error: ClusterError | None = None
        self._figures: dict[str, float] = {}
        self._clear()
        self._workers = [self._start(index) for index in range(config.cluster.workers)]

    def _start(self, index: int) -> _Worker:
        if self._learners:
            process = self._learners[index]
        else:
            process = start_member(f"rollout worker {index}", self.config, "SPREAD")
        worker = _Worker(process, since=time.monotonic())
        started = bool(process.where)
        worker.ref = process.handle.start_rollout.remote(self._segments) if started else process.handle.place.remote()
        return worker

    def set_weights(self, version: int, weights: Any) -> None:
        """The weights that units which are begun from now on are played with: a reference, or None where the workers
        that are there have them already (a broadcast)."""
        self._weights = (version, weights)

    def forget_weights(self) -> None:
        """What the workers have is of updates that are lost: they need weights before they play again."""
        self._weights = None
        for worker in self._workers:
            worker.version = -1

    @property
    def processes(self) -> list[Process]:
        """Those that have started."""
        return [worker.process for worker in self._workers if worker.doing != "starting"]

    def mark_version(self, version: int, processes: Sequence[Process]) -> None:
        """These have this version now (a broadcast)."""
        for worker in self._workers:
            if any(worker.process is process for process in processes):
                worker.version = version

    def look_for_dead(self) -> None:
        """Start anew who died with nothing to do: a broadcast would wait for them.

        Raises:
            LearnersLostError, ClusterError: as when one dies at work.
        """
        asked = [(i, w, w.process.handle.place.remote()) for i, w in enumerate(self._workers) if w.ref is None]
        refs = [ref for _, _, ref in asked]
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=self.config.cluster.timeout)[0]) if refs else set()
        for index, worker, ref in asked:
            try:
                if ref not in ready:
                    kill(worker.process)
                    raise GoneError(f"{worker.process} gave no sign of life: killed")
                result_of(worker.process, ref)
            except GoneError as error:
                self._bury(index, str(error))

    def begin(self, units: Sequence[Unit]) -> None:
        """Units to play; the ones before are forgotten."""
        self._forget()
        self._units, self._queue = list(units), deque(range(len(units)))
        self._places = {unit.places: index for index, unit in enumerate(units)}
        self._results, self._error = {}, None
        self._begun = time.monotonic()
        self.pump(0.0)

    def _forget(self) -> None:
        """A worker that still plays what nobody waits for (the run went back to a checkpoint) must not hand it in."""
        if self._learners:
            return  # then they are all new
        for index, worker in enumerate(self._workers):
            if worker.units or worker.doing in ("playing", "scoring"):
                ray.kill(worker.process.handle)
                self._workers[index] = self._start(index)

    @property
    def waiting(self) -> bool:
        """Whether anything that was begun is not here yet."""
        return len(self._results) < len(self._units)

    def refs(self) -> list[Any]:
        """What the workers are busy with."""
        return [worker.ref for worker in self._workers if worker.ref is not None]

    def results(self, on_unit: Callable[[Unit | None], None] | None = None) -> list[Played]:
        """Wait for all units; `on_unit` is told of each when it is played, and every second that none was."""
        self._on_unit = on_unit
        while self.waiting:
            if self._error is not None:
                raise self._error
            self.pump(1.0)
            if on_unit is not None:
                on_unit(None)
        self._note_figures(time.monotonic() - self._begun)
        return [self._results[index] for index in range(len(self._units))]

    def pump_meanwhile(self) -> None:
        """`pump` for who waits for something else, the learners in an update: an error is kept for `results`."""
        try:
            if self._error is None:
                self.pump(0.0)
        except ClusterError as error:
            self._error = error

    def pump(self, seconds: float) -> None:
        """Give work to whoever has none, and take in what was done within so many seconds."""
        for worker in self._workers:
            if worker.ref is None:
                self._give_work(worker)
        refs = self.refs()
        ready = set(ray.wait(refs, timeout=seconds)[0]) if refs else set()
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.ref is None:
                continue
            try:
                if worker.ref in ready:
                    self._take(worker, result_of(worker.process, worker.ref))
                else:
                    self._check_time(worker, now)
            except GoneError as error:
                self._bury(index, str(error))

    def _give_work(self, worker: _Worker) -> None:
        if self._weights is None:
            return
        handle, (version, weights) = worker.process.handle, self._weights
        if self._queue and worker.version != version:
            if weights is None:
                weights = self._late_weights()
                self._weights = (version, weights)
            worker.taking = version
            self._call(worker, "taking weights", handle.load_weights.remote(version, weights))
        elif self._queue:
            self._queued.append(len(self._queue))
            worker.unit = self._queue.popleft()
            self._call(worker, "playing", handle.play.remote(self._units[worker.unit]))
        elif worker.units:
            self._call(worker, "scoring", handle.collect.remote())

    @staticmethod
    def _call(worker: _Worker, doing: str, ref: Any) -> None:
        worker.doing, worker.ref, worker.since = doing, ref, time.monotonic()

    def _take(self, worker: _Worker, result: Any) -> None:
        took = time.monotonic() - worker.since
        doing, worker.ref, worker.doing = worker.doing, None, ""
        if doing == "starting" and not worker.process.where:
            worker.process.where = result
            worker.doing, worker.ref = "starting", worker.process.handle.start_rollout.remote(self._segments)
            worker.since = time.monotonic()
        elif doing == "starting" and not self._learners:
            worker.version = result
        elif doing == "taking weights":
            worker.version = worker.taking  # there may be newer ones by now
            self._seconds["sync"] += took
            self._sync_bytes += result
        elif doing == "playing":
            assert worker.unit is not None
            worker.units.append(worker.unit)
            if self._on_unit is not None:
                self._on_unit(self._units[worker.unit])
            worker.unit = None
            self._seconds["busy"] += took
        elif doing == "scoring":
            self._seconds["busy"] += took
            for played in result:
                unit = self._places[played.places]
                if unit in self._results:
                    raise RuntimeError(f"unit {unit} was handed in twice")
                self._results[unit] = played
            worker.units = []

    def _check_time(self, worker: _Worker, now: float) -> None:
        cluster = self.config.cluster
        limit = cluster.start_timeout if worker.doing == "starting" else cluster.timeout
        if now - worker.since <= limit:
            return
        others = any(w is not worker and w.doing != "starting" for w in self._workers)
        if worker.doing == "starting" and not worker.process.where and others:
            return  # there is no room for it now (a node left): the others do its work until there is
        kill(worker.process)
        doing = f"playing {len(self._units[worker.unit].places)} episodes" if worker.unit is not None else worker.doing
        raise GoneError(f"{worker.process} did not answer within {limit:g} s while {doing}: killed")

    def _bury(self, index: int, why: str) -> None:
        """Start a worker in a dead one's place; what it had not handed in is played again."""
        worker = self._workers[index]
        if self._learners:
            raise LearnersLostError(why)
        lost = [*worker.units, *([worker.unit] if worker.unit is not None else [])]
        self._failed(f"{why}; restarted, {len(lost)} units are rolled out again")
        self._replayed += sum(len(self._units[unit].places) for unit in lost)
        self._queue.extendleft(reversed(lost))
        self._workers[index] = self._start(index)

    def _note_figures(self, wall: float) -> None:
        count = max(1, len(self._workers))
        parts: dict[str, float] = {}
        for played in self._results.values():
            for name, value in played.seconds.items():
                parts[f"time/worker_{name}"] = parts.get(f"time/worker_{name}", 0.0) + value / count
        self._figures = {
            **parts,
            "time/sync": self._seconds["sync"] / count,
            "time/utilisation_rollout": min(1.0, self._seconds["busy"] / count / max(1e-9, wall)),
            "cluster/sync_megabytes": self._sync_bytes / 2**20,
            "cluster/queue_mean": sum(self._queued) / max(1, len(self._queued)),
            "cluster/queue_max": float(max(self._queued, default=0)),
            "cluster/workers": float(len(self.processes)),
            "cluster/episodes_replayed": float(self._replayed),
        }
        self._clear()

    def _clear(self) -> None:
        self._seconds = {"busy": 0.0, "sync": 0.0}
        self._queued: list[int] = []
        self._replayed = self._sync_bytes = 0

    def figures(self) -> dict[str, float]:
        """Of the units that were last waited for: seconds by stage (a worker's mean), queue, use of the workers."""
        return dict(self._figures)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            if not self._learners:
                ray.kill(worker.process.handle)
