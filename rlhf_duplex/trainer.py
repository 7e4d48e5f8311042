"""The loop: roll out, score, compare within the group, update; before and after it, the held-out suite.

Everything is checked before the model is loaded, and everything a run leaves is in its run folder.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from envs.audio import audio_info
from envs.context import ContextSchedule
from envs.dialogues import UserSides
from envs.episode import Episode
from envs.errors import InputError
from envs.events import complete_events
from envs.segments import Segment, read_manifest
from envs.speech import SpeechDetector, make_detector
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import EarlyScores, RewardFunction, RewardSpec
from rlhf_duplex.algorithms.advantages import AdvantageResult, combine_advantages
from rlhf_duplex.checkpoint import last_checkpoint, restore, save_checkpoint
from rlhf_duplex.config import Config, check_resumed, to_yaml
from rlhf_duplex.data.codes import open_cache
from rlhf_duplex.evaluation.metrics import format_table, read_results
from rlhf_duplex.evaluation.suite import Scores, evaluate_policy
from rlhf_duplex.learner import Learner, make_batch
from rlhf_duplex.policy.bundle import Bundle, check_bundle, find_bundle, load_bundle, local_info
from rlhf_duplex.policy.lora import add_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.report.build import build_report
from rlhf_duplex.rollout import episode_seed, rollout
from rlhf_duplex.sampler import segments_of_update
from rlhf_duplex.tracking import MetricsLog, check_trackers

NANO_DATA = Path(__file__).parent / "nano_data"


@dataclass
class Inputs:
    """What a run works on, checked."""

    segments: list[Segment]
    held_out: list[Segment]
    held_out_is_training: bool
    reward_function: RewardFunction
    detector: SpeechDetector


def load_inputs(config: Config) -> Inputs:
    """Manifests, audio, reward axes and detector, each held against what is wrong with it, with no model loaded.

    Raises:
        InputError: the first thing that is wrong.
    """
    check_machine(config)
    specs = {name: RewardSpec.from_config(options) for name, options in config.rewards.items()}
    reward_function = RewardFunction(specs)
    detector = make_detector(config.detector.name, **config.detector.options)
    segments = load_segments(config.segments, "train", detector)
    evaluation = config.evaluation.segments
    if evaluation is None and config.segments == "nano":
        evaluation = "nano"
    held_out = segments if evaluation is None else load_segments(evaluation, "heldout", detector)
    held_out = first_of_each(held_out, config.evaluation.limit)
    reward_function.prepare([*segments, *held_out])
    return Inputs(segments, held_out, evaluation is None, reward_function, detector)


def check_machine(config: Any) -> None:
    """Device, trackers and the checkpoint's file headers.

    Raises:
        InputError: the first that cannot be used.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device '{config.device}' cannot be used ({first}): choose another") from error
    check_trackers(config.trackers)
    folder = find_bundle(config.checkpoint)
    if folder is not None:
        check_bundle(local_info(folder))


def first_of_each(segments: list[Segment], limit: int) -> list[Segment]:
    """The first `limit` segments of every axis (0: all)."""
    seen: dict[str, int] = {}
    kept = []
    for segment in segments:
        seen[segment.axis] = seen.get(segment.axis, 0) + 1
        if not limit or seen[segment.axis] <= limit:
            kept.append(segment)
    return kept


def load_segments(name: str, part: str, detector: SpeechDetector) -> list[Segment]:
    """A manifest, or the `part` (`train`, `heldout`) of nano's, with its audio read once and its events completed.

    Raises:
        InputError: the first thing that is wrong.
    """
    path = NANO_DATA / part / "segments.jsonl" if name == "nano" else Path(name)
    segments = read_manifest(path)
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        list(pool.map(_check_audio, segments))
    return complete_events(segments, detector)


def _check_audio(segment: Segment) -> None:
    """Read what the header cannot tell: truncated files, NaN samples."""
    segment.user_audio(audio_info(segment.recording)[0])


def prepare_run_dir(config: Any, check: Callable[[Any, Path], None] = check_resumed) -> Path:
    """The run folder, made and writable, with the resolved configuration in it.

    `check` holds the configuration of a run that is resumed against the saved one. A run that is there already and is
    not resumed is kept: its folder is renamed to `NAME.old-1` (or the next number).

    Raises:
        InputError: it cannot be written, or the run to resume had another configuration.
    """
    run_dir = Path(config.run_dir)
    folder = find_bundle(config.checkpoint)
    if folder is not None and not config.resume and folder.resolve().is_relative_to(run_dir.resolve()):
        raise InputError(f"checkpoint {folder} lies in the run folder {run_dir}: choose another with run_dir=...")
    try:
        known = ("metrics.jsonl", "evaluation", "checkpoints")
        if not config.resume and any((run_dir / name).exists() for name in known):
            number = 1
            while (old := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
                number += 1
            os.rename(run_dir, old)
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
        if config.resume:
            check(config, run_dir / "config.yaml")
        temporary = run_dir / f".config.{os.getpid()}"
        temporary.write_text(to_yaml(config))
        os.replace(temporary, run_dir / "config.yaml")
    except OSError as error:
        raise InputError(
            f"run folder {run_dir} cannot be written ({error}): choose another with run_dir=..."
        ) from error
    return run_dir


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM: the loop ends after the update that is under way, with a checkpoint."""
    received: list[int] = []
    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, lambda n, _: received.append(n))
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            break
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Trainer:
    """A run: what it works on, and its loop. Build it with `load_inputs` done and the run folder made."""

    def __init__(self, config: Config, inputs: Inputs, run_dir: Path, console: Console) -> None:
        self.config, self.inputs, self.run_dir, self.console = config, inputs, run_dir, console
        torch.manual_seed(config.seed)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
        self.bundle: Bundle = load_bundle(config.checkpoint, config.device, dtype)
        if config.lora.rank:
            add_lora(self.bundle.lm, seed=config.seed, **vars(config.lora))
        sampling = Sampling(**vars(config.sampling))
        self.policy = MoshiPolicy(self.bundle.lm, sampling)
        self.codec = self.bundle.codec
        self.context = ContextSchedule(config.context.probability, config.context.max_seconds, config.context.schedule)
        store = open_cache(config.codes_cache, self.codec)
        users = UserSides(self.codec, inputs.detector, config.context.lead_in, store=store)
        self.env = DuplexDialogueVectorEnv(
            inputs.segments, self.codec, inputs.detector, context=self.context, user_sides=users
        )
        self.learner = Learner(self.policy, config.trainer, config.optimiser, config.seed)
        self.update = 0
        if config.resume:
            folder = last_checkpoint(run_dir)
            if folder is None:
                raise InputError(f"resume is set, but {run_dir} has no checkpoint: start without resume=true")
            self.update = restore(folder, self.bundle, self.learner)
            console.print(f"going on from {folder}, after {self.update} updates")

    def evaluate(self, name: str) -> dict[str, Any]:
        """Play the held-out suite; writes `evaluation/NAME.json` and the episodes that the report shows."""
        config, inputs = self.config, self.inputs
        extra = {
            "checkpoint": config.checkpoint,
            "update": self.update,
            "lead_in_seconds": config.context.lead_in,
            "on_training_segments": inputs.held_out_is_training,
        }
        with progress(self.console, f"evaluation {name}", self._suite_frames()) as advance:
            return evaluate_policy(
                self.run_dir,
                name,
                self.policy,
                self.env,
                inputs.reward_function,
                inputs.held_out,
                config.evaluation,
                config.rollout.batch_size,
                extra,
                advance,
                recorded=[*inputs.segments, *inputs.held_out],
            )

    def _suite_frames(self) -> float:
        seconds = sum(s.duration + self.config.context.lead_in for s in self.inputs.held_out)
        return seconds * self.config.evaluation.samples * self.codec.frame_rate

    def rollouts(self) -> tuple[list[Episode], list[Scores], dict[str, float]]:
        """The episodes of the next update, their scores, and the seconds that each stage took."""
        config, update = self.config, self.update
        trainer = config.trainer
        groups = segments_of_update(self.inputs.segments, update, trainer.groups, config.seed)
        rng = np.random.default_rng((config.seed, update))
        progress_share = update / max(1, trainer.updates - 1)
        contexts = [self.context.draw(rng, progress_share) for _ in groups]
        started = time.perf_counter()
        early = EarlyScores(self.inputs.reward_function)
        episodes = rollout(
            self.policy,
            self.env,
            [segment for segment in groups for _ in range(trainer.group_size)],
            [
                episode_seed(config.seed, update, group, member)
                for group in range(len(groups))
                for member in range(trainer.group_size)
            ],
            [context for context in contexts for _ in range(trainer.group_size)],
            update,
            config.rollout.batch_size,
            on_batch=early.add,
        )
        rolled = time.perf_counter()
        scores: list[Scores] = list(early.finish())
        return (
            episodes,
            scores,
            {"time/rollout": rolled - started, "time/score": time.perf_counter() - rolled},
        )

    def step(self) -> dict[str, float]:
        """One update: rollouts, advantages, optimiser steps; gives its metrics."""
        trainer = self.config.trainer
        episodes, scores, times = self.rollouts()
        function = self.inputs.reward_function
        rewards = {
            axis: torch.from_numpy(values).reshape(-1, trainer.group_size)
            for axis, values in function.values(scores).items()
        }
        baseline = {"rloo": "leave_one_out", "dr_grpo": "mean"}.get(trainer.algorithm, "standardised")
        result = combine_advantages(rewards, function.weights, trainer.advantages, trainer.whiten, baseline=baseline)
        started = time.perf_counter()
        batch = make_batch(episodes, result.advantages.reshape(-1), self.codec.frame_rate, self.policy.device)
        diagnostics = self.learner.update(batch, self.update)
        times["time/update"] = time.perf_counter() - started
        times["time/total"] = sum(times.values())
        self.update += 1
        seconds = sum(episode.duration for episode in episodes)
        return {
            "reward/total": float(np.mean([function.total(row) for row in scores])),
            **_by_axis(result),
            **function.metrics(),
            **diagnostics,
            "episodes": float(len(episodes)),
            "audio_seconds": seconds,
            "audio_seconds_per_second": seconds / times["time/total"],
            **times,
        }

    def run(self) -> bool:
        """All updates that are left; True where a signal ended it early."""
        config = self.config
        log = MetricsLog(self.run_dir, config.trackers, _flat(config), self.update if config.resume else 0)
        try:
            with (
                stop_requests() as stopped,
                progress(self.console, "training", config.trainer.updates - self.update) as advance,
            ):
                while self.update < config.trainer.updates and not stopped:
                    metrics = self.step()
                    log.write(self.update, metrics)
                    advance(1)
                    self.console.print(_line(self.update, config.trainer.updates, metrics), soft_wrap=True)
                    if (
                        self.update % config.checkpointing.every == 0
                        or self.update == config.trainer.updates
                        or stopped
                    ):
                        self.save()
            return bool(stopped)
        finally:
            log.close()

    def save(self) -> Path:
        """A checkpoint of now."""
        return save_checkpoint(self.run_dir, self.update, self.bundle, self.learner, self.config.checkpointing.keep)


def _by_axis(result: AdvantageResult) -> dict[str, float]:
    named = {
        "reward": result.mean,
        "reward_std": result.std,
        "frac_zero_std": result.frac_zero_std,
        "advantage_share": result.share,
    }
    return {f"{kind}/{axis}": value for kind, values in named.items() for axis, value in values.items()}


def _flat(config: Config) -> dict[str, str | int | float | bool]:
    scalars = {key: value for key, value in vars(config).items() if isinstance(value, str | int | float | bool)}
    for name in ("trainer", "optimiser", "sampling", "context"):
        part = vars(getattr(config, name))
        scalars.update({f"{name}.{k}": v for k, v in part.items() if isinstance(v, str | int | float | bool)})
    return scalars


def _line(update: int, updates: int, metrics: dict[str, float]) -> str:
    axes = "  ".join(f"{key.split('/')[1]} {value:+.2f}" for key, value in metrics.items() if key.startswith("reward/"))
    return (
        f"update {update}/{updates}  {axes}  KL {metrics['kl']:.4f}  "
        f"{metrics['audio_seconds_per_second']:.0f} audio-s/s"
    )


def make_console() -> Console:
    """The terminal as it is; where there is none (a log file), wide enough for the table."""
    return Console() if sys.stdout.isatty() else Console(width=130)


@contextmanager
def progress(console: Console, label: str, total: float) -> Iterator:
    """A progress bar; gives a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def train(config: Config, console: Console | None = None) -> Path:
    """A whole run: checks, evaluation before, updates, evaluation after, report. Gives the run folder.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known.
        NonFiniteError: a loss or gradient that is not finite; nothing of that update was saved.
    """
    console = console or make_console()
    with console.status("checking recordings and configuration"):
        inputs = load_inputs(config)
    run_dir = prepare_run_dir(config)
    trainer = Trainer(config, inputs, run_dir, console)
    before_path = run_dir / "evaluation" / "before.json"
    if config.resume and before_path.is_file():
        before = read_results(before_path)
    elif trainer.update == 0:
        if last_checkpoint(run_dir) is None:
            trainer.save()  # whatever stops the run from here on, it can go on
        before = trainer.evaluate("before")
    else:
        raise InputError(f"{before_path} is missing and update {trainer.update} is past it: start without resume=true")
    if trainer.run():
        report = build_report(run_dir)
        console.print(
            f"stopped after update {trainer.update}: checkpoint in {run_dir / 'checkpoints'}, report in {report}; "
            "go on with resume=true"
        )
        return run_dir
    after = trainer.evaluate("after")
    report = build_report(run_dir)
    console.print(format_table(before, after))
    if inputs.held_out_is_training:
        console.print("measured on the training segments: give evaluation.segments for held-out ones")
    console.print(f"wrote {report} and {last_checkpoint(run_dir) or run_dir}")
    return run_dir


def evaluate(config: Config, console: Console | None = None) -> Path:
    """The held-out suite with a checkpoint as it is; writes `evaluation/before.json` in the run folder.

    With `resume` it is the run folder's last checkpoint, and the file is named after its update.

    Raises:
        InputError: as in `train`.
    """
    console = console or make_console()
    with console.status("checking recordings and configuration"):
        inputs = load_inputs(config)
    run_dir = prepare_run_dir(config)
    trainer = Trainer(config, inputs, run_dir, console)
    name = f"step_{trainer.update:06d}" if config.resume else "before"
    console.print(format_table(trainer.evaluate(name), None))
    path = run_dir / "evaluation" / f"{name}.json"
    console.print(f"wrote {path}")
    return path
