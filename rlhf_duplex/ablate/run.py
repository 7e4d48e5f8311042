"""`rlhf-duplex ablate`: all trials of a plan, one after another, and the table of what came of them.

Started again, it goes on: finished trials are never run again, one that was interrupted goes on from its checkpoint.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from envs.errors import InputError
from rlhf_duplex.ablate.plan import Plan, Trial, as_arguments
from rlhf_duplex.ablate.table import plan_tables, write_table
from rlhf_duplex.ablate.trial import (
    Job,
    Record,
    Stopped,
    check_same,
    is_finished,
    job_of,
    read_record,
    run_job,
    write_record,
    write_text,
)
from rlhf_duplex.config import Config, to_yaml

DECIDE_BEFORE = ("checkpoint", "dtype", "device", "segments", "sampling", "detector", "lora", "evaluation")


def ablate(plan: Plan, console: Console | None = None, retry_failed: bool = False) -> Path:
    """Run what is not finished; gives the ablation's folder.

    Args:
        plan: what to run.
        console: for progress.
        retry_failed: start trials again that have failed as often as they may.

    Raises:
        InputError: the folder holds another ablation, is in use, or cannot be written.
    """
    from rlhf_duplex.trainer import make_console, stop_requests

    console = console or make_console()
    for trial in plan.trials:
        check_same(trial.name, trial.config)
    with _lock(plan.run_dir):
        if retry_failed:
            _forget_failures(plan)
        for skipped in plan.skipped:
            console.print(f"left out: {skipped.name}: {skipped.why}", soft_wrap=True, markup=False)
        with stop_requests() as received:
            stopped = _run_all(plan, console, lambda: bool(received))
        return _finish(plan, console, stopped)


def show_plan(plan: Plan, console: Console) -> None:
    """List the trials, what became of those that have run, and what is left out."""
    for trial in plan.trials:
        state = "done" if _finished(trial) else read_record(plan.run_dir, trial.name).status
        overrides = " ".join(as_arguments(trial.condition.overrides)) or "(the base)"
        console.print(f"{trial.name}: {state}: {overrides}", soft_wrap=True, markup=False)
    for skipped in plan.skipped:
        console.print(f"left out: {skipped.name}: {skipped.why}", soft_wrap=True, markup=False)
    console.print(f"{len(plan.trials)} trials in {plan.run_dir}", markup=False)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """The ablation's folder, for one command at a time; the system lets go of it when the process ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another ablate is running in {root}: wait for it, or choose run_dir=...") from None
            yield
    except OSError as error:
        raise InputError(f"{root} cannot be written ({error}): choose another folder with run_dir=...") from error


def _forget_failures(plan: Plan) -> None:
    for trial in plan.trials:
        if read_record(plan.run_dir, trial.name).status == "failed":
            write_record(plan.run_dir, trial.name, Record())


def _run_all(plan: Plan, console: Console, stopping: Callable[[], bool]) -> str:
    """Trials one after another; gives why it ended before they all had, or nothing."""
    from rlhf_duplex.trainer import progress

    root, budget = plan.run_dir, plan.config.budget
    waiting = [trial for trial in plan.trials if _is_open(plan, trial)]
    seconds = sum(read_record(root, trial.name).seconds for trial in plan.trials)
    run = len(plan.trials) - len(waiting)
    console.print(f"{len(plan.trials)} trials, {run} of them done before; {root}", soft_wrap=True)
    total = sum(max(1, trial.config.trainer.updates) for trial in waiting)
    with progress(console, "ablation", total) as advance:
        for trial in waiting:
            if (budget.trials and run >= budget.trials) or (budget.hours and seconds >= 3600 * budget.hours):
                return f"the budget of {_shown(budget.trials, budget.hours)} is spent"
            before = read_record(root, trial.name).seconds
            steps = _Steps(trial.config.trainer.updates, advance)
            try:
                record = run_job(_job(plan, trial, console, stopping), stopping, steps)
            except Stopped:
                return "stopped"
            steps(trial.config.trainer.updates)
            run += 1
            seconds += record.seconds - before
            _say(console, trial, record, run, len(plan.trials))
            write_tables(plan)
    return ""


class _Steps:
    """Advances a progress bar to the number of updates that are done."""

    def __init__(self, updates: int, advance: Callable[[int], None]) -> None:
        self.updates, self.advance, self.done = updates, advance, 0

    def __call__(self, done: int) -> None:
        done = min(done, self.updates)
        if done > self.done:
            self.advance(done - self.done)
            self.done = done


def _is_open(plan: Plan, trial: Trial) -> bool:
    record = read_record(plan.run_dir, trial.name)
    spent = record.status == "failed" and (record.attempts > plan.config.retries or record.kind == "InputError")
    return not (_finished(trial) or spent or record.status == "stopped early")


def _finished(trial: Trial) -> bool:
    return (Path(trial.config.run_dir) / "evaluation" / "after.json").is_file()


def _job(plan: Plan, trial: Trial, console: Console, stopping: Callable[[], bool]) -> Job:
    before = _before(plan, trial.config, console, stopping)
    limits = plan.config
    return job_of(
        plan.run_dir.resolve(),
        trial.name,
        trial.config,
        before=before,
        retries=limits.retries,
        memory_gb=limits.memory_gb,
    )


def _before(plan: Plan, config: Config, console: Console, stopping: Callable[[], bool]) -> Path | None:
    """The result of the policy that a trial starts from, measured once for all trials that start from the same.

    None where it cannot be measured: the trial then fails by itself, and says why.
    """
    if config.evaluation.before is not None:
        return Path(config.evaluation.before).resolve()
    job = job_of(plan.run_dir.resolve(), before_key(config), config, "evaluate", memory_gb=plan.config.memory_gb)
    if read_record(job.root, job.name).status == "failed":
        return None
    if not is_finished(job):
        console.print("evaluating the policy that the trials start from")
        if run_job(job, stopping).status != "done":
            return None
    return job.result


def before_key(config: Config) -> str:
    """A name for all that decides the evaluation before training: weights of rewards and the seed do not."""
    whole = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(whole, dict)
    rewards = {a: {k: v for k, v in o.items() if k != "weight"} for a, o in whole["rewards"].items()}
    parts = {key: whole[key] for key in DECIDE_BEFORE} | {"lead_in": whole["context"]["lead_in"], "rewards": rewards}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _say(console: Console, trial: Trial, record: Record, done: int, total: int) -> None:
    what = f"{trial.condition.name}, seed {trial.seed}: {record.status}"
    if record.status == "failed":
        what += f" after {record.attempts} attempt{'s' * (record.attempts != 1)} ({record.kind}: {record.why})"
    console.print(f"[{done}/{total}] {what}, {record.seconds / 60:.1f} min", soft_wrap=True, markup=False)


def _shown(trials: int, hours: float) -> str:
    return " or ".join([f"{trials} trials"] * bool(trials) + [f"{hours:g} hours"] * bool(hours))


def write_tables(plan: Plan) -> list[Path]:
    """`table.csv`, `table.parquet`, `trials.csv`, and the plan itself for a page that is made later."""
    metrics, states = plan_tables(plan)
    paths = write_table(metrics, plan.run_dir)
    temporary = plan.run_dir / f".trials.{os.getpid()}"
    states.to_csv(temporary, index=False)
    os.replace(temporary, plan.run_dir / "trials.csv")
    described = {
        "base": plan.config.base,
        "baseline": plan.baseline.name,
        "metrics": plan.config.metrics,
        "conditions": [asdict(condition) for condition in plan.conditions],
        "skipped": [asdict(skipped) for skipped in plan.skipped],
        "trials": [{"name": t.name, "condition": t.condition.name, "seed": t.seed} for t in plan.trials],
    }
    write_text(plan.run_dir / "ablation.json", json.dumps(described, indent=1) + "\n")
    return [*paths, plan.run_dir / "trials.csv"]


def _finish(plan: Plan, console: Console, stopped: str) -> Path:
    paths = write_tables(plan)
    failed = [t for t in plan.trials if not _finished(t) and read_record(plan.run_dir, t.name).status == "failed"]
    if failed:
        names = ", ".join(trial.name for trial in failed)
        console.print(f"{len(failed)} failed ({names}): --retry-failed starts them again", soft_wrap=True, markup=False)
    if stopped:
        console.print(f"{stopped}: the same command goes on", markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}", soft_wrap=True, markup=False)
    return plan.run_dir
