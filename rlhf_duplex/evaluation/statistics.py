"""Bootstrap intervals. The unit is the segment: episodes of one segment are averaged first."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean with its 95 % interval over `n` segments."""

    mean: float
    low: float
    high: float
    n: int


def segment_means(values: Sequence[float], segments: Sequence[str]) -> dict[str, float]:
    """The mean of each segment's values, in the order in which segments first appear."""
    grouped: dict[str, list[float]] = {}
    for value, segment in zip(values, segments, strict=True):
        grouped.setdefault(segment, []).append(float(value))
    return {segment: float(np.mean(found)) for segment, found in grouped.items()}


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval.

    Args:
        values: one a segment, at least one.
        confidence: of the interval.
        draws: resamples.
        seed: of the resampling; the same values always give the same interval.

    Raises:
        ValueError: no value.
    """
    table = np.asarray(values, dtype=float)
    if table.size == 0:
        raise ValueError("no value to estimate a mean from")
    rng = np.random.default_rng(seed)
    means = table[rng.integers(len(table), size=(draws, len(table)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(table.mean()), float(low), float(high), len(table))


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate | None:
    """After minus before over the segments that both have, with a paired bootstrap interval; None where none is shared.

    The two played the same user: resampling the differences leaves out what differs between segments.
    """
    shared = [segment for segment in before if segment in after]
    if not shared:
        return None
    return bootstrap_interval([after[segment] - before[segment] for segment in shared])
