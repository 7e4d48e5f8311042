"""Trials on Ray Tune, on this machine or a cluster: several at once, ASHA, Optuna.

Ray places and stops trials; the record of what is finished is the ablation's folder, as without Ray. On a cluster that
folder has to be on a file system that all nodes share, and the package installed on each.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from envs.files import write_text
from rlhf_duplex.ablate.search import SearchConfig, point_name, round_off
from rlhf_duplex.ablate.trial import Job, Record, Stopped, is_finished, may_start, read_record, run_job, write_record
from rlhf_duplex.evaluation.metrics import read_results
from rlhf_duplex.tracking import read_metrics

STOP_FILE = ".stopping"  # in the ablation's folder, which trials on other machines see, too


@dataclass
class AshaConfig:
    """Asynchronous successive halving: stops trials that are behind.

    Attributes:
        metric: of `metrics.jsonl`, higher is better; empty: no early stopping. (`reward/total` compares trials of equal
            weights only; the reward of one axis, `reward/turn_taking`, compares any.)
        grace: updates before a trial can be stopped.
        reduction: of the trials at a rung one in so many goes on.
    """

    metric: str = ""
    grace: int = 10
    reduction: int = 3


@dataclass
class RayConfig:
    """Where trials run.

    Attributes:
        address: of a running cluster (`auto`, `ray://HOST:10001`); None starts Ray on this machine.
        cpus, gpus: of a trial.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0


def run_jobs(
    jobs: Sequence[Job],
    updates: int,
    workers: int,
    config: RayConfig,
    asha: AshaConfig,
    stopping: Callable[[], bool],
    ended: Callable[[str, Record], None],
) -> None:
    """Run trials, at most `workers` at once.

    Args:
        jobs: of all trials.
        updates: of a trial, for ASHA.
        workers, config, asha: see the configurations.
        stopping: whether to stop all; asked at every step of Tune's loop. Trials end the update that is under way.
        ended: called with the name and the record of each trial that has ended or was stopped.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    by_name = {job.name: job for job in jobs}
    root = jobs[0].root
    stop_file = root / STOP_FILE
    begun: dict[str, float] = {}  # less the seconds of earlier attempts
    scheduler = None
    if asha.metric:
        scheduler = ASHAScheduler(
            time_attr="updates",
            metric=asha.metric,
            mode="max",
            max_t=max(updates, asha.grace),
            grace_period=asha.grace,
            reduction_factor=asha.reduction,
            stop_last_trials=False,  # after the last update there is the evaluation
        )

    def trainable(values: Mapping[str, Any]) -> None:
        if stop_file.exists():  # while others end their update, Tune fills the places that become free
            return
        job, reported = by_name[values["trial"]], 0

        def watch(done: int) -> None:
            nonlocal reported
            lines = read_metrics(job.folder / "metrics.jsonl") if asha.metric else []
            for line in lines[reported:]:  # each of them, so that no rung is skipped
                if asha.metric in line:
                    tune.report({"updates": line["update"], asha.metric: line[asha.metric]})
            reported = len(lines)

        try:
            run_job(job, stop_file.exists, watch)
        except Stopped:
            if not stop_file.exists():  # by a signal from elsewhere: Tune starts it again
                raise

    def trial_started(values: Mapping[str, Any]) -> None:
        begun[values["trial"]] = time.monotonic() - read_record(root, values["trial"]).seconds

    def trial_ended(values: Mapping[str, Any], lost: str) -> None:
        job = by_name[values["trial"]]
        record = read_record(job.root, job.name)
        if stop_file.exists() and record == Record():
            return  # it never began
        # A first attempt may have failed; one that was lost with its machine stays open.
        behind = record.status in ("open", "failed") and may_start(record, job.retries) and not is_finished(job)
        if asha.metric and behind and not lost and not stop_file.exists():
            done = len(read_metrics(job.folder / "metrics.jsonl"))
            record = replace(record, status="stopped early", kind="ASHA", why=f"behind after {done} updates",
                             seconds=time.monotonic() - begun[job.name])  # fmt: skip
            write_record(job.root, job.name, record)
        ended(job.name, record)

    space = {"trial": tune.grid_search([job.name for job in jobs])}
    settings = tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=workers)
    _tune(trainable, space, settings, config, workers, stop_file, stopping, trial_started, trial_ended)


def run_search(
    search: SearchConfig,
    root: Path,
    known: Sequence[tuple[Mapping[str, Any], float | None]],
    make_jobs: Callable[[Mapping[str, Any]], Sequence[Job]],
    workers: int,
    config: RayConfig,
    stopping: Callable[[], bool],
    ended: Callable[[Mapping[str, Any], str], None],
) -> None:
    """Run points that Optuna proposes, each with all its seeds one after another.

    Args:
        search: the space, how many points in all, what to improve.
        root: the ablation's folder; points are kept in it before they are run.
        known: points of earlier calls with what they gave, None for those that failed.
        make_jobs: the trials of a point.
        workers, config, stopping: as in `run_jobs`.
        ended: called with each point that has ended, and why it was lost to Ray, if it was.
    """
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    kinds = {"uniform": tune.uniform, "log_uniform": tune.loguniform}
    space = {}
    for key, domain in search.space.items():
        (kind, values), *_ = domain.items()
        space[key] = tune.choice(values) if kind == "choice" else kinds[kind](*values)
    searcher = OptunaSearch(
        space=OptunaSearch.convert_search_space(space),
        metric="objective",
        mode=search.mode,
        # Another in each call: with the same, Optuna would begin by proposing the point that it proposed first.
        seed=int(np.random.SeedSequence((search.seed, len(known))).generate_state(1)[0]),
    )
    for point, value in known:
        if value is not None:
            searcher.add_evaluated_point(dict(point), value)
    axis, _, metric = search.metric.partition(".")
    begun, stop_file = len(known), root / STOP_FILE

    def trainable(values: Mapping[str, Any]) -> None:
        if stop_file.exists():  # no further point is kept
            return
        overrides = {key: round_off(value) for key, value in values.items()}
        path = root / "points" / f"{point_name(overrides)}.json"
        if not path.is_file():
            number = begun + len(list((root / "points").glob("*.json")))
            write_text(path, json.dumps({"number": number, "overrides": overrides}) + "\n")
        means = []
        for job in make_jobs(overrides):
            try:
                run_job(job, stop_file.exists)
            except Stopped:
                if not stop_file.exists():
                    raise
                return  # the point is kept, and its trials go on another time
            if is_finished(job):
                found = read_results(job.result)["axes"].get(axis, {}).get(metric)
                means += [] if found is None else [found["mean"]]
        if means:  # else its trials have failed, and their records say why
            tune.report({"objective": sum(means) / len(means)})

    def trial_ended(values: Mapping[str, Any], lost: str) -> None:
        if not stop_file.exists():
            ended({key: round_off(value) for key, value in values.items()}, lost)

    left = search.points - len(known)
    if left > 0:
        settings = tune.TuneConfig(search_alg=searcher, num_samples=left, max_concurrent_trials=workers)
        _tune(trainable, None, settings, config, workers, stop_file, stopping, lambda _: None, trial_ended)


def _tune(
    trainable: Callable[[Mapping[str, Any]], None],
    space: Any,
    settings: Any,
    config: RayConfig,
    workers: int,
    stop_file: Path,
    stopping: Callable[[], bool],
    started: Callable[[Mapping[str, Any]], None],
    ended: Callable[[Mapping[str, Any], str], None],
) -> None:
    """Tune's loop. To stop, `stop_file` asks the trials that run, wherever they do, and the loop waits for them.

    `ended` is told why a trial was lost, where it ended with an error of its own process; else the text is empty.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray warns will be its default
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals come in through `stopping`
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails at once has none to report
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    import ray
    from ray import tune
    from ray.tune.progress_reporter import TrialProgressCallback

    class Local:
        """Tune saves its callbacks; ours live in this process alone, and nothing is restored from what it saves."""

        def __init__(self, *functions: Callable) -> None:
            self.functions = functions

        def __getstate__(self) -> dict:
            return {}

    running: set[str] = set()
    asked: set[str] = set()
    directory = os.getcwd()

    def at_home(values: Mapping[str, Any]) -> None:
        # Tune moves into a folder of the trial's own, but paths lead from where the command was given.
        if os.path.isdir(directory):
            os.chdir(directory)
        trainable(values)

    class Silent(Local, TrialProgressCallback):
        """In place of Tune's own, which prints a line without contents for each trial."""

        def on_trial_complete(self, *_: Any, **info: Any) -> None:
            pass

        on_trial_result = on_trial_error = on_trial_complete

    class Watching(Local, tune.Callback):
        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.add(trial.trial_id)
            self.functions[0](trial.config)

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)  # lost with its machine: it waits for another

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)
            self.functions[1](trial.config, "")

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            running.discard(trial.trial_id)
            self.functions[1](trial.config, _why(trial))

    class Stopping(Local, tune.Stopper):
        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if not self.functions[0]():
                return False
            if not stop_file.exists():
                stop_file.touch()
                asked.update(running)
            return not asked & running  # one that begins now sees the file and ends at once

    stop_file.unlink(missing_ok=True)
    ours = not ray.is_initialized()
    if ours:
        cpus = max(1, round(workers * config.cpus))
        local = {"address": "local", "num_cpus": cpus, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        options = {"address": config.address} if config.address else local
        # Where memory runs short, Ray would kill the process that waits for a trial, which ends Tune with all trials;
        # left alone, the kernel kills the trial's own, which is recorded and tried again.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        ray.init(log_to_driver=False, logging_level="error", **options)
    try:
        # What Tune itself writes is not needed: the ablation's folder has all.
        with tempfile.TemporaryDirectory(prefix="rlhf_duplex_tune_") as folder:
            tune.Tuner(
                tune.with_resources(at_home, {"cpu": config.cpus, "gpu": config.gpus}),
                param_space=space,
                tune_config=settings,
                run_config=tune.RunConfig(
                    storage_path=folder,
                    name="ablation",
                    verbose=0,
                    callbacks=[Watching(started, ended), Silent()],
                    stop=Stopping(stopping),
                    failure_config=tune.FailureConfig(max_failures=2),  # of a node; a trial's own are its record
                ),
            ).fit()
    finally:
        stop_file.unlink(missing_ok=True)
        if ours:
            ray.shutdown()


def _why(trial: Any) -> str:
    """What ended a trial's process, on one line, without the traceback that Ray puts around it."""
    try:
        error = trial.get_pickled_error()
    except Exception as failure:  # noqa: BLE001  an error of whatever class, which need not survive pickling
        error = failure
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[-300:]}" if cause else "Lost: its process ended"
