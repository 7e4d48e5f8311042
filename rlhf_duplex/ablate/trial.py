"""One trial in a process of its own: started, watched, started again where it failed, and recorded.

What a trial leaves in an ablation's folder: `trials/NAME/` (a run folder), `logs/NAME.log`, and `records/NAME.json`,
which is written when an attempt has ended. A trial is finished when its folder holds `evaluation/after.json`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.axis_sources import axis_sources, changed_axis
from rlhf_duplex.config_files import DECIDES_NUMBERS, check_resumed, to_yaml

POLL_SECONDS = 0.5
STOP_SECONDS = 300.0  # a trial that is asked to stop ends the update that is under way and writes a checkpoint
_FIXED = (*DECIDES_NUMBERS, "evaluation")
_FREE = ("evaluation.before", "evaluation.episodes")


@dataclass(frozen=True)
class Job:
    """All that a process needs to run a trial, without the plan (it may be on another machine).

    Attributes:
        name: of the trial.
        root: the ablation's folder.
        command: `train`, or `evaluate` for the policy that all trials start from.
        config: its configuration in YAML.
        before: result to take as `evaluation/before.json`, or None to evaluate.
        retries: how often to start it again where it fails.
        memory_gb: limit; 0: none.
    """

    name: str
    root: Path
    command: str
    config: str
    before: Path | None = None
    retries: int = 0
    memory_gb: float = 0.0
    directory: str = "."  # where relative paths of the configuration begin

    @property
    def folder(self) -> Path:
        return self.root / ("trials" if self.command == "train" else "before") / self.name

    @property
    def result(self) -> Path:
        """What is there when it is finished."""
        return self.folder / "evaluation" / ("after.json" if self.command == "train" else "before.json")


@dataclass(frozen=True)
class Record:
    """What became of a trial.

    Attributes:
        status: `done`, `failed`, `stopped early` (by a scheduler) or `open`.
        attempts: that have ended by themselves.
        seconds: of all attempts, those that were stopped too.
        kind, why: the exception's name and its message, of the last failure.
        traceback: its last lines.
    """

    status: str = "open"
    attempts: int = 0
    seconds: float = 0.0
    kind: str = ""
    why: str = ""
    traceback: str = ""


class Stopped(Exception):
    """A trial was asked to stop; it can go on later."""


def read_record(root: Path, name: str) -> Record:
    """The record of a trial; one that has none is `open`.

    Raises:
        InputError: it is damaged.
    """
    path = root / "records" / f"{name}.json"
    if not path.is_file():
        return Record()
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove it, and its trial goes on from its checkpoint"
        ) from error


def write_record(root: Path, name: str, record: Record) -> None:
    """Write it, whole or not at all."""
    write_text(root / "records" / f"{name}.json", json.dumps(asdict(record), indent=1) + "\n")


def check_same(name: str, config: Any) -> None:
    """A trial that was begun must be the trial that is asked for.

    Raises:
        InputError: it was begun with another configuration, or with other code of an axis.
    """
    if changed := changed_axis(Path(config.run_dir), axis_sources(config.rewards)):
        raise InputError(
            f"trial {name} was run with other code of the reward axis '{changed}': put the old one back, choose "
            f"another folder with run_dir=..., or remove {config.run_dir}"
        )
    try:
        check_resumed(config, Path(config.run_dir) / "config.yaml", _FIXED, _FREE)
    except InputError as error:
        reason = str(error).removeprefix("resume: ").partition(": a resumed")[0]
        raise InputError(
            f"trial {name} was run with another configuration ({reason}): choose another folder with run_dir=..., or "
            f"remove {config.run_dir}"
        ) from error


def may_start(record: Record, retries: int) -> bool:
    """Whether a trial without a result may be started, for the first time or again."""
    spent = record.status == "failed" and (record.attempts > retries or record.kind == "InputError")
    return not spent and record.status != "stopped early"


def is_finished(job: Job) -> bool:
    """Whether its result is there."""
    return job.result.is_file()


def run_job(job: Job, stopping: Callable[[], bool], watch: Callable[[int], None] | None = None) -> Record:
    """Run a trial to its end, from its last checkpoint where there is one; started again while it fails and may.

    Args:
        job: which.
        stopping: whether to stop; asked twice a second.
        watch: called with the number of updates that are done.

    Returns:
        its record, which is written, too.

    Raises:
        Stopped: `stopping` said so; the trial has a checkpoint where it had the time.
    """
    record = read_record(job.root, job.name)
    while may_start(record, job.retries):
        started = time.monotonic()
        try:
            failure = _attempt(job, stopping, watch)
        except Stopped:
            write_record(job.root, job.name, replace(record, seconds=record.seconds + time.monotonic() - started))
            raise
        seconds = record.seconds + time.monotonic() - started
        if failure is None:
            record = replace(Record("done", record.attempts + 1), seconds=seconds)
        else:
            record = Record("failed", record.attempts + 1, seconds, **failure)
        write_record(job.root, job.name, record)
        if failure is None:
            break
    return record


def _attempt(job: Job, stopping: Callable[[], bool], watch: Callable[[int], None] | None) -> dict[str, str] | None:
    """One process; gives what went wrong, or None."""
    if is_finished(job):
        return None
    config_path, outcome = job.root / "configs" / f"{job.name}.yaml", job.root / "records" / f".{job.name}.outcome"
    write_text(config_path, job.config)
    outcome.parent.mkdir(parents=True, exist_ok=True)
    outcome.unlink(missing_ok=True)
    resumes = job.command == "train" and any((job.folder / "checkpoints").glob("step_*"))
    if not resumes:  # an attempt that ended before its first checkpoint left nothing to go on from
        shutil.rmtree(job.folder, ignore_errors=True)
    overrides = [f"run_dir={job.folder}"] + (["resume=true"] if resumes else [])
    if job.before is not None:
        overrides.append(f"evaluation.before={job.before}")
    log = job.root / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rlhf_duplex.ablate.worker", str(config_path), str(outcome)]
    order = {"command": job.command, "overrides": overrides, "memory_gb": job.memory_gb}
    with log.open("ab") as output, _process(command, output, job.directory) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        _wait(process, job, stopping, watch)
    if is_finished(job):
        return None
    if outcome.is_file():
        found = json.loads(outcome.read_text())
        outcome.unlink()
        return {"kind": found["kind"], "why": found["message"], "traceback": found["traceback"]}
    code = process.returncode
    if code == 0:
        raise Stopped  # by a signal from elsewhere; it has its checkpoint
    last = log.read_text(errors="replace").splitlines()[-5:]
    if code == -signal.SIGKILL:
        why = "killed from outside (SIGKILL): most likely it ran out of memory"
        return {"kind": "Killed", "why": why, "traceback": "\n".join(last)}
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return {"kind": "Crashed", "why": f"ended with {name}, see {log}", "traceback": "\n".join(last)}


@contextmanager
def _process(command: list[str], output: Any, directory: str) -> Any:
    """A process in a session of its own (a terminal's Ctrl-C goes to us alone) that never outlives the block."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=directory,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _wait(
    process: subprocess.Popen, job: Job, stopping: Callable[[], bool], watch: Callable[[int], None] | None
) -> None:
    metrics, seen = job.folder / "metrics.jsonl", -1
    deadline: float | None = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if watch is not None and done != seen:
            seen = done
            watch(done)
        if process.returncode is not None:
            if deadline is not None and not is_finished(job):
                raise Stopped
            return
        if deadline is None and stopping():
            process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            raise Stopped


def job_of(root: Path, name: str, config: Any, command: str = "train", **options: Any) -> Job:
    """The job of a configuration."""
    return Job(name, root, command, to_yaml(config), directory=os.getcwd(), **options)
