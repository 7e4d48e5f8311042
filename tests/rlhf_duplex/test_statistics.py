"""Bootstrap intervals: what must hold of them whatever the values, and how often they hold the truth."""

import math

import numpy as np
import pytest

from rlhf_duplex.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    permutation_test,
    segment_means,
)


def test_episodes_of_a_segment_are_averaged_first():
    # a: (1 + 0) / 2 = 0.5; b: 1. The mean over segments is 0.75, that over episodes 2/3.
    means = segment_means([1.0, 1.0, 0.0], ["a", "b", "a"])
    assert means == {"a": 0.5, "b": 1.0}
    assert bootstrap_interval(list(means.values())).mean == 0.75


def test_interval_holds_the_mean_and_is_the_same_twice():
    values = np.random.default_rng(1).normal(2, 3, 40)
    first, second = bootstrap_interval(values), bootstrap_interval(values)
    assert first == second
    assert first.low < first.mean < first.high
    assert first.n == 40
    assert first.mean == pytest.approx(values.mean())
    # The standard error of the mean is s / sqrt(40); a 95 % interval is 3.92 of them wide.
    assert first.high - first.low == pytest.approx(3.92 * values.std() / np.sqrt(40), rel=0.1)


def test_more_confidence_is_wider():
    values = np.random.default_rng(2).random(30)
    narrow, wide = (bootstrap_interval(values, confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_degenerate_values():
    assert bootstrap_interval([0.3]) == (0.3, 0.3, 0.3, 1)
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0, 2.0, 5)
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval([])


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng = np.random.default_rng(3)
    found = [bootstrap_interval(rng.exponential(1.0, 60), draws=500, seed=i) for i in range(400)]
    covered = np.mean([e.low <= 1.0 <= e.high for e in found])
    # A percentile bootstrap of 60 skewed values covers somewhat less than 95 %; the error of 400 trials is 1.2 %.
    assert 0.90 <= covered <= 0.98


def test_paired_difference_leaves_out_what_differs_between_segments():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 10, 50)
    before = {f"s{i}": value for i, value in enumerate(hard)}
    after = {
        f"s{i}": value + 0.5 + noise for i, (value, noise) in enumerate(zip(hard, rng.normal(0, 0.1, 50), strict=True))
    }
    difference = paired_difference(before, after)
    assert 0.4 < difference.low < difference.mean < difference.high < 0.6
    # Unpaired, the two intervals overlap by far.
    assert bootstrap_interval(list(before.values())).high > bootstrap_interval(list(after.values())).low


def test_only_shared_segments_are_compared():
    # a is gone after: only b (1 -> 3) and c (5 -> 6) count, mean change 1.5.
    difference = paired_difference({"a": 0.0, "b": 1.0, "c": 5.0}, {"b": 3.0, "c": 6.0, "d": 9.0})
    assert (difference.mean, difference.n) == (1.5, 2)
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def named(values):
    return {f"s{i}": float(value) for i, value in enumerate(values)}


def test_permutation_test_by_hand():
    # Differences 1, 2, 3: of the 8 signs only +++ and --- give a mean of 2 or further from 0: p = 2 / 8.
    test = permutation_test(named([0, 0, 0]), named([1, 2, 3]))
    assert test == (2.0, 0.25, 3)
    # Differences 1, -1: every sign pattern gives 0, 0, 2 or -2; the one found is 0, so all are at least as far.
    assert permutation_test(named([0, 1]), named([1, 0])) == (0.0, 1.0, 2)
    # A difference of 0 says nothing: as the first case, over four segments.
    assert permutation_test(named([0, 0, 0, 5]), named([1, 2, 3, 5])) == (1.5, 0.25, 4)
    assert permutation_test(named([1.0]), {"other": 2.0}) is None
    assert permutation_test(named([4.0] * 30), named([4.0] * 30)) == (0.0, 1.0, 30)


def test_what_is_no_number_is_left_out():
    after = named([1, 2, math.nan, 3])
    assert permutation_test(named([0, 0, 0, 0]), after) == (2.0, 0.25, 3)
    assert paired_difference(named([0, 0, 0, 0]), after).mean == 2.0
    assert permutation_test(named([0]), named([math.nan])) is None
    assert paired_difference(named([math.nan]), named([0])) is None


def test_drawn_swaps_agree_with_all_swaps():
    rng = np.random.default_rng(0)
    before, after = named(rng.normal(0, 1, 12)), named(rng.normal(0.5, 1, 12))
    exact, drawn = (permutation_test(before, after, draws=draws).p for draws in (4096, 4095))
    assert exact == pytest.approx(drawn, abs=0.03)
    assert permutation_test(before, after, draws=4095) == permutation_test(before, after, draws=4095)


@pytest.mark.parametrize("kind", ["normal", "share", "latency"])
def test_equal_systems_are_not_called_different(kind):
    """200 pairs of equal checkpoints, 30 segments: at most 5 % of them may have p < 0.05 (wrong by chance alone)."""
    draw = {
        "normal": lambda rng: rng.normal(0, 1, 30),
        "share": lambda rng: rng.integers(2, size=30),
        "latency": lambda rng: rng.exponential(0.5, 30),
    }[kind]
    rng = np.random.default_rng(5)
    wrong = 0
    for seed in range(200):
        hard = rng.normal(0, 3, 30)  # what both have in common
        p = permutation_test(named(hard + draw(rng)), named(hard + draw(rng)), draws=999, seed=seed).p
        wrong += p < 0.05
    assert wrong / 200 <= 0.05


def test_different_systems_are_told_apart():
    rng = np.random.default_rng(6)
    found = 0
    for seed in range(50):
        hard = rng.normal(0, 3, 30)
        after = named(hard + 0.8 + rng.normal(0, 1, 30))
        found += permutation_test(named(hard + rng.normal(0, 1, 30)), after, draws=999, seed=seed).p < 0.05
    # Differences of mean 0.8 and deviation sqrt 2 over 30: 3.1 standard errors, power about 0.85.
    assert found >= 35


def test_holm_by_hand():
    # In order 0.01, 0.02, 0.04: times 3, 2, 1 gives 0.03, 0.04, 0.04; never below one before it.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_counts_the_swap_that_was_found():
    # 40 segments, each 1 better: no drawn swap comes near, and p is 1 / (999 + 1), not 0.
    before, after = ({f"s{i}": float(v) for i in range(40)} for v in (0, 1))
    assert permutation_test(before, after, draws=999).p == pytest.approx(1 / 1000)
