"""Runs by their command line, each once, and tables of what they measured."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.episode import Episode
from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.metrics import read_results, verdict
from rlhf_duplex.evaluation.statistics import Difference, difference_of
from rlhf_duplex.tracking import read_metrics


def seeds(text: str) -> list[int]:
    """`0,1,2`."""
    return [int(part) for part in text.split(",")]


def run_once(arguments: Sequence[str], done: Path) -> None:
    """Run a command of `rlhf-duplex` unless `done` is there, going on where it was interrupted.

    Raises:
        InputError: it ended with an error, which it printed.
    """
    if done.exists():
        print(f"kept {done}")
        return
    run_dir = next((Path(a.partition("=")[2]) for a in arguments if a.startswith("run_dir=")), None)
    resumed = run_dir is not None and any((run_dir / "checkpoints").glob("step_*"))
    code = main([*arguments, "resume=true"] if resumed else list(arguments))
    if code:
        raise InputError(f"rlhf-duplex {' '.join(arguments)} ended with code {code}")


def paired(befores: Iterable[Path], afters: Iterable[Path], axis: str, metric: str) -> Difference | None:
    """After minus before over the segments of all seeds, each a unit of its own; None where none is shared."""
    differences: list[float] = []
    for before, after in zip(befores, afters, strict=True):
        tables = [read_results(p).get("segments", {}).get(axis, {}).get(metric, {}) for p in (before, after)]
        differences += [tables[1][segment] - tables[0][segment] for segment in tables[0] if segment in tables[1]]
    return difference_of(differences) if differences else None


def mean_of(paths: Iterable[Path], axis: str, metric: str) -> float:
    """Of a metric over the seeds; NaN where none has it."""
    found = [read_results(path)["axes"].get(axis, {}).get(metric) for path in paths]
    values = [estimate["mean"] for estimate in found if estimate]
    return float(np.mean(values)) if values else float("nan")


def held_out_accuracy(run_dir: Path, kind: str = "") -> float:
    """Of the held-out pairs at the last evaluation, all or of a kind; NaN where there is none."""
    key = "eval_rewards/accuracies" + (f"/{kind}" if kind else "")
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if key in line]
    return float(lines[-1][key]) if lines else float("nan")


def talk_over(run_dir: Path, stage: str) -> float:
    """Seconds of agent speech over user speech, a scored second, in the kept episodes of `evaluation/STAGE`."""
    overlap = seconds = 0.0
    for path in sorted((run_dir / "evaluation" / stage).glob("*/episode.json")):
        episode = Episode.load(path.parent)
        pairs = ((a, u) for a in episode.scored_agent_speech for u in episode.scored_user_speech)
        overlap += sum(a.overlap(u) for a, u in pairs)
        seconds += episode.duration - episode.scored_from
    return overlap / seconds if seconds else float("nan")


def reply_length(run_dir: Path, stage: str) -> float:
    """Mean words an episode in the kept episodes of `evaluation/STAGE` (all, with `evaluation.episodes=1000`)."""
    counts = []
    for path in sorted((run_dir / "evaluation" / stage).glob("*/episode.json")):
        counts.append(len(Episode.load(path.parent).text.split()))
    return float(np.mean(counts)) if counts else float("nan")


def cell(difference: Difference | None, axis: str, metric: str) -> str:
    """`+0.12 [+0.05, +0.20] better`."""
    if difference is None:
        return "-"
    word = verdict(axis, metric, difference)
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] {word}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Beside the table, for who wants the numbers."""
    write_text(path, json.dumps(record, indent=1) + "\n")
