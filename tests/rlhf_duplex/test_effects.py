"""Effects of conditions, on numbers worked out beside them."""

import numpy as np
import pytest
from scipy import stats

from rlhf_duplex.evaluation.effects import crossed_effect, dominated_by, paired_table, seed_interval


def test_differences_are_paired_by_seed_and_segment():
    condition = {0: {"a": 1.0, "b": 2.0, "c": 9.0}, 1: {"b": 5.0, "a": 3.0}, 7: {"a": 0.0}}
    baseline = {1: {"a": 1.0, "b": 1.0}, 0: {"b": 1.0, "a": 0.5, "c": 4.0}}
    # Seeds 0 and 1 are shared; segment c is missing in seed 1.
    assert paired_table(condition, baseline).tolist() == [[0.5, 1.0], [2.0, 4.0]]
    # No shared seed: means over seeds, segment by segment; a: (1 + 3) / 2 - 1 = 1, b: (2 + 5) / 2 - 1 = 2.5.
    assert paired_table({0: condition[0], 1: condition[1]}, {5: baseline[1]}).tolist() == [[1.0, 2.5]]
    assert paired_table({0: {"a": 1.0}}, {0: {"b": 1.0}}).shape == (1, 0)
    assert paired_table({}, baseline).shape == (0, 0)
    assert paired_table({0: {"a": 1.0, "b": float("nan")}}, {0: {"a": 0.5, "b": 1.0}}).tolist() == [[0.5]]


def test_one_seed_is_the_paired_t_test():
    differences = np.array([[0.5, 1.0, -0.25, 2.0, 0.75]])
    effect = crossed_effect(differences)
    found = stats.ttest_1samp(differences[0], 0.0)
    interval = found.confidence_interval(0.95)
    assert effect.p == pytest.approx(found.pvalue)
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high))
    assert effect[4:] == (1, 5, 1)
    assert crossed_effect(differences.T).p == pytest.approx(found.pvalue)


def test_seeds_and_segments_are_both_random():
    # Rows (seeds) have means 1 and 3, columns (segments) 1.5, 2, 2.5, the mean is 2.
    # A = 3 * ((1-2)^2 + (3-2)^2) / 1 = 6; B = 2 * (0.25 + 0 + 0.25) / 2 = 0.5.
    # What is left of [[1, 1, 1], [2, 3, 4]]: rows minus (row + column - mean) = [[.5, 0, -.5], [-.5, 0, .5]];
    # C = 4 * 0.25 / (1 * 2) = 0.5. Variance (6 + 0.5 - 0.5) / 6 = 1; freedom 36 / (36/1 + .25/2 + .25/2) = 36 / 36.25.
    effect = crossed_effect(np.array([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0]]))
    assert effect.mean == 2.0
    assert effect.p == pytest.approx(2 * stats.t.sf(2.0, 36 / 36.25))
    assert effect.high - effect.mean == pytest.approx(stats.t.ppf(0.975, 36 / 36.25))
    assert effect[4:] == (2, 3, 2)


def test_no_component_of_variance_is_negative():
    # Rows and columns have equal means: A = B = 0 are raised to C = 4 / (1 * 1) = 4; the variance is 4 / 4.
    effect = crossed_effect(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert effect.mean == 0
    assert effect.p == pytest.approx(1.0)
    assert effect.high == pytest.approx(stats.t.ppf(0.975, 1 / 3))  # 16 / (16 + 16 + 16)


def test_under_no_effect_one_in_twenty_is_below_five_percent():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(800):
        seeds, segments = rng.normal(0, 0.5, (3, 1)), rng.normal(0, 1.0, (1, 20))
        found.append(crossed_effect(seeds + segments + rng.normal(0, 1.0, (3, 20))).p < 0.05)
    assert 0.02 < np.mean(found) < 0.08


def test_differences_without_spread():
    assert crossed_effect(np.zeros((3, 5))).p == 1.0
    # Nothing to estimate a variance from: of the 2^5 signs that 5 segments may have, 2 are as far from 0.
    assert crossed_effect(np.full((1, 5), 0.4)).p == 2 / 2**5
    assert crossed_effect(np.full((3, 5), -1.0)).p == 2 / 2**5
    assert crossed_effect(np.full((3, 1), -1.0)).p == 2 / 2**3
    assert crossed_effect(np.zeros((1, 1))) is None
    assert crossed_effect(np.zeros((0, 0))) is None


def test_interval_over_seeds():
    # Mean 2, standard deviation 1, t(2) 4.303: 4.303 / sqrt(3) = 2.484.
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.484, 4.484, 3), abs=1e-3)
    assert seed_interval([4.0]) == (4.0, 4.0, 4.0, 1)
    with pytest.raises(ValueError, match="no value"):
        seed_interval([])


def test_domination():
    costs = {"a": (1.0, 4.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (1.0, 4.0), "e": (5.0, 5.0)}
    assert dominated_by(costs) == {"a": [], "b": [], "c": ["b"], "d": [], "e": ["a", "b", "c", "d"]}


def test_seeds_agree_with_a_mean_below_zero_too():
    assert crossed_effect(-np.array([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0]])).agreeing == 2
    assert crossed_effect(np.array([[1.0, 1.0, 1.0], [-2.0, -3.0, -4.0]])).agreeing == 1
