"""The loop: roll out, score, compare within the group, update; before and after it, the held-out suite.

Everything is checked before the model is loaded, and everything a run leaves is in its run folder.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from envs.context import ContextSchedule
from envs.errors import InputError
from envs.segments import Segment
from rlhf_duplex.algorithms.advantages import AdvantageResult, combine_advantages
from rlhf_duplex.algorithms.values import batch_rewards
from rlhf_duplex.checkpoint import last_checkpoint, mark_best, prune
from rlhf_duplex.cluster.local import Cluster, LearnersLostError, LocalCluster
from rlhf_duplex.cluster.roles import Rollouts, in_order, make_units
from rlhf_duplex.config import Config
from rlhf_duplex.evaluation.during import record_during
from rlhf_duplex.evaluation.metrics import format_table, read_results, reward_options, segment_values
from rlhf_duplex.evaluation.suite import put_aside, record_suite, suite_episodes, take_before
from rlhf_duplex.inputs import Inputs, first_of_each, load_inputs, manifest_path
from rlhf_duplex.learner import make_batch
from rlhf_duplex.live import training_segments
from rlhf_duplex.report.build import build_report
from rlhf_duplex.rollout import episode_seed
from rlhf_duplex.run_folder import (
    StoppedError,
    check_data,
    claimed,
    make_console,
    prepare_run_dir,
    progress,
    stop_requests,
)
from rlhf_duplex.sampler import segments_of_update
from rlhf_duplex.tracking import MetricsLog, flat, read_metrics


def make_cluster(config: Config, inputs: Inputs, console: Console) -> Cluster:
    """Who does the work: this process, or Ray's.

    Raises:
        InputError: Ray cannot be had, or is too small.
    """
    if config.cluster.workers == 0:
        return LocalCluster(config, inputs)
    from rlhf_duplex.cluster.ray_cluster import RayCluster  # Ray takes seconds to import

    return RayCluster(config, inputs, console)


class Trainer:
    """A run: what it works on, and its loop. Build it with `load_inputs` done and the run folder made."""

    def __init__(self, config: Config, inputs: Inputs, run_dir: Path, console: Console) -> None:
        self.config, self.inputs, self.run_dir, self.console = config, inputs, run_dir, console
        self.context = ContextSchedule(config.context.probability, config.context.max_seconds, config.context.schedule)
        folder = last_checkpoint(run_dir) if config.resume else None
        if config.resume and folder is None:
            raise InputError(f"resume is set, but {run_dir} has no checkpoint: start without resume=true")
        self.cluster = make_cluster(config, inputs, console)
        self.update = 0
        self.stopped: Sequence[int] = ()  # signals that asked for an end
        self._played: set[str] = set()  # axes of the segments of the last update
        self._begun: int | None = None  # the update whose episodes are being rolled out
        if folder is not None:
            self.update = self.cluster.restore(folder)
            console.print(f"going on from {folder}, after {self.update} updates")

    def evaluate(self, name: str) -> dict[str, Any]:
        """Play the held-out suite; writes `evaluation/NAME.json` and the episodes that the report shows.

        Raises:
            StoppedError: a signal asked for it.
        """
        config, inputs = self.config, self.inputs
        extra = {
            "checkpoint": config.checkpoint,
            "update": self.update,
            "lead_in_seconds": config.context.lead_in,
            "on_training_segments": inputs.held_out_is_training,
            "rewards": reward_options(config.rewards),
        }
        samples = config.evaluation.samples
        frames = sum(s.duration + config.context.lead_in for s in inputs.held_out) * samples * self.cluster.frame_rate
        with progress(self.console, f"evaluation {name}", frames) as advance:
            while True:
                try:
                    found = self._play_suite(inputs.held_out, samples, advance)
                    break
                except LearnersLostError as error:
                    self._recover(error)
        return record_suite(
            self.run_dir,
            name,
            found.episodes,
            found.scores,
            config.evaluation,
            found.figures,
            extra,
            recorded=[*inputs.segments, *inputs.held_out],
        )

    def _play_suite(
        self, part: Sequence[Segment], samples: int, advance: Callable[[float], None] | None = None
    ) -> Rollouts:
        suite, seed = self.inputs.held_out, self.config.evaluation.seed
        segments, seeds, contexts = suite_episodes(suite, samples, seed, part)
        units = make_units(segments, seeds, contexts, self.cluster.unit, self.cluster.workers, audio=True)

        def go_on(count: float) -> None:
            if advance is not None:
                advance(count)
            if self.stopped:
                raise StoppedError

        self.cluster.begin(units)
        played = self.cluster.played(go_on)
        self.cluster.figures()  # those of an update begin after this
        return in_order(played, len(segments))

    def evaluate_during(self) -> dict[str, float]:
        """A part of the held-out suite where it is its turn, see `rlhf_duplex.evaluation.during`; its metrics."""
        evaluation, inputs, started = self.config.evaluation, self.inputs, time.perf_counter()
        if not evaluation.every or self.update % evaluation.every:
            return {}
        found = self._play_suite(first_of_each(inputs.held_out, evaluation.every_limit), 1)
        values = segment_values(found.episodes, found.scores, [*inputs.segments, *inputs.held_out])
        figures = record_during(self.run_dir, self.update, values, self.config.context.lead_in)
        return figures | {"time/evaluation": time.perf_counter() - started}

    def begin_rollouts(self, update: int) -> None:
        """Have the episodes of an update rolled out with the weights of now."""
        config, trainer = self.config, self.config.trainer
        trained = training_segments(config, self.inputs.trained)
        groups = segments_of_update(trained, update, trainer.groups, config.seed, config.train_axes)
        rng = np.random.default_rng((config.seed, update))
        progress_share = update / max(1, trainer.updates - 1)
        contexts = [self.context.draw(rng, progress_share) for _ in groups]
        members = range(trainer.group_size)
        units = make_units(
            [segment for segment in groups for _ in members],
            [episode_seed(config.seed, update, group, member) for group in range(len(groups)) for member in members],
            [context for context in contexts for _ in members],
            self.cluster.unit,
            self.cluster.workers,
            live=config.env == "live",
        )
        self.cluster.begin(units)
        self._begun = update

    def rollouts(self) -> Rollouts:
        """The episodes of the next update, scored; begun before, or now."""
        trainer, started = self.config.trainer, time.perf_counter()
        if self._begun != self.update:
            self.begin_rollouts(self.update)
        played = self.cluster.played()
        self._begun = None
        found = in_order(played, trainer.groups * trainer.group_size)
        oldest = self.update - (1 if trainer.ahead else 0)
        wrong = {e.policy_version for e in found.episodes if not oldest <= e.policy_version <= self.update}
        if wrong:
            raise RuntimeError(f"episodes of the policy's versions {sorted(wrong)} in update {self.update}")
        found.seconds["time/score"] = max((p.seconds["judge"] for p in played), default=0.0)
        found.seconds["time/rollout"] = time.perf_counter() - started - found.seconds["time/score"]
        return found

    def step(self) -> dict[str, float]:
        """One update: rollouts, advantages, optimiser steps; gives its metrics."""
        trainer, function, started = self.config.trainer, self.inputs.reward_function, time.perf_counter()
        found = self.rollouts()
        rewards = {
            axis: torch.from_numpy(values).reshape(-1, trainer.group_size)
            for axis, values in function.values(found.scores).items()
        }
        baseline = {"rloo": "leave_one_out", "dr_grpo": "mean"}.get(trainer.algorithm, "standardised")
        result = combine_advantages(
            rewards, function.weights, trainer.advantages, trainer.whiten, function.advantage_eps, baseline=baseline
        )
        advantages = result.advantages.reshape(-1)
        if trainer.algorithm == "ppo":  # the value function makes advantages of them
            advantages = batch_rewards(rewards, function.weights, self.config.ppo.standardise_rewards)
        batch = make_batch(found.episodes, advantages, self.cluster.frame_rate, torch.device("cpu"))
        if trainer.ahead and self.update + 1 < trainer.updates and not self._pauses(self.update + 1):
            self.begin_rollouts(self.update + 1)
        learning = time.perf_counter()
        diagnostics = self.cluster.learn(batch, self.update)
        now = time.perf_counter()
        seconds = sum(episode.duration for episode in found.episodes)
        self._played = {episode.segment.axis for episode in found.episodes}
        metrics = {
            "reward/total": function.mean_total(found.episodes, found.scores),
            **_by_axis(result),
            **found.figures,
            **diagnostics,
            "staleness": float(np.mean([self.update - e.policy_version for e in found.episodes])),
            "episodes": float(len(found.episodes)),
            "audio_seconds": seconds,
            "audio_seconds_per_second": seconds / (now - started),
            **found.seconds,
            "time/update": now - learning,
            "time/total": now - started,
            "time/utilisation_learner": (now - learning) / (now - started),
            **self.cluster.figures(),
        }
        self.update += 1
        return metrics

    def _due(self, update: int) -> bool:
        """Whether there is a checkpoint after so many updates."""
        return update % self.config.checkpointing.every == 0 or update == self.config.trainer.updates

    def _pauses(self, update: int) -> bool:
        """Whether something comes between so many updates and the next rollouts, so that none are begun ahead."""
        every = self.config.evaluation.every
        return self._due(update) or bool(every and update % every == 0)

    def run(self) -> bool:
        """All updates that are left; True where a signal ended it early."""
        config = self.config
        log = MetricsLog(self.run_dir, config.trackers, flat(config), self.update if config.resume else 0)
        first = self.update + 1
        try:
            with progress(self.console, "training", config.trainer.updates - self.update) as advance:
                while self.update < config.trainer.updates and not self.stopped:
                    try:
                        metrics = self.step()
                        with suppress(StoppedError):  # without its figures; the update is logged and saved below
                            metrics |= self.evaluate_during()
                        log.write(self.update, metrics)
                        advance(1)
                        self.console.print(_line(self.update, config.trainer.updates, metrics), soft_wrap=True)
                        if self.update == first:
                            self._warn(metrics)
                        if self._due(self.update) or self.stopped:
                            self.save()
                    except LearnersLostError as error:
                        before = self.update
                        self._recover(error)
                        log.cut(self.update)
                        advance(self.update - before)
            return bool(self.stopped)
        finally:
            log.close()

    def _warn(self, metrics: dict[str, float]) -> None:
        """Of what an update alone can show: an axis without any score, a best checkpoint by what is no metric."""
        function, trained = self.inputs.reward_function, {segment.axis for segment in self.inputs.trained}
        for name, weight in function.weights.items():
            applies = set(function.axes[name].applies_to)
            if weight and not applies & trained:
                self.console.print(
                    f"reward axis '{name}' scores {', '.join(sorted(applies))}: none of it is trained on"
                )
            elif weight and applies & self._played and not np.isfinite(metrics.get(f"reward/{name}", np.nan)):
                self.console.print(f"reward axis '{name}' gave no score in this update: `rewards check` says more")
        best = self.config.checkpointing.best.removeprefix("-")
        if best and best not in metrics and not best.startswith("evaluation/"):
            close = ", ".join(get_close_matches(best, metrics)) or "see metrics.jsonl"
            self.console.print(f"checkpointing.best: '{best}' is no metric ({close}): nothing is kept as the best")

    def _recover(self, error: LearnersLostError) -> None:
        """Go back to the last checkpoint with new learners."""
        while True:
            self.cluster.lost(error)
            try:
                self.cluster.recover()
                folder = last_checkpoint(self.run_dir)
                # None where nothing is trained (`evaluate`): new learners have the checkpoint that it began from.
                self.update, self._begun = 0 if folder is None else self.cluster.restore(folder), None
                return
            except LearnersLostError as again:
                error = again

    def save(self) -> Path:
        """A checkpoint of now; the oldest ones go, and the best is marked."""
        checkpointing = self.config.checkpointing
        before = last_checkpoint(self.run_dir)
        folder = self.cluster.save(self.run_dir, self.update)
        if checkpointing.best and self.update:
            first = 0 if before is None else int(before.name.rpartition("_")[2])
            self._mark_best(folder, first)
        prune(self.run_dir, checkpointing.keep)
        return folder

    def _mark_best(self, folder: Path, first: int) -> None:
        name = self.config.checkpointing.best
        sign, name = (-1.0, name[1:]) if name.startswith("-") else (1.0, name)
        lines = [line for line in read_metrics(self.run_dir / "metrics.jsonl") if first < line["update"] <= self.update]
        values = [line[name] for line in lines if name in line]
        if values:
            mark_best(self.run_dir, folder, self.config.checkpointing.best, sign * float(np.mean(values)))


def _by_axis(result: AdvantageResult) -> dict[str, float]:
    named = {
        "reward": result.mean,
        "reward_std": result.std,
        "frac_zero_std": result.frac_zero_std,
        "advantage_share": result.share,
    }
    return {f"{kind}/{axis}": value for kind, values in named.items() for axis, value in values.items()}


def _line(update: int, updates: int, metrics: dict[str, float]) -> str:
    axes = "  ".join(f"{key.split('/')[1]} {value:+.2f}" for key, value in metrics.items() if key.startswith("reward/"))
    known = [stage for stage in ("rollout", "update", "sync") if f"time/{stage}" in metrics]
    stages = "  ".join(f"{stage} {metrics[f'time/{stage}']:.1f}" for stage in known)
    busy = f"  busy {metrics['time/utilisation_rollout']:.0%}" if "time/utilisation_rollout" in metrics else ""
    return (
        f"update {update}/{updates}  {axes}  KL {metrics['kl']:.4f}  "
        f"{metrics['audio_seconds_per_second']:.0f} audio-s/s  {stages} s{busy}"
    )


@contextmanager
def running(config: Config, inputs: Inputs, run_dir: Path, console: Console) -> Iterator[Trainer]:
    """A trainer that hears Ctrl-C and SIGTERM while this lasts, and whose processes end with it."""
    trainer = Trainer(config, inputs, run_dir, console)
    try:
        with stop_requests() as trainer.stopped:
            yield trainer
    finally:
        trainer.cluster.close()


def train(config: Config, console: Console | None = None) -> Path:
    """A whole run: checks, evaluation before, updates, evaluation after, report. Gives the run folder.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known.
        NonFiniteError: a loss or gradient that is not finite; nothing of that update was saved.
        ClusterError: too many processes died or hung.
    """
    console = console or make_console()
    with console.status("checking recordings and configuration"):
        inputs = load_inputs(config)
    with claimed(config.run_dir):
        return _train(config, inputs, console)


def _train(config: Config, inputs: Inputs, console: Console) -> Path:
    run_dir = prepare_run_dir(config)
    check_data(run_dir, config.resume, config.checkpoint, {"segments": manifest_path(config.segments, "train")})
    with running(config, inputs, run_dir, console) as trainer:
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
        if last_checkpoint(run_dir) is None:
            trainer.save()  # whatever stops the run from here on, it can go on
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
    console = console or make_console()
    with console.status("checking recordings and configuration"):
        inputs = load_inputs(config)
    with claimed(config.run_dir):
        return _evaluate(config, inputs, console)


def _evaluate(config: Config, inputs: Inputs, console: Console) -> Path:
    run_dir = prepare_run_dir(config)
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
