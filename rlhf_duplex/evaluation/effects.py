"""Effects of conditions: paired by seed and segment, corrected for their number; and which of them dominate."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from rlhf_duplex.evaluation.statistics import Estimate

# Of one run and metric, the value of each segment.
Column = Mapping[str, float]


class Effect(NamedTuple):
    """A mean difference with its 95 % interval and p-value.

    Attributes:
        mean, low, high: of the difference.
        p: two-sided, of no difference.
        seeds, segments: that both have; the differences are paired by both.
        agreeing: seeds whose own mean difference has the sign of `mean`.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    segments: int
    agreeing: int


def paired_table(condition: Mapping[int, Column], baseline: Mapping[int, Column]) -> np.ndarray:
    """Differences `(seeds, segments)` over the seeds that both have and the segments for which all have a number.

    Where they share no seed, one row: the difference of each segment's means over the seeds.

    Args:
        condition, baseline: by seed, the value of each segment.
    """
    seeds = [seed for seed in condition if seed in baseline]
    kept = (seeds, seeds) if seeds or not (condition and baseline) else (list(condition), list(baseline))
    columns = [side[seed] for side, chosen in zip((condition, baseline), kept, strict=True) for seed in chosen]
    table = aligned(columns)
    table = table[:, np.isfinite(table).all(axis=0)]
    mine, theirs = table[: len(kept[0])], table[len(kept[0]) :]
    return mine - theirs if kept[0] is seeds else (mine.mean(axis=0) - theirs.mean(axis=0))[None]


def aligned(columns: Sequence[Column]) -> np.ndarray:
    """Columns as rows `(columns, segments)` over every segment that any of them has, NaN where one has no number."""
    places = {segment: place for place, segment in enumerate(dict.fromkeys(s for column in columns for s in column))}
    table = np.full((len(columns), len(places)), np.nan)
    for row, column in zip(table, columns, strict=True):
        row[[places[segment] for segment in column]] = np.array(list(column.values()), dtype=float)
    table[~np.isfinite(table)] = np.nan
    return table


def crossed_effect(differences: np.ndarray) -> Effect | None:
    """The mean of differences `(S seeds, N segments)`, with seeds and segments both drawn from more of their kind.

    The test of Clark (1973, quasi-F: "The language-as-fixed-effect fallacy"): with the mean squares of seeds A, of
    segments B and of what is left C, the variance of the mean is (A + B - C) / SN, with Satterthwaite's degrees of
    freedom; A and B are at least C (no component of variance is negative). With one seed (or one segment) it is the
    paired t-test over segments (over seeds).

    Where all differences are the same there is no spread to estimate a variance from, though a few segments may well
    agree by chance: p is that of the exact test which flips the signs of n segments (of one segment, seeds), 2^(1 - n).

    Returns:
        the effect; None where there are not at least two differences.
    """
    seeds, segments = differences.shape
    if seeds * segments < 2:
        return None
    mean = float(differences.mean())
    by_seed, by_segment = differences.mean(axis=1), differences.mean(axis=0)
    if min(seeds, segments) == 1:
        variance, freedom = float(differences.var(ddof=1)) / differences.size, float(differences.size - 1)
    else:
        rest = differences - by_seed[:, None] - by_segment[None, :] + mean
        c = float((rest**2).sum()) / ((seeds - 1) * (segments - 1))
        a = max(segments * float(by_seed.var(ddof=1)), c)
        b = max(seeds * float(by_segment.var(ddof=1)), c)
        variance = (a + b - c) / (seeds * segments)
        spread = a**2 / (seeds - 1) + b**2 / (segments - 1) + c**2 / ((seeds - 1) * (segments - 1))
        freedom = (a + b - c) ** 2 / spread if spread > 0 else 1.0
    agreeing = int((np.sign(by_seed) == np.sign(mean)).sum())
    if variance <= 1e-18:  # every difference is the same
        p = 1.0 if abs(mean) < 1e-12 else 2.0 ** (1 - (segments if segments > 1 else seeds))
        return Effect(mean, mean, mean, p, seeds, segments, agreeing)
    error = variance**0.5
    # What `stats.t.ppf` and `.sf` call, at a tenth of their time: a page tests thousands of pairs.
    half = float(special.stdtrit(freedom, 0.975)) * error
    p = float(2 * special.stdtr(freedom, -abs(mean) / error))
    return Effect(mean, mean - half, mean + half, p, seeds, segments, agreeing)


def seed_interval(values: Sequence[float]) -> Estimate:
    """Mean of one value a seed, with Student's 95 % interval; of one seed, that value alone.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value to estimate a mean from")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, mean, mean, 1)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half, len(values))


def dominated_by(costs: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """By name, those that are at least as good everywhere and better somewhere; the front has empty lists.

    Args:
        costs: by name, values of which lower is better, equally many for each.
    """
    table = {name: np.asarray(values, dtype=float) for name, values in costs.items()}

    def beats(theirs: np.ndarray, mine: np.ndarray) -> bool:
        return bool((theirs <= mine).all() and (theirs < mine).any())

    return {name: [other for other in table if beats(table[other], mine)] for name, mine in table.items()}
