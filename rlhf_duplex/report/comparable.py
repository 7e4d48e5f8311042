"""What of several runs can be held against each other, and what a page says of the rest."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from envs.errors import InputError
from rlhf_duplex.report.labels import axis_title
from rlhf_duplex.report.runs import Comparison, Result, mean_of


def scored_otherwise(results: Iterable[Result], others: Iterable[Result]) -> set[str]:
    """The axes whose reward some of `results` measured with other options than some of `others`.

    A result that has no reward of an axis, or does not say what rewards were made of, says nothing of that axis: to
    lack it is not to score it otherwise.
    """
    mine, theirs = _option_sets(results), _option_sets(others)
    return {axis for axis in mine if any(a != b for a in mine[axis] for b in theirs.get(axis, []))}


def mixed_rewards(comparison: Comparison) -> set[str]:
    """The axes whose reward the finished runs measured with different options: no two numbers on one scale."""
    sets = _option_sets(run.after for run in comparison.finished)
    return {axis for axis, found in sets.items() if len(found) > 1}


def _option_sets(results: Iterable[Result]) -> dict[str, list[Any]]:
    """By axis, the different options that results which have its reward measured it with."""
    sets: dict[str, list[Any]] = {}
    for result in results:
        if result is None or result.get("rewards") is None:
            continue
        for axis in result["axes"]:
            if mean_of(result, axis, "reward") is None:
                continue
            options, found = result["rewards"].get(axis), sets.setdefault(axis, [])
            if options not in found:
                found.append(options)
    return sets


def played_segments(result: Result) -> set[str]:
    """The segments that a result has any value of."""
    axes = (result or {}).get("segments", {})
    return {segment for metrics in axes.values() for column in metrics.values() for segment in column}


def on_shared_segments(comparison: Comparison) -> Comparison:
    """The comparison with all results over the segments that every finished run played.

    Means over different segments differ by what was played. A metric that exists on a part of the segments only (a
    latency: the turns that were taken) stays over what is left of its own.

    Raises:
        InputError: the runs played different segments, and none that all played.
    """
    played = [played_segments(run.after) for run in comparison.finished]
    shared = set.intersection(*played)
    if all(found == shared for found in played):
        return comparison
    if not shared:
        raise InputError(f"the runs of {comparison.title} share no held-out segment: there is nothing to compare")
    runs = [replace(r, after=_only(r.after, shared), before=_only(r.before, shared)) for r in comparison.runs]
    return replace(comparison, runs=tuple(runs))


def _only(result: Result, kept: set[str]) -> Result:
    """A result over the segments `kept`: their values, and means over them."""
    if result is None:
        return None
    segments: dict[str, dict[str, dict[str, float]]] = {}
    for axis, metrics in result.get("segments", {}).items():
        for metric, column in metrics.items():
            left = {segment: value for segment, value in column.items() if segment in kept and np.isfinite(value)}
            if left:
                segments.setdefault(axis, {})[metric] = left
    axes = {
        axis: {metric: {"mean": float(np.mean(list(column.values())))} for metric, column in metrics.items()}
        for axis, metrics in segments.items()
    }
    return {**result, "segments": segments, "axes": axes}


def lead_ins(comparison: Comparison) -> list[float]:
    """The lead-ins (s) that the finished runs were measured with, each once."""
    found = {(run.after or {}).get("lead_in_seconds") for run in comparison.finished}
    return sorted(seconds for seconds in found if seconds is not None)


def comparison_notes(comparison: Comparison) -> list[str]:
    """What a reader must know of the figures, a sentence each; `comparison` with its results as they were read."""
    notes = []
    played = [played_segments(run.after) for run in comparison.finished]
    shared, fewest, most = len(set.intersection(*played)), min(map(len, played)), max(map(len, played))
    if shared < most:
        counts = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        notes.append(
            f"The runs played different held-out segments ({counts} each): every figure here is over the {shared} that "
            "all of them played."
        )
    if len(lead_ins(comparison)) > 1:
        notes.append("The runs were measured with different lead-ins, which alone moves these figures.")
    mixed = mixed_rewards(comparison)
    if mixed:
        names = ", ".join(axis_title(axis).lower() for axis in sorted(mixed))
        notes.append(
            f"Not all runs scored the reward of {names} with the same options: it is held against the baseline only "
            "where both scored it alike, and left out of everything else on this page."
        )
    return notes
