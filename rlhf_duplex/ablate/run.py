"""`rlhf-duplex ablate`: all trials of a plan, one after another or on Ray, the table and the page of what came of them.

Started again, it goes on: finished trials are never run again, one that was interrupted goes on from its checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from envs.files import write_text
from rlhf_duplex.ablate.plan import (
    Condition,
    Plan,
    Trial,
    as_arguments,
    condition_values,
    describe,
    make_trial,
    trial_name,
)
from rlhf_duplex.ablate.ray_tune import AshaConfig
from rlhf_duplex.ablate.search import point_name
from rlhf_duplex.ablate.table import plan_tables, write_table
from rlhf_duplex.ablate.trial import (
    Job,
    Record,
    Stopped,
    check_same,
    is_finished,
    job_of,
    may_start,
    read_record,
    run_job,
    write_record,
)
from rlhf_duplex.axis_sources import axis_sources
from rlhf_duplex.config import Config
from rlhf_duplex.config_files import to_yaml
from rlhf_duplex.evaluation.metrics import read_results, reward_options

DECIDE_BEFORE = ("checkpoint", "dtype", "device", "segments", "sampling", "detector", "lora", "prompt", "evaluation")


def ablate(plan: Plan, console: Console | None = None, retry_failed: bool = False) -> Path:
    """Run what is not finished; gives the ablation's folder.

    Args:
        plan: what to run.
        console: for progress.
        retry_failed: start trials again that have failed as often as they may.

    Raises:
        InputError: the folder holds another ablation, is in use, or cannot be written.
    """
    from rlhf_duplex.run_folder import claimed, make_console, make_writable, stop_requests

    console = console or make_console()
    for trial in plan.trials:
        check_same(trial.name, trial.config)
    with claimed(plan.run_dir):
        make_writable(plan.run_dir)
        if retry_failed:
            _forget_failures(plan)
        for skipped in plan.skipped:
            console.print(f"left out: {skipped.name}: {skipped.why}", soft_wrap=True)
        told = False

        def stopping() -> bool:
            nonlocal told
            if received and not told:
                told = True
                console.print("stopping: what runs ends the update that is under way")
            return bool(received)

        with stop_requests() as received:
            stopped = _run_all(plan, console, stopping)
        return finish(plan, console, stopped)


def show_plan(plan: Plan, console: Console) -> None:
    """List the trials, what became of those that have run, and what is left out.

    Raises:
        InputError: one was run with another configuration.
    """
    for trial in plan.trials:
        check_same(trial.name, trial.config)
        state = "done" if _finished(trial) else read_record(plan.run_dir, trial.name).status
        overrides = " ".join(as_arguments(trial.condition.overrides)) or "(the base)"
        console.print(f"{trial.name}: {state}: {overrides}", soft_wrap=True)
    for skipped in plan.skipped:
        console.print(f"left out: {skipped.name}: {skipped.why}", soft_wrap=True)
    console.print(f"{len(plan.trials)} trials in {plan.run_dir}")


def _forget_failures(plan: Plan) -> None:
    for trial in plan.trials:
        record = read_record(plan.run_dir, trial.name)
        if record.status == "failed":
            write_record(plan.run_dir, trial.name, Record(seconds=record.seconds))


def _run_all(plan: Plan, console: Console, stopping: Callable[[], bool]) -> str:
    """All trials that are open; gives why it ended before they all had, or nothing."""
    from rlhf_duplex.run_folder import progress

    waiting = [trial for trial in plan.trials if _is_open(plan, trial)]
    log = _Log(plan, console, len(plan.trials) - len(waiting))
    console.print(f"{len(plan.trials)} trials, {log.ended} of them done before; {plan.run_dir}", soft_wrap=True)
    total = sum(max(1, trial.config.trainer.updates) for trial in waiting)
    with progress(console, "ablation", total) as advance:
        return (_with_ray if plan.config.workers else _one_by_one)(plan, waiting, log, advance, stopping)


class _Log:
    """What has ended, and whether the budget allows another trial."""

    def __init__(self, plan: Plan, console: Console, ended: int) -> None:
        self.plan, self.console, self.ended = plan, console, ended
        self.trials = {trial.name: trial for trial in plan.trials}

    def add(self, name: str, record: Record) -> None:
        """A trial has ended, or was interrupted: say so, and write the tables anew."""
        trial = self.trials[name]
        if self.interrupted(record):
            self.console.print(f"{trial.condition.name}, seed {trial.seed}: interrupted", soft_wrap=True)
            return
        self.ended += 1
        what = f"{trial.condition.name}, seed {trial.seed}: {record.status}"
        if record.status == "failed":
            times = f"{record.attempts} attempt{'s' * (record.attempts != 1)}"
            what += f" after {times} ({record.kind}: {record.why})"
        line = f"[{self.ended}/{len(self.trials)}] {what}, {record.seconds / 60:.1f} min"
        self.console.print(line, soft_wrap=True)
        write_tables(self.plan)

    def interrupted(self, record: Record) -> bool:
        """Whether a trial was stopped: it may have failed before, and goes on another time."""
        return record.status in ("open", "failed") and may_start(record, self.plan.config.retries)

    def spent(self) -> str:
        """Why no further trial may start, or nothing."""
        budget = self.plan.config.budget
        if budget.trials and self.ended >= budget.trials:
            return f"the budget of {budget.trials} trials is spent"
        names = [path.stem for path in (self.plan.run_dir / "records").glob("*.json")]
        seconds = sum(read_record(self.plan.run_dir, name).seconds for name in names) if budget.hours else 0.0
        return f"the budget of {budget.hours:g} hours is spent" if 0 < 3600 * budget.hours <= seconds else ""


def _one_by_one(
    plan: Plan, waiting: list[Trial], log: _Log, advance: Callable[[int], None], stopping: Callable[[], bool]
) -> str:
    for trial in waiting:
        if spent := log.spent():
            return spent
        steps = _Steps(trial.config.trainer.updates, advance)
        try:
            before = _before(plan, trial.config)
            if isinstance(before, Job):
                log.console.print("evaluating the policy that the trials start from")
                run_job(before, stopping)
            record = run_job(_job(plan, trial), stopping, steps)
        except Stopped:
            return "stopped"
        steps(trial.config.trainer.updates)
        log.add(trial.name, record)
    return ""


def _with_ray(
    plan: Plan, waiting: list[Trial], log: _Log, advance: Callable[[int], None], stopping: Callable[[], bool]
) -> str:
    """Several at once; where the budget of hours is spent, those that run end their update, to go on another time."""
    from rlhf_duplex.ablate.ray_tune import run_jobs

    config = plan.config
    if config.budget.trials:
        waiting = waiting[: max(0, config.budget.trials - log.ended)]
    updates = max((trial.config.trainer.updates for trial in waiting), default=0)

    def stop() -> bool:
        return stopping() or bool(config.budget.hours and log.spent())

    def ended(name: str, record: Record) -> None:
        if not log.interrupted(record):
            advance(log.trials[name].config.trainer.updates)
        log.add(name, record)

    befores = {job.name: job for trial in waiting if isinstance(job := _before(plan, trial.config), Job)}
    if befores:
        log.console.print("evaluating the policies that the trials start from")
        run_jobs([*befores.values()], 0, config.workers, config.ray, AshaConfig(), stopping, lambda *_: None)
    jobs = [_job(plan, trial) for trial in waiting]
    if jobs and not stop():
        run_jobs(jobs, updates, config.workers, config.ray, config.asha, stop, ended)
    if config.search is not None and config.search.sampler == "optuna" and not stop():
        _search(plan, log, stop)
    return "stopped" if stopping() else log.spent()


def _search(plan: Plan, log: _Log, stop: Callable[[], bool]) -> None:
    """Optuna's points; the plan gets them when it is loaded the next time."""
    from rlhf_duplex.ablate.ray_tune import run_search

    search = plan.config.search
    assert search is not None
    axis, _, metric = search.metric.partition(".")
    points = [condition for condition in plan.conditions if condition.overrides.keys() == search.space.keys()]
    known: list[tuple[dict, float | None]] = []
    for point in points:
        paths = [Path(t.config.run_dir) / "evaluation" / "after.json" for t in plan.trials if t.condition == point]
        results = [read_results(path) for path in paths if path.is_file()]
        means = [r["axes"][axis][metric]["mean"] for r in results if metric in r["axes"].get(axis, {})]
        known.append((point.overrides, sum(means) / len(means) if means else None))

    def jobs(overrides: Mapping[str, Any]) -> list[Job]:
        condition = Condition(describe(overrides), dict(overrides))
        return [_job(plan, make_trial(plan.config, plan.shared, condition, seed)) for seed in plan.seeds]

    def ended(overrides: Mapping[str, Any], lost: str) -> None:
        log.ended += len(plan.seeds)
        # What a stop kept from being run is no failure: it is run when the command is started again.
        why = _record_lost(plan, Condition(describe(overrides), dict(overrides)), lost) if lost or not stop() else ""
        log.console.print(f"point {point_name(overrides)} {why or 'has ended'}", soft_wrap=True)

    config = plan.config
    if config.budget.trials:
        room = len(known) + (config.budget.trials - log.ended) // len(plan.seeds)
        if room < search.points:
            log.console.print(f"budget.trials leaves room for {max(0, room)} of {search.points} points")
            search = replace(search, points=room)
    run_search(search, plan.run_dir.resolve(), known, jobs, config.workers, config.ray, stop, ended)


def _record_lost(plan: Plan, point: Condition, lost: str) -> str:
    """Make failures of a point's trials that have neither a result nor a record: Ray lost them. Gives why, if so."""
    text = ""
    kept = plan.run_dir / "points" / f"{point_name(point.overrides)}.json"
    if not kept.is_file():  # a plan that is loaded again is to have it, and fail with it
        number = len(list(kept.parent.glob("*.json")))
        write_text(kept, json.dumps({"number": number, "overrides": point.overrides}) + "\n")
    for seed in plan.seeds:
        name = trial_name(point, seed)
        finished = (plan.run_dir / "trials" / name / "evaluation" / "after.json").is_file()
        if not finished and read_record(plan.run_dir, name) == Record():
            kind, _, why = (lost or "Lost: ended without a result").partition(": ")
            write_record(plan.run_dir, name, Record("failed", 1, 0.0, kind, why))
            text = f"was not run ({kind}: {why})"
    return text


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
    return not _finished(trial) and may_start(read_record(plan.run_dir, trial.name), plan.config.retries)


def _finished(trial: Trial) -> bool:
    return (Path(trial.config.run_dir) / "evaluation" / "after.json").is_file()


def _job(plan: Plan, trial: Trial) -> Job:
    before = _before(plan, trial.config)
    return job_of(
        plan.run_dir.resolve(),
        trial.name,
        trial.config,
        before=before if isinstance(before, Path) else None,
        retries=plan.config.retries,
        memory_gb=plan.config.memory_gb,
    )


def _before(plan: Plan, config: Config) -> Job | Path | None:
    """The result of the policy that a trial starts from, measured once for all trials that start from the same.

    The job that measures it, where that is still to be done. None where it has failed: the trial then fails by itself,
    and says why.
    """
    if config.evaluation.before is not None:
        return Path(config.evaluation.before).resolve()
    job = job_of(plan.run_dir.resolve(), before_key(config), config, "evaluate", memory_gb=plan.config.memory_gb)
    if is_finished(job):
        return job.result
    return None if read_record(job.root, job.name).status == "failed" else job


def before_key(config: Config) -> str:
    """A name for all that decides the evaluation before training: an axis' code does, weights and the seed do not."""
    from rlhf_duplex.policy.bundle import weights_digest

    whole = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(whole, dict)
    rewards = reward_options(whole["rewards"])
    parts = {key: whole[key] for key in DECIDE_BEFORE} | {"lead_in": whole["context"]["lead_in"], "rewards": rewards}
    parts["weights"] = weights_digest(config.checkpoint)
    if axes := axis_sources(whole["rewards"]):
        parts["axes"] = axes
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write_tables(plan: Plan) -> list[Path]:
    """`table.csv`, `table.parquet`, `trials.csv`, and the plan itself for a page that is made later."""
    metrics, states = plan_tables(plan)
    paths = write_table(metrics, plan.run_dir)
    write_text(plan.run_dir / "trials.csv", states.to_csv(index=False))
    described = {
        "base": plan.config.base,
        "baseline": plan.baseline.name,
        "metrics": plan.config.metrics,
        "conditions": [{"name": name, "values": values} for name, values in condition_values(plan).items()],
        "skipped": [asdict(skipped) for skipped in plan.skipped],
        "trials": [{"name": t.name, "condition": t.condition.name, "seed": t.seed} for t in plan.trials],
    }
    write_text(plan.run_dir / "ablation.json", json.dumps(described, indent=1) + "\n")
    return [*paths, plan.run_dir / "trials.csv"]


def failed_trials(plan: Plan) -> list[str]:
    """Names of the trials that failed and have no result."""
    open_trials = (trial.name for trial in plan.trials if not _finished(trial))
    return [name for name in open_trials if read_record(plan.run_dir, name).status == "failed"]


def finish(plan: Plan, console: Console, stopped: str = "") -> Path:
    """Write the tables and the page, and say what is where."""
    from rlhf_duplex.report.comparison import build_comparison
    from rlhf_duplex.report.runs import read_ablation

    paths = write_tables(plan)
    if any(_finished(trial) for trial in plan.trials):
        paths.append(build_comparison(read_ablation(plan.run_dir), plan.run_dir / "report.html"))
    if failed := failed_trials(plan):
        names = ", ".join(failed)
        console.print(f"{len(failed)} failed ({names}): --retry-failed starts them again", soft_wrap=True)
    if stopped:
        console.print(f"{stopped}: the same command goes on")
    console.print(f"wrote {', '.join(str(path) for path in paths)}", soft_wrap=True)
    return plan.run_dir
