"""Runs to compare: those of an ablation's folder, or any run folders, with what differs between them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from envs.errors import InputError
from rlhf_duplex.evaluation.effects import Column
from rlhf_duplex.evaluation.metrics import read_results

# As `evaluation.metrics.write_results` writes it; None where there is none.
Result = Mapping[str, Any] | None

# Keys that differ between any two runs without making them different conditions.
_NOT_CONDITIONS = (
    *("seed", "run_dir", "resume", "codes_cache", "trackers", "checkpointing.", "rollout.", "trainer.microbatch"),
    *("evaluation.before", "evaluation.episodes"),
)


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
        name: unique among the runs that are compared.
        condition, seed: what it belongs to.
        folder: its run folder.
        status: `done`, `failed`, `not run`...; why: of a failure; traceback: its last lines.
        after: its result, where it is finished; before: that of the policy it began from, where there is one.
    """

    name: str
    condition: str
    seed: int
    folder: Path
    status: str = "done"
    why: str = ""
    traceback: str = ""
    attempts: int = 1
    after: Result = None
    before: Result = None

    def column(self, axis: str, metric: str) -> Column:
        """The value of each segment after training; empty where it has none."""
        return column_of(self.after, axis, metric)

    def mean(self, axis: str, metric: str) -> float | None:
        """The mean over segments after training."""
        return mean_of(self.after, axis, metric)


def column_of(result: Result, axis: str, metric: str) -> Column:
    """The value of each segment in a result; empty where it has none."""
    return (result or {}).get("segments", {}).get(axis, {}).get(metric, {})


def mean_of(result: Result, axis: str, metric: str) -> float | None:
    """A metric of a result, or None where it has none."""
    estimate = (result or {}).get("axes", {}).get(axis, {}).get(metric)
    return None if estimate is None else float(estimate["mean"])


@dataclass(frozen=True)
class Comparison:
    """Runs and how to compare them.

    Attributes:
        title: of the page.
        runs: all; conditions: by their names in order, the value of every key that varies.
        baseline: the condition that the others are held against.
        metrics: `axis.metric` of the table of effects; empty: the usual ones.
        skipped: (condition, why) of what was left out.
        base: where the conditions begin, in words.
    """

    title: str
    runs: tuple[Run, ...]
    conditions: Mapping[str, Mapping[str, Any]]
    baseline: str
    metrics: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    base: str = ""

    @property
    def finished(self) -> list[Run]:
        """The runs that have a result."""
        return [run for run in self.runs if run.after is not None]

    def of(self, condition: str) -> list[Run]:
        """The finished runs of a condition."""
        return [run for run in self.finished if run.condition == condition]


def is_ablation(folder: Path) -> bool:
    """Whether `rlhf-duplex ablate` wrote this folder."""
    return (folder / "ablation.json").is_file()


def read_ablation(folder: Path) -> Comparison:
    """The trials of an ablation's folder.

    Raises:
        InputError: it is no ablation's folder, or a file in it is damaged.
    """
    path = folder / "ablation.json"
    if not path.is_file():
        raise InputError(f"{folder} is no ablation's folder: it has no ablation.json")
    try:
        plan = json.loads(path.read_text())
        records = {row["name"]: _record(folder / "records" / f"{row['name']}.json") for row in plan["trials"]}
        runs = [
            read_run(folder / "trials" / row["name"], row["name"], row["condition"], row["seed"], records[row["name"]])
            for row in plan["trials"]
        ]
        return Comparison(
            title=folder.resolve().name,
            runs=tuple(runs),
            conditions={row["name"]: row["values"] for row in plan["conditions"]},
            baseline=plan["baseline"],
            metrics=tuple(plan["metrics"]),
            skipped=tuple((row["name"], row["why"]) for row in plan["skipped"]),
            base=plan["base"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): start the ablation again") from error


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def read_run(folder: Path, name: str, condition: str, seed: int, record: Mapping[str, Any] | None = None) -> Run:
    """A run folder as it stands.

    Raises:
        InputError: a result is damaged.
    """
    record = record or {}
    results = {}
    for stage in ("before", "after"):
        path = folder / "evaluation" / f"{stage}.json"
        results[stage] = read_results(path) if path.is_file() else None
    status = record.get("status", "")
    if results["after"]:
        status = "done"
    elif status in ("", "open", "done"):
        status = "interrupted" if folder.is_dir() else "not run"
    why = "" if results["after"] or not record.get("kind") else f"{record['kind']}: {record['why']}"
    return Run(
        name,
        condition,
        seed,
        folder,
        status,
        why,
        "" if results["after"] else record.get("traceback", ""),
        record.get("attempts", 0),
        results["after"],
        results["before"],
    )


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Any run folders. Runs that differ in nothing but their seed are one condition; the first run's is the baseline.

    Raises:
        InputError: a folder is not that of a finished run, or two runs are the same.
    """
    configs: list[dict[str, Any]] = []
    for folder in folders:
        path = folder / "config.yaml"
        if not folder.is_dir() or not path.is_file():
            raise InputError(f"{folder} is no run folder: it has no config.yaml")
        if not (folder / "evaluation" / "after.json").is_file():
            raise InputError(f"{folder} has no evaluation/after.json: only finished runs can be compared")
        try:
            configs.append(leaves(OmegaConf.to_container(OmegaConf.load(path))))
        except Exception as error:  # YAML's and OmegaConf's errors share no base of their own
            raise InputError(f"{path} is not a configuration ({' '.join(str(error).split())})") from error
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("the same run is given twice")
    varied = varied_keys(configs)
    differences = [{key: config.get(key) for key in varied} for config in configs]
    names = _names(folders)
    groups: dict[str, list[int]] = {}
    for index, difference in enumerate(differences):
        groups.setdefault(json.dumps(difference, sort_keys=True, default=str), []).append(index)
    runs: list[Run | None] = [None] * len(folders)
    conditions = {}
    for indices in groups.values():
        condition = names[indices[0]]
        conditions[condition] = differences[indices[0]]
        seeds = [int(configs[index].get("seed", 0)) for index in indices]
        if len(set(seeds)) < len(seeds):
            twice = [str(folders[i]) for i in indices if seeds.count(int(configs[i].get("seed", 0))) > 1]
            raise InputError(f"{' and '.join(twice[:2])} have the same configuration and seed: give one of them")
        for index, seed in zip(indices, seeds, strict=True):
            runs[index] = read_run(folders[index], names[index], condition, seed)
    found = tuple(run for run in runs if run is not None)
    return Comparison(", ".join(names[:3]) + (" and more" if len(names) > 3 else ""), found, conditions, names[0])


def leaves(nested: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as `{dotted.key: value}`; lists are values."""
    if not isinstance(nested, Mapping):
        return {}
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def varied_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that make conditions and whose values are not all the same."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if not key.startswith(_NOT_CONDITIONS)
        and len({json.dumps(config.get(key), default=str) for config in configs}) > 1
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
