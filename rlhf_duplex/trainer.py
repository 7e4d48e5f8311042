"""The loop: roll out, score, compare within the group, update; before and after it, the held-out suite.

Everything a run leaves is in its run folder. The commands are in `rlhf_duplex.run`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
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
from rlhf_duplex.batch import make_batch
from rlhf_duplex.checkpoint import last_checkpoint, mark_best, prune
from rlhf_duplex.cluster.local import Cluster, LearnersLostError, LocalCluster
from rlhf_duplex.cluster.roles import Rollouts, in_order, make_units
from rlhf_duplex.config import Config
from rlhf_duplex.evaluation.during import record_during
from rlhf_duplex.evaluation.metrics import reward_options, segment_values
from rlhf_duplex.evaluation.suite import record_suite, suite_episodes
from rlhf_duplex.inputs import Inputs, first_of_each
from rlhf_duplex.learner import NonFiniteError
from rlhf_duplex.live import training_segments
from rlhf_duplex.rollout import episode_seed
from rlhf_duplex.run_folder import StoppedError, progress
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
            try:
                self._restore()
            except BaseException:
                self.cluster.close()
                raise
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
            "seed": config.evaluation.seed,
            "on_training_segments": inputs.held_out_is_training,
            "segments_trained_on": inputs.held_out_trained,
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

    def _restore(self) -> None:
        """Back to the last checkpoint."""
        try:
            folder = last_checkpoint(self.run_dir)
            assert folder is not None
            self.update = self.cluster.restore(folder)
        except LearnersLostError as error:
            self._recover(error)

    def begin(self) -> None:
        """A checkpoint before the first update, where there is none: from here on a run that is stopped can go on."""
        while last_checkpoint(self.run_dir) is None:
            try:
                self.save()
            except LearnersLostError as error:
                self._recover(error)

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
        with self._rescuing():
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
        config, updates = self.config, self.config.trainer.updates
        log = MetricsLog(self.run_dir, config.trackers, flat(config), self.update if config.resume else 0)
        first, shown, interrupted = self.update + 1, self.update, self.update > 0
        try:
            with progress(self.console, "training", updates - self.update) as advance:
                while (interrupted or self.update < updates) and not self.stopped:
                    try:
                        if interrupted:
                            self._make_up(log)
                            interrupted = False
                            continue
                        metrics, whole = self.step(), False
                        write = partial(log.write, self.update, metrics)
                        # Stopped, it is without its figures; the update is logged and saved below.
                        with suppress(StoppedError), self._rescuing(write):
                            metrics |= self.evaluate_during()
                            whole = True
                        log.write(self.update, metrics)
                        self.console.print(_line(self.update, updates, metrics), soft_wrap=True)
                        if self.update == first:
                            self._warn(metrics)
                        if self._due(self.update) or self.stopped:
                            self.save(whole)
                    except LearnersLostError as error:
                        self._recover(error)
                        log.cut(self.update)
                        interrupted = self.update > 0  # in a save, perhaps
                    advance(self.update - shown)
                    shown = self.update
            return bool(self.stopped)
        finally:
            log.close()

    @contextmanager
    def _rescuing(self, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Where episodes or scores fail (an axis of one's own), a checkpoint of the updates before, and the error.

        The learner has no part in it: its weights are those after the last update. `first` is done before.
        """
        try:
            yield
        except (LearnersLostError, StoppedError, NonFiniteError):
            raise
        except Exception as error:
            folder = last_checkpoint(self.run_dir)
            try:
                first()
                if folder is None or folder.name != f"step_{self.update:06d}":
                    folder = self.save(whole=False)
            except Exception as failure:  # noqa: BLE001  the error that is to be seen is the first
                error.add_note(f"nor could a checkpoint be saved ({type(failure).__name__}: {failure})")
            else:
                self.console.print(
                    f"failed after update {self.update}, kept in {folder}: once mended, resume=true goes on",
                    soft_wrap=True,
                )
            raise

    def _make_up(self, log: MetricsLog) -> None:
        """What came after the last checkpoint without an interruption: an evaluation, and whether it is the best."""
        last = (read_metrics(log.path) or [{}])[-1]
        if last.get("update") == self.update and not any(key.startswith("evaluation/") for key in last):
            try:
                if figures := self.evaluate_during():
                    log.amend(self.update, figures)
            except StoppedError:
                return
        folder = last_checkpoint(self.run_dir)
        if folder is not None:
            self._mark_best(folder)

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
                self._begun = None
                folder = last_checkpoint(self.run_dir)
                # None before the first is saved, and where nothing is trained (`evaluate`): learners as they began.
                self.update = 0 if folder is None else self.cluster.restore(folder)
                return
            except LearnersLostError as again:
                error = again

    def save(self, whole: bool = True) -> Path:
        """A checkpoint of now; the oldest ones go, and the best is marked if the update has all its figures."""
        folder = self.cluster.save(self.run_dir, self.update)
        if whole:
            self._mark_best(folder)
        prune(self.run_dir, self.config.checkpointing.keep)
        return folder

    def _mark_best(self, folder: Path) -> None:
        """Only those that a run without interruptions has are compared, each by the updates since the one before."""
        best, every = self.config.checkpointing.best, self.config.checkpointing.every
        if not best or not self.update or not self._due(self.update):
            return
        sign, name = (-1.0, best[1:]) if best.startswith("-") else (1.0, best)
        updates = range((self.update - 1) // every * every + 1, self.update + 1)
        lines = [line for line in read_metrics(self.run_dir / "metrics.jsonl") if line["update"] in updates]
        values = [line[name] for line in lines if name in line]
        if values:
            mark_best(self.run_dir, folder, best, sign * float(np.mean(values)))


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
