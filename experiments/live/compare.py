"""Train by replay and live, and hold base, both against each other in the same live dialogues.

The unit of the tests is the dialogue; seeds are shown one by one and pooled, a dialogue's mean over seeds against the
base on the same dialogue.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.checkpoint import last_checkpoint
from rlhf_duplex.cli import main as command
from rlhf_duplex.config import load_config
from rlhf_duplex.evaluation.effects import crossed_effect, paired_table
from rlhf_duplex.evaluation.live import run_live
from rlhf_duplex.evaluation.metrics import direction
from rlhf_duplex.evaluation.statistics import bootstrap_interval, holm, permutation_test
from rlhf_duplex.evaluation.systems import parse_systems
from rlhf_duplex.report.systems import build_systems_page

METRICS = ("seconds_lost", "gap", "answer_rate", "overlap", "barge_in_rate", "yield_rate", "stop_seconds")
CONFIGS = Path(__file__).parents[2] / "configs"
TRAINED_BY = {"replay": CONFIGS / "quickstart.yaml", "live": CONFIGS / "nano_live.yaml"}
SAME = ("trainer.updates=12", "optimiser.learning_rate=5e-4")  # of both, unless overridden
TINY = (
    "trainer.updates=1", "trainer.groups=2", "trainer.group_size=2", "trainer.minibatch=4", "trainer.passes=1",
    "live.dialogues=2", "live.seconds=6", "evaluation.limit=1", "evaluation.episodes=1",
)  # fmt: skip


def run(arguments: argparse.Namespace, console: Console) -> Path:
    """Train what is not trained yet, compare, and write `OUT/live.json` and the page `OUT/report.html`.

    Raises:
        InputError: a training failed, or there are not as many runs given as seeds.
    """
    for option, given in (("--replay", arguments.replay), ("--start", arguments.start)):
        if given and len(given) != len(arguments.seeds):
            raise InputError(f"{option} names {len(given)} runs for {len(arguments.seeds)} seeds: one a seed")
    kinds = [kind for kind in TRAINED_BY if kind == "replay" or not arguments.only_replay]
    runs: dict[str, Path] = {}
    for index, seed in enumerate(arguments.seeds):
        for kind in kinds:
            name = f"{kind}-{seed}"
            given = arguments.replay[index] if kind == "replay" and arguments.replay else None
            start = arguments.start[index] if arguments.start else arguments.checkpoint
            runs[name] = given or train(arguments, kind, seed, start, arguments.out / name)
    checkpoints = [f"base={arguments.checkpoint}", *(f"{name}={last_checkpoint(path)}" for name, path in runs.items())]
    limit = 2 if arguments.tiny else arguments.dialogues
    config = load_config(None, [f"evaluation.limit={limit}", f"live.seconds={6 if arguments.tiny else 30}"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = run_live(None, lambda: arguments.out, parse_systems(checkpoints), config, console)
    rows = comparisons(results, arguments.seeds, kinds)
    record = {"seeds": list(arguments.seeds), "dialogues": limit, "comparisons": rows}
    console.print(as_table(rows))
    console.print(f"wrote {build_systems_page(arguments.out, results)}", soft_wrap=True)
    path = arguments.out / "live.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path


def train(arguments: argparse.Namespace, kind: str, seed: int, start: Path | str, folder: Path) -> Path:
    """A run folder, trained from `start` unless it is already.

    Raises:
        InputError: the training did not come to its end, or what is there was trained from something else.
    """
    if (folder / "evaluation" / "after.json").is_file():
        begun = OmegaConf.load(folder / "config.yaml").checkpoint
        if str(begun) != str(start):
            raise InputError(f"{folder} was trained from {begun}, not from {start}: choose another --out")
        return folder
    options = [f"run_dir={folder}", f"seed={seed}", f"checkpoint={start}", *SAME]
    options += TINY if arguments.tiny else ()
    options += arguments.overrides
    options += ["resume=true"] if last_checkpoint(folder) is not None else []
    if command(["train", str(TRAINED_BY[kind]), *options]) or not (folder / "evaluation" / "after.json").is_file():
        raise InputError(f"the training in {folder} did not end: the same command goes on with it")
    return folder


def comparisons(
    results: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], kinds: Sequence[str] = tuple(TRAINED_BY)
) -> list[dict[str, Any]]:
    """For each metric: replay against base, live against base, live against replay, seeds pooled, p after Holm."""
    rows: list[dict[str, Any]] = []
    for metric in METRICS:
        columns = {"base": _column(results["base"], metric)}
        for kind in kinds:
            columns[kind] = _pooled([_column(results[f"{kind}-{seed}"], metric) for seed in seeds])
        for one, other in itertools.combinations(columns, 2):
            test = permutation_test(columns[one], columns[other])
            if test is None:
                continue
            each, against = (
                {seed: _column(results[name if name == "base" else f"{name}-{seed}"], metric) for seed in seeds}
                for name in (other, one)
            )
            crossed = crossed_effect(paired_table(each, against))
            rows.append(
                {
                    "metric": metric,
                    "before": one,
                    "after": other,
                    "means": {
                        name: bootstrap_interval(list(columns[name].values()))._asdict() for name in (one, other)
                    },
                    "each_seed": [bootstrap_interval(list(column.values())).mean for column in each.values() if column],
                    "difference": test.difference,
                    "better": (test.difference > 0) == (direction("live", metric) > 0),
                    "p": test.p,
                    "n": test.n,
                    # With seeds, too, taken as drawn from more of their kind.
                    "crossed": crossed and {"low": crossed.low, "high": crossed.high, "p": crossed.p},
                }
            )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def _column(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    return result["segments"].get("live", {}).get(metric, {})


def _pooled(columns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over seeds of each dialogue that every seed has a value of."""
    shared = [name for name in columns[0] if all(name in column for column in columns)]
    return {name: sum(column[name] for column in columns) / len(columns) for name in shared}


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The comparisons for the console."""
    table = Table(title="live dialogues, mean over seeds [95 % over dialogues]", title_justify="left")
    for title in ("metric", "before", "after", "each seed", "difference", "p (Holm)", ""):
        table.add_column(title)
    for row in rows:
        cells = [_shown(name, row["means"][name]) for name in (row["before"], row["after"])]
        word = "no change" if row["p_holm"] >= 0.05 else "better" if row["better"] else "worse"
        seeds = ", ".join(f"{mean:.2f}" for mean in row["each_seed"])
        table.add_row(row["metric"], *cells, seeds, f"{row['difference']:+.3f}", f"{row['p_holm']:.3f}", word)
    return table


def _shown(name: str, estimate: Mapping[str, float]) -> str:
    return f"{name} {estimate['mean']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
