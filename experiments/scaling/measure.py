"""What this machine takes: runs on Ray, and single rollouts and updates of several sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from envs.segments import read_manifest
from envs.speech import make_detector
from rewards.aggregate import RewardFunction, RewardSpec
from rlhf_duplex.batch import make_batch
from rlhf_duplex.cluster.roles import LearnerRole, RolloutRole, load_policy, make_units
from rlhf_duplex.config import Config, load_config
from rlhf_duplex.inputs import NANO_DATA, load_inputs
from rlhf_duplex.run import running
from rlhf_duplex.run_folder import prepare_run_dir

SMALL = ["trainer.groups=4", "trainer.group_size=8", "trainer.minibatch=16", "context.probability=0"]


def measure_runs(
    folder: Path, workers: Sequence[int], updates: int, overrides: Sequence[str]
) -> list[dict[str, float]]:
    """Mean seconds by stage of runs with so many rollout workers (0: in one process), the first update left out."""
    found = []
    for count in workers:
        run_dir = folder / f"workers_{count}"
        config = load_config(
            None,
            [f"run_dir={run_dir}", *SMALL, *overrides, f"trainer.updates={updates + 1}", f"cluster.workers={count}"],
        )
        inputs = load_inputs(config)
        with running(config, inputs, prepare_run_dir(config), Console()) as trainer:
            trainer.save()
            trainer.run()
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
        names = (
            "time/rollout",
            "time/update",
            "time/sync",
            "time/total",
            "time/worker_play",
            "audio_seconds_per_second",
        )
        mean = {name: float(np.mean([line.get(name, 0.0) for line in lines])) for name in names}
        # Waiting for workers beyond what the slowest of them plays, and weights on their way to them.
        carried = max(0.0, mean["time/rollout"] - mean["time/worker_play"]) if count else 0.0
        mean["transport_share"] = (carried + mean["time/sync"]) / mean["time/total"] if count else 0.0
        found.append({"workers": float(count), **mean})
    return found


def measure_rollouts(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of rollouts of so many episodes, of a short segment and of a long one."""
    config = load_config(None, SMALL)
    role, segments = _role(config)
    found = []
    for segment in (segments[0], segments[-1]):
        for episodes in (min(sizes), *sizes):  # the first warms up, and is left out
            (unit,) = make_units([segment] * episodes, list(range(episodes)), [0.0] * episodes, episodes)
            started = time.perf_counter()
            role.play(unit)
            seconds = time.perf_counter() - started
            frames = float(len(role.collect()[0].episodes[0].text_tokens))  # type: ignore[arg-type]
            found.append({"frames": frames, "episode_frames": episodes * frames, "seconds": seconds})
        del found[-len(sizes) - 1]
    return found


def measure_updates(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Seconds of updates of so many episodes, one optimiser step each."""
    config = load_config(None, [*SMALL, "trainer.minibatch=1024"])
    role, segments = _role(config)
    bundle, policy = load_policy(config)
    learner = LearnerRole(config, policy, bundle)
    found = []
    for segment in (segments[0], segments[-1]):
        for episodes in (min(sizes), *sizes):
            (unit,) = make_units([segment] * episodes, list(range(episodes)), [0.0] * episodes, episodes)
            role.play(unit)
            played = role.collect()[0].episodes
            batch = make_batch(played, torch.randn(episodes), bundle.codec.frame_rate, policy.device)
            started = time.perf_counter()
            learner.learn(batch, 0)
            seconds = time.perf_counter() - started
            found.append({"one": 1.0, "tokens": float(batch.codes.shape[0] * batch.codes.shape[2]), "seconds": seconds})
        del found[-len(sizes) - 1]
    return found


def _role(config: Config) -> tuple[RolloutRole, list]:
    """A rollout worker in this process, and nano's held-out segments by length."""
    segments = sorted(read_manifest(NANO_DATA / "heldout" / "segments.jsonl"), key=lambda s: s.duration)
    bundle, policy = load_policy(config)
    function = RewardFunction({name: RewardSpec.from_config(options) for name, options in config.rewards.items()})
    return RolloutRole(config, segments, make_detector("energy"), function, policy, bundle), segments


def fit(points: Sequence[dict[str, float]], columns: Sequence[str]) -> dict[str, float]:
    """Seconds as a sum of columns, by least squares of the relative error; and the largest relative error."""
    seconds = np.array([point["seconds"] for point in points])
    terms = np.array([[point[name] for name in columns] for point in points])
    solution, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)
    off = np.abs(terms @ solution / seconds - 1)
    return {f"seconds_per_{name}": float(x) for name, x in zip(columns, solution, strict=True)} | {
        "largest_relative_error": float(off.max())
    }
