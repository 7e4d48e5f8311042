import math

import pytest
import torch

from rlhf_duplex.algorithms.advantages import combine_advantages, standardise, whitened

NAN = math.nan


def test_standardise_by_hand():
    # Mean 2, population variance (1 + 0 + 1) / 3, sample variance 1.
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    step = 1 / (math.sqrt(2 / 3) + 1e-4)
    advantages, equal = standardise(rewards)
    torch.testing.assert_close(advantages, torch.tensor([[-step, 0.0, step]]))
    assert equal.tolist() == [False]
    advantages, _ = standardise(rewards, unbiased=True)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0]]) / 1.0001)


def test_standardise_leaves_missing_scores_out():
    # 1 and 3 alone: mean 2, population std 1. A group of equal scores, of one score, and of none.
    rewards = torch.tensor([[1.0, NAN, 3.0], [0.1, 0.1, 0.1], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    advantages, equal = standardise(rewards)
    torch.testing.assert_close(advantages[0], torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)
    assert (advantages[1:] == 0).all()
    assert equal.tolist() == [False, True, True, False]


def test_equal_rewards_give_exactly_zero_in_spite_of_rounding():
    advantages, equal = standardise(torch.full((1, 16), 0.1))
    assert (advantages == 0).all()
    assert equal.all()


def test_per_axis_gives_axes_of_any_scale_their_weight():
    # Both axes have two values, so they standardise to +-1 (but for eps); b, a thousand times wider, has half the
    # weight: 1 + 0.5, -1 + 0.5, ...
    rewards = {
        "a": torch.tensor([[1.0, 0.0, 1.0, 0.0]]),
        "b": torch.tensor([[1000.0, 1000.0, 0.0, 0.0]]),
    }
    result = combine_advantages(rewards, {"a": 1.0, "b": 0.5})
    torch.testing.assert_close(result.advantages, torch.tensor([[1.5, -0.5, 0.5, -1.5]]), atol=1e-3, rtol=0)
    assert result.share == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=1e-3)
    assert result.mean == {"a": 0.5, "b": 500.0}
    assert result.std == {"a": 0.5, "b": 500.0}
    assert result.frac_zero_std == {"a": 0.0, "b": 0.0}


def test_weighted_sum_lets_the_wide_axis_decide():
    # Sums 3, 1, 2, 0 (2 a + b): mean 1.5, population std sqrt(1.25).
    rewards = {"a": torch.tensor([[1.0, 0.0, 1.0, 0.0]]), "b": torch.tensor([[1.0, 1.0, 0.0, 0.0]])}
    result = combine_advantages(rewards, {"a": 2.0, "b": 1.0}, method="weighted_sum")
    expected = (torch.tensor([[3.0, 1.0, 2.0, 0.0]]) - 1.5) / (math.sqrt(1.25) + 1e-4)
    torch.testing.assert_close(result.advantages, expected)
    assert result.share == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_groups_of_different_axes_in_one_batch():
    # Group 0 has only axis a, group 1 only axis b, where all are equal; nothing of axis c.
    rewards = {
        "a": torch.tensor([[0.0, 2.0], [NAN, NAN]]),
        "b": torch.tensor([[NAN, NAN], [-1.0, -1.0]]),
        "c": torch.full((2, 2), NAN),
    }
    for method in ("per_axis", "weighted_sum"):
        result = combine_advantages(rewards, {"a": 1.0, "b": 1.0, "c": 1.0}, method)
        expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
        torch.testing.assert_close(result.advantages, expected, atol=2e-4, rtol=0)
        assert result.frac_zero_std == {"a": 0.0, "b": 1.0}  # b's share of its own groups, not of all
        assert result.mean == {"a": 1.0, "b": -1.0}
        assert result.share == {"a": 1.0, "b": 0.0}


def test_a_missing_score_moves_nothing_in_the_weighted_sum():
    # b judges two of three: -1 and +1 about its mean; the third episode keeps what a says of it, 0 about a's mean.
    rewards = {"a": torch.tensor([[1.0, 1.0, 1.0]]), "b": torch.tensor([[3.0, 5.0, NAN]])}
    result = combine_advantages(rewards, {"a": 1.0, "b": 1.0}, "weighted_sum")
    expected = torch.tensor([[-1.0, 1.0, 0.0]]) / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(result.advantages, expected)


def test_whitening_by_hand():
    # Without the masked one: mean 0, population std 2.
    values, mask = torch.tensor([[-2.0, 2.0], [2.0, -2.0], [9.0, 9.0]]), torch.ones(3, 2, dtype=torch.bool)
    mask[2] = False
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    torch.testing.assert_close(whitened(values, mask), expected, atol=1e-4, rtol=0)
    assert (whitened(torch.zeros(2, 2)) == 0).all()
    result = combine_advantages({"a": torch.tensor([[0.0, 1.0], [3.0, 3.0]])}, {"a": 7.0}, whiten=True)
    # Contributions -7, 7, 0, 0: population std 7 / sqrt(2).
    half = math.sqrt(2)
    torch.testing.assert_close(result.advantages, torch.tensor([[-half, half], [0, 0]]), atol=1e-3, rtol=0)


def test_wrong_arguments_are_refused():
    ok = {"a": torch.zeros(1, 2)}
    for rewards, weights, method, message in [
        ({}, {}, "per_axis", "no rewards"),
        (ok, {"a": 1.0}, "mean", "unknown method 'mean'"),
        (ok, {}, "per_axis", "no weight for axis 'a'"),
        (ok | {"b": torch.zeros(2, 1)}, {"a": 1.0, "b": 1.0}, "per_axis", "axes differ in shape"),
        ({"a": torch.zeros(4)}, {"a": 1.0}, "per_axis", r"axis 'a' must have the shape \(groups, G\)"),
        ({"a": torch.tensor([[math.inf, 0.0]])}, {"a": 1.0}, "per_axis", "must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            combine_advantages(rewards, weights, method)


def test_baselines_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0, NAN], [4.0, 4.0, 4.0, 4.0]])
    mean, _ = standardise(rewards, baseline="mean")
    assert torch.allclose(mean[0], torch.tensor([-2.0, -1.0, 3.0, 0.0]))  # Dr. GRPO: no division
    others, equal = standardise(rewards, baseline="leave_one_out")
    # RLOO: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    assert torch.allclose(others[0], torch.tensor([-3.0, -1.5, 4.5, 0.0]))
    assert others[1].tolist() == [0.0] * 4
    assert equal.tolist() == [False, True]
    for method in ("per_axis", "weighted_sum"):
        result = combine_advantages({"a": rewards}, {"a": 2.0}, method, baseline="leave_one_out")
        assert torch.allclose(result.advantages[0], 2 * others[0])
    with pytest.raises(ValueError, match="baseline"):
        combine_advantages({"a": rewards}, {"a": 1.0}, baseline="median")


def test_a_large_eps_lets_small_differences_count_for_little():
    hundredths = torch.tensor([[-0.40, -0.40, -0.40, -0.44], [-0.40, -0.40, -0.40, -4.40]])
    alike = combine_advantages({"turn": hundredths}, {"turn": 1.0}).advantages
    assert torch.allclose(alike[0], alike[1], atol=0.02)
    apart = combine_advantages({"turn": hundredths}, {"turn": 1.0}, eps={"turn": 0.3}).advantages
    assert apart[0, -1] == pytest.approx(-0.03 / (0.0003**0.5 + 0.3), rel=1e-4)
    assert apart[1, -1] == pytest.approx(-3.0 / (3.0**0.5 + 0.3), rel=1e-4)


def test_whitening_where_each_segment_has_an_axis_of_its_own():
    rewards = {"a": torch.tensor([[0.0, 2.0], [NAN, NAN]]), "b": torch.tensor([[NAN, NAN], [5.0, 1.0]])}
    result = combine_advantages(rewards, {"a": 1.0, "b": 1.0}, whiten=True)
    torch.testing.assert_close(result.advantages, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), atol=1e-3, rtol=0)
