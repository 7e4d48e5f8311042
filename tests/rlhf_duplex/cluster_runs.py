"""Runs of a few seconds for the tests of the cluster: two segments of two seconds, an axis that always differs."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from envs.segments import write_manifest
from rlhf_duplex.config import load_config
from rlhf_duplex.inputs import load_inputs
from rlhf_duplex.run import running
from rlhf_duplex.run_folder import prepare_run_dir

AXIS = """
import numpy as np

from rewards import RewardAxis, Score


class Words(RewardAxis):
    name = "words"

    def score_episode(self, episode):
        inside = episode.text_tokens[episode.frame_mask(12.5)]
        return Score(float(np.mean(inside != 3)) + 0.001 * float(inside.mean()))
"""


def write_inputs(folder: Path, segments) -> None:
    """A manifest and an axis of one's own in a folder."""
    shortest = sorted(segments, key=lambda s: s.duration)[:2]
    write_manifest(
        folder / "segments.jsonl",
        [replace(s, start=s.start, end=s.start + 1.6, events={}, axis="pause_handling") for s in shortest],
    )
    (folder / "words.py").write_text(AXIS)


def options(folder: Path, run_dir: Path, **overrides) -> list[str]:
    """Of a small run, as arguments of the command line."""
    found = {
        "run_dir": run_dir,
        "segments": folder / "segments.jsonl",
        "trainer.updates": 2,
        "trainer.groups": 2,
        "trainer.group_size": 2,
        "trainer.minibatch": 2,
        "trainer.microbatch": 1,
        "rollout.batch_size": 2,  # wherever they are played: another number of dialogues at once rounds otherwise
        "optimiser.learning_rate": 1e-4,
        "optimiser.warmup_updates": 0,
        "context.lead_in": 0.16,
        "context.probability": 0,
        "detector.name": "energy",
        "sampling.text_temperature": 1.5,
        "rewards.words.target": folder / "words.py",
        "checkpointing.every": 2,
        "evaluation.limit": 1,
        "evaluation.episodes": 1,
        "cluster.timeout": 120,
        "cluster.start_timeout": 240,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"{key}={value}" for key, value in found.items()]


def updates(folder: Path, run_dir: Path, accident=None, **overrides) -> list[dict]:
    """The updates of a run, without its evaluations; gives its metrics without what no two runs share.

    `accident` is called with the trainer before each step.
    """
    config = load_config(None, options(folder, run_dir, **overrides))
    inputs = load_inputs(config)
    with running(config, inputs, prepare_run_dir(config), Console(quiet=True)) as trainer:
        trainer.begin()
        if accident is not None:
            step = trainer.step

            def step_with_accident():
                accident(trainer)
                return step()

            trainer.step = step_with_accident
        trainer.run()
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without times and what the cluster says of itself."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "audio_seconds_per", "cluster/"))}
        for line in lines
    ]
