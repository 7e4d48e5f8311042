"""Trials on Ray Tune, on this machine or a cluster: several at once, ASHA, Optuna.

Ray places and stops trials; the record of what is finished is the ablation's folder, as without Ray. On a cluster that
folder has to be on a file system that all nodes share, and the package installed on each.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from envs.files import write_text
from rlhf_duplex.ablate.search import SearchConfig, point_name, round_off
from rlhf_duplex.ablate.trial import Job, Record, is_finished, read_record, run_job, write_record
from rlhf_duplex.evaluation.metrics import read_results
from rlhf_duplex.tracking import read_metrics


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
        stopping: whether to stop all; asked at every step of Tune's loop.
        ended: called with the name and the record of each trial that has ended.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    by_name = {job.name: job for job in jobs}
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
        job = by_name[values["trial"]]

        reported = 0

        def watch(done: int) -> None:
            nonlocal reported
            lines = read_metrics(job.folder / "metrics.jsonl") if asha.metric else []
            for line in lines[reported:]:  # each of them, so that no rung is skipped
                if asha.metric in line:
                    tune.report({"updates": line["update"], asha.metric: line[asha.metric]})
            reported = len(lines)

        run_job(job, lambda: False, watch)

    def trial_ended(values: Mapping[str, Any], lost: bool) -> None:
        job = by_name[values["trial"]]
        record = read_record(job.root, job.name)
        behind = record.status == "open" and not is_finished(job) and not stopping()
        if asha.metric and behind and not lost:  # one that was lost with its machine stays open
            done = len(read_metrics(job.folder / "metrics.jsonl"))
            record = replace(record, status="stopped early", kind="ASHA", why=f"behind after {done} updates")
            write_record(job.root, job.name, record)
        ended(job.name, record)

    space = {"trial": tune.grid_search([job.name for job in jobs])}
    _tune(trainable, space, tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=workers), config, workers,
          stopping, trial_ended)  # fmt: skip


def run_search(
    search: SearchConfig,
    root: Path,
    known: Sequence[tuple[Mapping[str, Any], float | None]],
    make_jobs: Callable[[Mapping[str, Any]], Sequence[Job]],
    workers: int,
    config: RayConfig,
    stopping: Callable[[], bool],
    ended: Callable[[str, Record], None],
) -> None:
    """Run points that Optuna proposes, each with all its seeds one after another.

    Args:
        search: the space, how many points in all, what to improve.
        root: the ablation's folder; points are kept in it before they are run.
        known: points of earlier calls with what they gave, None for those that are not finished (they go on first).
        make_jobs: the trials of a point.
        workers, config, stopping, ended: as in `run_jobs`; `ended` gets a point's name.
    """
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    kinds = {"uniform": tune.uniform, "log_uniform": tune.loguniform}
    space = {}
    for key, domain in search.space.items():
        (kind, values), *_ = domain.items()
        space[key] = tune.choice(values) if kind == "choice" else kinds[kind](*values)
    unfinished = [dict(point) for point, value in known if value is None]
    searcher = OptunaSearch(
        space=OptunaSearch.convert_search_space(space),
        metric="objective",
        mode=search.mode,
        points_to_evaluate=unfinished or None,
        # Another in each call: with the same, Optuna would begin by proposing the point that it proposed first.
        seed=int(np.random.SeedSequence((search.seed, len(known))).generate_state(1)[0]),
    )
    for point, value in known:
        if value is not None:
            searcher.add_evaluated_point(dict(point), value)
    axis, _, metric = search.metric.partition(".")
    begun = len(known)

    def trainable(values: Mapping[str, Any]) -> None:
        overrides = {key: round_off(value) for key, value in values.items()}
        path = root / "points" / f"{point_name(overrides)}.json"
        if not path.is_file():
            number = begun + len(list((root / "points").glob("*.json")))
            write_text(path, json.dumps({"number": number, "overrides": overrides}) + "\n")
        means = []
        for job in make_jobs(overrides):
            run_job(job, lambda: False)
            if is_finished(job):
                found = read_results(job.result)["axes"].get(axis, {}).get(metric)
                means += [] if found is None else [found["mean"]]
        if not means:
            raise RuntimeError(f"no trial of this point is finished with {search.metric}")
        tune.report({"objective": sum(means) / len(means)})

    def trial_ended(values: Mapping[str, Any], lost: bool) -> None:
        ended(
            point_name({key: round_off(value) for key, value in values.items()}), Record("failed" if lost else "done")
        )

    left = search.points - len(known) + len(unfinished)
    if left > 0:
        settings = tune.TuneConfig(search_alg=searcher, num_samples=left, max_concurrent_trials=workers)
        _tune(trainable, None, settings, config, workers, stopping, trial_ended)


def _tune(
    trainable: Callable[[Mapping[str, Any]], None],
    space: Any,
    settings: Any,
    config: RayConfig,
    workers: int,
    stopping: Callable[[], bool],
    ended: Callable[[Mapping[str, Any], bool], None],
) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray warns will be its default
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals come in through `stopping`
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails at once has none to report
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    import ray
    from ray import tune

    class Local:
        """Tune saves its callbacks; ours live in this process alone, and nothing is restored from what it saves."""

        def __init__(self, function: Callable) -> None:
            self.function = function

        def __getstate__(self) -> dict:
            return {}

    class Ended(Local, tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.function(trial.config, False)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.function(trial.config, True)

    class Stopping(Local, tune.Stopper):
        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return self.function()

    started = not ray.is_initialized()
    if started:
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
                tune.with_resources(trainable, {"cpu": config.cpus, "gpu": config.gpus}),
                param_space=space,
                tune_config=settings,
                run_config=tune.RunConfig(
                    storage_path=folder,
                    name="ablation",
                    verbose=0,
                    callbacks=[Ended(ended)],
                    stop=Stopping(stopping),
                    failure_config=tune.FailureConfig(max_failures=2),  # of a node; a trial's own are its record
                ),
            ).fit()
    finally:
        if started:
            ray.shutdown()
