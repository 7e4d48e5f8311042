"""Processes on Ray: started, waited for with a limit, and buried; every error names the role."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayActorError, RayError, RayTaskError

from envs.errors import InputError
from rlhf_duplex.cluster.member import Member
from rlhf_duplex.config import Config
from rlhf_duplex.learner import NonFiniteError

OWN_ERRORS = (InputError, NonFiniteError)
FULL_ERRORS = (ObjectStoreFullError, OutOfDiskError)


class ClusterError(RuntimeError):
    """The run cannot go on: what failed, where, and what was tried. Its checkpoints are whole."""


class GoneError(RuntimeError):
    """A process died, or did not answer in time and was killed."""


@dataclass
class Process:
    """A member, as the run's own process knows it.

    Attributes:
        role: `rollout worker 1`, `learner 0`.
        handle: Ray's.
        where: what `Member.place` said, once it has.
    """

    role: str
    handle: Any
    where: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f" (process {self.where['pid']} on {self.where['ip']})" if self.where else ""
        return f"{self.role}{place}"


def connect(config: Config, processes: int) -> bool:
    """Join the cluster that the configuration names, or start one here; gives whether it was started here.

    Raises:
        InputError: there is none at the address, or it is too small.
    """
    cluster = config.cluster
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would have its processes give way to everybody's
    started = False
    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if cluster.address:
                ray.init(address=cluster.address, **quiet)
            else:
                store = {"object_store_memory": int(cluster.object_store_gb * 2**30)} if cluster.object_store_gb else {}
                # More processes than cores is slow, not wrong: Ray is told that there is room.
                cpus = max(os.cpu_count() or 1, int(-(-processes * cluster.cpus // 1)))
                # Local, or Ray would join whatever else runs on this machine.
                ray.init("local", num_cpus=cpus, include_dashboard=cluster.dashboard, **store, **quiet)
                started = True
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"cluster.address '{cluster.address}': Ray cannot be had ({_first(error)})") from error
    found = ray.cluster_resources()
    needed = {"CPU": processes * cluster.cpus, "GPU": processes * gpus_of(config)}
    short = [name for name, count in needed.items() if count > found.get(name, 0)]
    if short:
        text = ", ".join(f"{needed[n]:g} {n}s where Ray has {found.get(n, 0):g}" for n in short)
        if started:
            ray.shutdown()
        raise InputError(f"the run needs {text}: lower cluster.workers or cluster.learners, or give it more machines")
    return started


def gpus_of(config: Config) -> float:
    """GPUs of one process."""
    return config.cluster.gpus if config.device.startswith("cuda") else 0.0


def start_member(role: str, config: Config, strategy: Any = "DEFAULT") -> Process:
    """Ask Ray for a process; it may take until there is room for it."""
    options = {
        "num_cpus": config.cluster.cpus,
        "num_gpus": gpus_of(config),
        "max_restarts": 0,
        "scheduling_strategy": strategy,
        "name": f"{role} {time.time_ns()}",
    }
    return Process(role, ray.remote(Member).options(**options).remote(config, str(Path.cwd())))


def result_of(process: Process, ref: Any) -> Any:
    """What a call that has ended gave.

    Raises:
        GoneError: the process died.
        ClusterError: it raised an error, whose traceback is in the message.
        InputError, NonFiniteError: as raised there.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, OWN_ERRORS):
            raise error.cause from error
        if isinstance(error.cause, FULL_ERRORS):
            raise ClusterError(full_message(process)) from error
        if isinstance(error.cause, RayError):  # of what the call was given: an object that went with its node
            raise GoneError(f"{process}: {_first(error.cause)}") from error
        raise ClusterError(f"{process} failed:\n{error}") from error
    except RayActorError as error:
        raise GoneError(f"{process} died: {_first(error)}") from error
    except FULL_ERRORS as error:
        raise ClusterError(full_message(process)) from error
    except RayError as error:
        raise GoneError(f"{process}: {_first(error)}") from error


def full_message(process: Process) -> str:
    """What to do where the object store is full."""
    return (
        f"{process}: Ray's object store is full, and so is the disk that it spills to: give it more with "
        "cluster.object_store_gb, or lower trainer.groups"
    )


def wait_all(processes: Sequence[Process], refs: Sequence[Any], seconds: float, doing: str) -> list[Any]:
    """What all calls gave, one a process.

    Raises:
        GoneError: one died, or did not answer in time and was killed.
        ClusterError, InputError, NonFiniteError: see `result_of`; the first that fails is not waited past, since the
            others of a group may wait for it.
    """
    waiting, found = dict(zip(refs, processes, strict=True)), {}
    deadline = time.monotonic() + seconds
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = next(iter(waiting.values()))
            for process in waiting.values():
                kill(process)
            raise GoneError(f"{late} did not answer within {seconds:g} s while {doing}: killed")
        found[ready[0]] = result_of(waiting.pop(ready[0]), ready[0])
    return [found[ref] for ref in refs]


def kill(process: Process) -> None:
    """End a process whatever it does; one that is stopped or stuck in a system call does not hear Ray."""
    ray.kill(process.handle)
    if not process.where:
        return
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(process.where["node"], soft=False)
    call = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=node, max_retries=0)
    try:
        ray.get(call.remote(process.where["pid"]), timeout=30)
    except (RayError, GetTimeoutError):
        return  # its node is gone, and it with it


def _kill(pid: int) -> None:
    import signal
    from contextlib import suppress

    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:8]) if lines else type(error).__name__
