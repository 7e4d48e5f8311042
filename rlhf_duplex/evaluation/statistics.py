"""Bootstrap intervals and permutation tests. The unit is the segment: episodes of one segment are averaged first."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean with its 95 % interval over `n` segments."""

    mean: float
    low: float
    high: float
    n: int


LEVEL = 0.05
"""Below it a difference is beyond chance."""


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


class Difference(NamedTuple):
    """A mean difference with its 95 % bootstrap interval over `n` segments, and p of `permutation_test`."""

    mean: float
    low: float
    high: float
    n: int
    p: float

    @property
    def clear(self) -> bool:
        """Whether it is beyond chance: the interval leaves out 0, and p is below `LEVEL`.

        The interval alone is too narrow over few segments: of 5 to 10 it leaves out 0 for one pair of equal policies in
        six to nine. The test alone may call what the interval, which a reader sees, does not.
        """
        return not self.low <= 0 <= self.high and self.p < LEVEL


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> Difference | None:
    """After minus before over the segments that both have; None where none is shared.

    The two played the same user: resampling the differences leaves out what differs between segments.
    """
    differences = _differences(before, after)
    return difference_of(differences) if len(differences) else None


def paired_interval(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate | None:
    """The mean and interval of `paired_difference` without its test, which takes most of the time."""
    differences = _differences(before, after)
    return bootstrap_interval(differences.tolist()) if len(differences) else None


def difference_of(differences: Sequence[float] | np.ndarray) -> Difference:
    """The mean of paired differences, one a segment, at least one."""
    table = np.asarray(differences, dtype=float)
    return Difference(*bootstrap_interval(table.tolist()), _permutation_p(table))


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> np.ndarray:
    """After minus before, `(n,)`, of the segments for which both have a number."""
    differences = np.array([after[segment] - before[segment] for segment in before if segment in after], dtype=float)
    return differences[np.isfinite(differences)]


class Permutation(NamedTuple):
    """Whether two systems differ: mean difference and two-sided p over `n` shared segments."""

    difference: float
    p: float
    n: int


def can_tell(segments: int) -> bool:
    """Whether `permutation_test` over so many segments can give a p below `LEVEL` at all: its least is 2 / 2^n."""
    return 2 * 0.5**segments < LEVEL


def permutation_test(
    before: Mapping[str, float], after: Mapping[str, float], draws: int = 10000, seed: int = 0
) -> Permutation | None:
    """Paired permutation test of "both are the same": on each segment the two are swapped by a coin.

    The p-value is the share of swaps whose mean difference is at least as far from 0 as the one found. Up to
    `log2(draws)` segments all swaps are gone through; beyond, `draws` random ones, the one found counted among them,
    so that p is never 0 and the test never calls equal systems different more often than it says (Phipson and Smyth,
    2010). Made for small n and values of any distribution, where a bootstrap interval is too narrow.

    Args:
        before, after: a value a segment; segments that only one has, or has no number for, are left out.
        draws: random swaps.
        seed: of the swaps; the same values always give the same p.

    Returns:
        None where no segment is shared.
    """
    differences = _differences(before, after)
    if not len(differences):
        return None
    return Permutation(float(differences.mean()), _permutation_p(differences, draws, seed), len(differences))


def _permutation_p(differences: np.ndarray, draws: int = 10000, seed: int = 0) -> float:
    moving = differences[differences != 0]  # swapping equal values changes nothing
    # Sums in different orders differ by rounding: a swap that gives the same must count as at least as far.
    bound = abs(float(moving.sum())) - 1e-9 * float(np.abs(moving).sum())
    if 2 ** len(moving) <= draws:
        swaps = np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1
        return float(np.mean(np.abs((1 - 2 * swaps) @ moving) >= bound))
    rng = np.random.default_rng(seed)
    sums = np.concatenate([_swapped(moving, rng, size) for size in _parts(draws)])
    return float((1 + np.sum(np.abs(sums) >= bound)) / (draws + 1))


def _parts(draws: int, size: int = 1000) -> list[int]:
    """`draws` in parts that bound the memory of a test over many segments."""
    return [min(size, draws - start) for start in range(0, draws, size)]


def _swapped(differences: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    signs = 1 - 2 * rng.integers(2, size=(count, len(differences)), dtype=np.int8)
    return signs @ differences


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for so many tests at once (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
