"""PPO's mathematics, worked out by hand."""

import math

import pytest
import torch

from rlhf_duplex.algorithms.values import (
    batch_rewards,
    explained_variance,
    generalised_advantages,
    value_loss,
    whitened_frames,
)

NAN = math.nan


def test_advantages_by_hand():
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0, 9.0], [0.5, 0.5, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
    advantages, returns = generalised_advantages(torch.tensor([4.0, -1.0]), values, mask, gamma=0.5, lam=0.5)
    # Row 1: last 4 - 3 = 1; before it 0.5*3 - 2 + 0.25*1 = -0.25; first 0.5*2 - 1 + 0.25*(-0.25) = -0.0625.
    # Row 2: last -1 - 0.5 = -1.5; before it 0.5*0.5 - 0.5 + 0.25*(-1.5) = -0.625.
    expected = torch.tensor([[0, -0.0625, -0.25, 1, 0], [-0.625, -1.5, 0, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_with_lambda_one_the_return_is_the_reward():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, generator=generator)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :3] = False
    rewards = torch.tensor([1.0, -2.0, 0.5])
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns[mask], rewards[:, None].expand(3, 7)[mask])
    torch.testing.assert_close(advantages[mask], (rewards[:, None] - values)[mask])


def test_padding_that_is_not_a_number_stays_outside():
    values = torch.tensor([[NAN, 1.0, NAN]])
    mask = torch.tensor([[False, True, False]])
    advantages, returns = generalised_advantages(torch.tensor([3.0]), values, mask)
    assert advantages.tolist() == [[0.0, 2.0, 0.0]]
    assert returns.tolist() == [[0.0, 3.0, 0.0]]


def test_rewards_of_axes():
    rewards = {"a": torch.tensor([[1.0, 3.0], [NAN, NAN]]), "b": torch.tensor([[NAN, 5.0], [5.0, 5.0]])}
    weights = {"a": 2.0, "b": 1.0}
    assert batch_rewards(rewards, weights, standardise=False).tolist() == [2.0, 11.0, 5.0, 5.0]
    # a: mean 2, std 1; b has no spread.
    expected = torch.tensor([-2.0, 2.0, 0.0, 0.0]) / 1.0001
    torch.testing.assert_close(batch_rewards(rewards, weights), expected)
    with pytest.raises(ValueError, match="no rewards"):
        batch_rewards({}, {})


def test_whitened_frames():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    white = whitened_frames(torch.tensor([[1.0, 3.0, 99.0], [1.0, 3.0, 99.0]]), mask)
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]] * 2) / 1.0001)


def test_value_loss_by_hand():
    old = torch.tensor([[0.0, 0.0, 7.0]])
    mask = torch.tensor([[True, True, False]])
    # First frame: 1 is clipped to 0.2, errors (1-2)^2 = 1 and 1.8^2 = 3.24; second: 0.1 is near, (0.1-0)^2 = 0.01.
    values, returns = torch.tensor([[1.0, 0.1, NAN]]), torch.tensor([[2.0, 0.0, 0.0]])
    assert value_loss(values, old, returns, mask, clip=0.2).item() == pytest.approx(0.5 * (3.24 + 0.01) / 2)
    assert value_loss(values, old, returns, mask, clip=0.0).item() == pytest.approx(0.5 * (1.0 + 0.01) / 2)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns.clone(), returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0.0
