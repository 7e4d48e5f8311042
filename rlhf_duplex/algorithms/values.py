"""What PPO adds to the policy loss: advantages over frames from a value function, and that function's own loss.

Shapes: `B` episodes, `T` frames. A mask `(B, T)` is True at the frames that count, a run of frames in each episode. The
reward of an episode comes with its last frame that counts.
"""

from collections.abc import Mapping

import torch

EPSILON = 1e-4


def batch_rewards(
    rewards: Mapping[str, torch.Tensor], weights: Mapping[str, float], standardise: bool = True
) -> torch.Tensor:
    """One reward `(B,)` an episode, `sum_k w_k r_k`, from those of all axes.

    Args:
        rewards: by axis, `(B,)` or `(groups, G)`, NaN where the axis has no score (it adds nothing then).
        weights: by axis.
        standardise: `(r_k - mean_k) / (std_k + 1e-4)` over the batch first: seconds, shares and penalties become
            comparable, and a value function begins at the mean. Nothing is carried from batch to batch.
    """
    total: torch.Tensor | float = 0.0
    for axis, values in rewards.items():
        values = values.double().reshape(-1)
        present = ~values.isnan()
        if standardise and present.any():
            mean, std = values[present].mean(), values[present].std(correction=0)
            values = (values - mean) / (std + EPSILON)
        total = total + weights[axis] * torch.where(present, values, 0.0)
    if isinstance(total, float):
        raise ValueError("no rewards to add up")
    return total.float()


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) with the reward at the end of an episode.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    V after the last frame is 0: the episode is over.

    Args:
        rewards: `(B,)`.
        values: `(B, T)` of the state before each frame's token is drawn.
        mask: `(B, T)` bool.
        gamma, lam: discount and lambda, a frame.

    Returns:
        Advantages `(B, T)` and returns `(B, T)` (advantage + value, what the value function is taught); both 0 outside
        the mask.
    """
    frames = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, frames, -1).amax(dim=1)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    value_after = torch.zeros_like(following)
    for frame in range(mask.shape[1] - 1, -1, -1):
        inside = mask[:, frame]
        reward = torch.where(last == frame, rewards.to(values), 0.0)
        delta = reward + gamma * value_after - values[:, frame]
        following = torch.where(inside, delta + gamma * lam * following, following)
        value_after = torch.where(inside, values[:, frame], value_after)
        advantages[:, frame] = torch.where(inside, following, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whitened_frames(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages `(B, T)` with mean 0 and standard deviation 1 over all frames of the mask; 0 elsewhere."""
    inside = advantages[mask].double()
    if not len(inside):
        return torch.zeros_like(advantages)
    scaled = (advantages.double() - inside.mean()) / (inside.std(correction=0) + EPSILON)
    return torch.where(mask, scaled, 0.0).to(advantages.dtype)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float = 0.2
) -> torch.Tensor:
    """Squared error of the value function, clipped around its old values (PPO's own code, arXiv 2005.12729, 3).

        L = 1/2 mean max[ (V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2 ]

    Args:
        values, old_values, returns: `(B, T)`.
        mask: `(B, T)` bool.
        clip: 0 leaves the clipping out.

    Returns:
        Mean over episodes of the mean over each episode's frames.
    """
    error = (values - returns).square()
    if clip > 0:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    counted = torch.where(mask, error, torch.zeros_like(error))
    return 0.5 * (counted.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """`1 - Var[R - V] / Var[R]` over the frames of the mask: 1 is perfect, 0 no better than a constant.

    0 where the returns have no spread.
    """
    inside = returns[mask].double()
    spread = inside.var(correction=0).item() if len(inside) else 0.0
    if spread <= 1e-12:
        return 0.0
    return 1.0 - (inside - values[mask].double()).var(correction=0).item() / spread
