"""Effects of conditions against the baseline, in words, for a table."""

from collections.abc import Sequence
from typing import Any

from rlhf_duplex.evaluation.effects import Effect, crossed_effect, paired_table
from rlhf_duplex.evaluation.metrics import direction
from rlhf_duplex.evaluation.statistics import LEVEL, holm
from rlhf_duplex.report.comparable import scored_otherwise
from rlhf_duplex.report.labels import axis_title, interval, label, number
from rlhf_duplex.report.runs import Comparison

Metric = tuple[str, str]

MIN_SEGMENTS = 5  # of fewer, a variance says too little for a test
SCORED_OTHERWISE, TOO_FEW = "scored with other options", "too few segments"


def metric_title(metric: Metric) -> str:
    """`Turn-taking: latency`."""
    return f"{axis_title(metric[0])}: {label(*metric).name}"


def effect_rows(comparison: Comparison, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """A row a condition but the baseline, a cell a metric; p-values are corrected over the conditions of a metric.

    A cell has `missing`, why there is no test, or the effect in words.
    """
    base = {run.seed: run for run in comparison.of(comparison.baseline)}
    baseline = [run.after for run in base.values()]
    names = [name for name in comparison.conditions if name != comparison.baseline and comparison.of(name)]
    otherwise = {name: scored_otherwise([run.after for run in comparison.of(name)], baseline) for name in names}
    rows: list[dict[str, Any]] = [{"name": name, "cells": []} for name in names]
    for axis, metric in metrics:
        found: list[Effect | str] = []
        for name in names:
            if metric == "reward" and axis in otherwise[name]:
                found.append(SCORED_OTHERWISE)
                continue
            runs = {run.seed: run.column(axis, metric) for run in comparison.of(name)}
            table = paired_table(runs, {seed: run.column(axis, metric) for seed, run in base.items()})
            tested = crossed_effect(table) if table.shape[1] >= MIN_SEGMENTS else None
            found.append(tested or TOO_FEW)
        corrected = iter(holm([effect.p for effect in found if isinstance(effect, Effect)]))
        for row, effect in zip(rows, found, strict=True):
            if isinstance(effect, str):
                row["cells"].append({"missing": effect})
                continue
            cell = effect_cell(axis, metric, effect, next(corrected))
            if not any(run.seed in base for run in comparison.of(row["name"])):
                cell["seeds"] = "no seed in common: their spread is not in p"
            row["cells"].append(cell)
    return rows


def effect_cell(axis: str, metric: str, effect: Effect, p: float) -> dict[str, Any]:
    """An effect in words, with a p-value that may have been corrected."""
    unit, sign = label(axis, metric).unit, direction(axis, metric)
    clear = p < LEVEL
    word = ("changed" if sign == 0 else "better" if (effect.mean > 0) == (sign > 0) else "worse") if clear else ""
    return {
        "metric": (axis, metric),
        "mean": effect.mean,
        "difference": number(effect.mean, unit, signed=True),
        "interval": interval(effect.low, effect.high, unit, signed=True),
        "p": "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}",
        "seeds": f"{effect.agreeing} of {effect.seeds} seeds",
        "segments": f"{effect.segments} segments",
        "verdict": word,
    }
