"""The commands `train` and `evaluate`: everything is checked before the model is loaded, then the trainer runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.errors import InputError
from rlhf_duplex.axis_sources import forgetting_failed
from rlhf_duplex.checkpoint import last_checkpoint, updates_done
from rlhf_duplex.config import Config
from rlhf_duplex.config_files import check_resumed
from rlhf_duplex.evaluation.metrics import format_table, read_results
from rlhf_duplex.evaluation.suite import put_aside, take_before
from rlhf_duplex.held_out import overlap_line
from rlhf_duplex.inputs import Inputs, check_before, load_inputs, manifest_path
from rlhf_duplex.report.build import build_report
from rlhf_duplex.run_folder import StoppedError, claimed, make_console, prepare_run_dir, stop_requests
from rlhf_duplex.trainer import Trainer


@contextmanager
def running(config: Config, inputs: Inputs, run_dir: Path, console: Console) -> Iterator[Trainer]:
    """A trainer that hears Ctrl-C and SIGTERM while this lasts, and whose processes end with it."""
    trainer = Trainer(config, inputs, run_dir, console)
    try:
        with stop_requests() as trainer.stopped:
            yield trainer
    finally:
        trainer.cluster.close()


def _checked(command: Callable[[Config, Inputs, Console], Path], config: Config, console: Console | None) -> Path:
    """A command on inputs that are checked, in a run folder that nobody else writes to."""
    console = console or make_console()
    with console.status("checking recordings and configuration"):
        inputs = load_inputs(config)
    for note in inputs.notes:
        console.print(note, soft_wrap=True, markup=False)
    with claimed(config.run_dir):
        return command(config, inputs, console)


def train(config: Config, console: Console | None = None) -> Path:
    """A whole run: checks, evaluation before, updates, evaluation after, report. Gives the run folder.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known.
        NonFiniteError: a loss or gradient that is not finite; nothing of that update was saved.
        ClusterError: too many processes died or hung.
    """
    return _checked(_train, config, console)


def _train(config: Config, inputs: Inputs, console: Console) -> Path:
    files = {"segments": manifest_path(config.segments, "train")}
    if config.evaluation.segments is not None:
        files["evaluation.segments"] = manifest_path(config.evaluation.segments, "heldout")

    def check(config: Config, saved: Path) -> None:
        check_resumed(config, saved)
        done, wanted = updates_done(saved.parent), config.trainer.updates
        if done > wanted:
            raise InputError(
                f"resume: {done} updates are done, and trainer.updates is {wanted}: it may grow, not shrink"
            )
        measured = saved.parent / "evaluation" / "before.json"
        if measured.is_file():
            check_before("resume", measured, config, inputs.held_out)

    run_dir = prepare_run_dir(config, check, files)
    if inputs.held_out_trained and config.evaluation.segments is not None:
        console.print(overlap_line(inputs.held_out_trained, len(inputs.held_out)), soft_wrap=True)
    with forgetting_failed(run_dir), running(config, inputs, run_dir, console) as trainer:
        try:
            before, after = _evaluated(trainer)
        except StoppedError:
            console.print(f"stopped after update {trainer.update} of {run_dir}: go on with resume=true")
            return run_dir
    report = build_report(run_dir)
    if after is None:
        console.print(
            f"stopped after update {trainer.update}: checkpoint in {run_dir / 'checkpoints'}, report in {report}; "
            "go on with resume=true"
        )
        return run_dir
    console.print(format_table(before, after))
    if inputs.held_out_is_training:
        console.print("measured on the training segments: give evaluation.segments for held-out ones")
    console.print(f"wrote {report} and {last_checkpoint(run_dir) or run_dir}", soft_wrap=True)
    return run_dir


def _evaluated(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The run between its two evaluations, and what they gave; None after a signal during the updates."""
    run_dir = trainer.run_dir
    path = run_dir / "evaluation" / "before.json"
    if trainer.config.resume and path.is_file():
        before = read_results(path)
    elif trainer.update == 0:
        trainer.begin()
        known = trainer.config.evaluation.before is not None
        before = take_before(trainer.config, run_dir) if known else trainer.evaluate("before")
    else:
        raise InputError(f"{path} is missing and update {trainer.update} is past it: start without resume=true")
    if trainer.update < trainer.config.trainer.updates:
        put_aside(run_dir, "after")
    return before, None if trainer.run() else trainer.evaluate("after")


def evaluate(config: Config, console: Console | None = None) -> Path:
    """The held-out suite with a checkpoint as it is; writes `evaluation/before.json` in the run folder.

    With `resume` it is the run folder's last checkpoint, and the file is named after its update.

    Raises:
        InputError: as in `train`.
    """
    return _checked(_evaluate, config, console)


def _evaluate(config: Config, inputs: Inputs, console: Console) -> Path:
    run_dir = prepare_run_dir(config, records=not config.resume)
    with running(config, inputs, run_dir, console) as trainer:
        name = f"step_{trainer.update:06d}" if config.resume else "before"
        try:
            results = trainer.evaluate(name)
        except StoppedError:
            raise KeyboardInterrupt from None
    console.print(format_table(results, None))
    path = run_dir / "evaluation" / f"{name}.json"
    console.print(f"wrote {path}", soft_wrap=True)
    return path
