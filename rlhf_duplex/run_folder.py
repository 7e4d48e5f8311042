"""The run folder, and what a run shows and hears at the terminal: progress, and the wish to stop."""

import fcntl
import functools
import hashlib
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.axis_sources import AXES, check_axes
from rlhf_duplex.config_files import check_resumed, to_yaml
from rlhf_duplex.data.recordings import files_fingerprint, named_files
from rlhf_duplex.policy.bundle import find_bundle, weights_digest


def prepare_run_dir(
    config: Any,
    check: Callable[[Any, Path], None] = check_resumed,
    files: Mapping[str, Path] | None = None,
    records: bool = True,
) -> Path:
    """The run folder, made and writable, with the resolved configuration in it.

    A run that is there already and is not resumed is kept: its folder is renamed to `NAME.old-1` (or the next number).
    One to resume that is refused is left as it is.

    Args:
        config: of the run.
        check: holds the configuration of a run that is resumed against the saved one.
        files: as in `check_data`, which is left out without them.
        records: write the configuration; not where a run that is there is only measured.

    Raises:
        InputError: it cannot be written, or the run to resume had another configuration, other data or other axes.
    """
    run_dir = Path(config.run_dir)
    if run_dir.name in ("", ".."):  # `.`: it could not be renamed
        run_dir = run_dir.resolve()
    for name, path in {"checkpoint": find_bundle(config.checkpoint), **_read_by(config), **(files or {})}.items():
        inside = path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(run_dir.resolve())
        if inside and not config.resume:
            raise InputError(f"{name} {path} lies in the run folder {run_dir}: choose another with run_dir=...")
    try:
        known = ("metrics.jsonl", "evaluation", "checkpoints")
        if not config.resume and any((run_dir / name).exists() for name in known):
            keep_old(run_dir)
        make_writable(run_dir)
        if config.resume:
            check(config, run_dir / "config.yaml")
        if files is not None:
            axes = check_axes(run_dir, config.resume, config.rewards)
            check_data(run_dir, config.resume, config.checkpoint, files, axes)
        if records:
            write_text(run_dir / "config.yaml", to_yaml(config))
    except OSError as error:
        raise InputError(
            f"run folder {run_dir} cannot be written ({error}): choose another with run_dir=..."
        ) from error
    return run_dir


def make_writable(run_dir: Path) -> None:
    """Make a run folder, and see that something can be written in it.

    Raises:
        InputError: it cannot.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"run folder {run_dir} cannot be written ({error}): choose another with run_dir=..."
        ) from error


def _read_by(config: Any) -> dict[str, str | None]:
    """Files that a configuration names, by key."""
    keys = ("segments", "pairs", "evaluation.segments", "evaluation.before", "prompt.voice")
    return {key: functools.reduce(lambda part, name: getattr(part, name, None), key.split("."), config) for key in keys}


def keep_old(folder: Path) -> Path:
    """Rename a folder to `NAME.old-1` (or the next number), for another to take its place; gives the new path."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, old)
    return old


def check_data(
    run_dir: Path, resume: bool, checkpoint: str, files: Mapping[str, Path], axes: Mapping[str, str] | None = None
) -> None:
    """Note in `provenance.json` what is learned from, and versions; a resumed run must find its data unchanged.

    All of it is one write: a run that is killed here leaves the old note or the whole new one.

    Args:
        run_dir: the run folder, made.
        resume: whether the run goes on.
        checkpoint: that it begins from; of a run folder, the last one.
        files: manifests by the key of the configuration that names them.
        axes: the code of reward axes, which `check_axes` held against the note.

    Raises:
        InputError: one of them, or of the files that it names, has changed since the run began, or the note is damaged.
    """
    path = run_dir / "provenance.json"
    now = {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()}
    named = {key: named_files(file) for key, file in files.items() if file.suffix == ".jsonl"}
    audio = {f"{key}: files": files_fingerprint(paths, times=False) for key, paths in named.items() if paths}
    now |= audio
    now["checkpoint"] = weights_digest(checkpoint)
    try:
        before = json.loads(path.read_text())["sha256"] if resume and path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it to go on with what there is now") from error
    for key, digest in now.items():
        if before.get(key, digest) != digest:
            manifest = files.get(key.removesuffix(": files"), checkpoint)
            changed = f"a recording or shard that {manifest} names" if key in audio else manifest
            raise InputError(
                f"resume: {changed} is not what it was when this run began: put the old one back, or start without "
                f"resume=true (remove {path} to go on with what there is now)"
            )
    note = {"sha256": now, "versions": versions()} | ({AXES: dict(axes)} if axes else {})
    write_text(path, json.dumps(note, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of what decides a run's numbers: equal seeds give equal runs with these, on one machine."""
    packages = ("rlhf-duplex", "moshi", "torch", "numpy", "transformers", "silero-vad")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


@contextmanager
def claimed(run_dir: str | Path, option: str = "run_dir=...") -> Iterator[None]:
    """The run folder for one command at a time; the system lets go of it when the process ends.

    Args:
        run_dir: the folder.
        option: by which another would be chosen.

    Raises:
        InputError: another process has it.
    """
    folder = Path(run_dir).resolve()
    path = folder.with_name(f".{folder.name}.lock")  # beside the folder, which may be renamed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        if folder.is_dir() and os.access(folder, os.W_OK):  # a mount, say, beside which nothing can be written
            yield
            return
        raise InputError(f"run folder {run_dir} cannot be written ({error}): choose another with {option}") from error
    with file:
        if not _locked(file, path):
            raise InputError(f"another run is writing to {run_dir}: wait for it, or choose another with {option}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(file: IO[str], path: Path) -> bool:
    """Whether the lock is ours: nobody else's, and not removed by a run that ended while we opened it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: whoever starts two runs in one folder is not told
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class StoppedError(Exception):
    """A signal asked for an end, and what was under way is begun anew when the run goes on."""


stops: list[int] = []  # every signal by which a command of this process was asked to end


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM: the loop ends after the update that is under way, with a checkpoint."""
    received: list[int] = []
    old = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        stops.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            break
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def make_console() -> Console:
    """The terminal as it is; where there is none (a log file), wide enough for the table.

    Paths, names of axes and what a judge says are printed as they are: `[red]` in them is no markup.
    """
    return Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False)


@contextmanager
def progress(console: Console, label: str, total: float) -> Iterator:
    """A progress bar; gives a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
