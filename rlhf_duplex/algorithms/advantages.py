"""Advantages of a group's episodes over one another, from the rewards of several axes.

Shapes: rewards and advantages are `(groups, G)`, one row for the G episodes of one segment; NaN marks a missing score
(the axis does not apply to the segment, or could not judge the episode). A missing score is left out of every mean
and standard deviation and contributes 0.

Sources: GRPO's group advantage as in arXiv 2606.11167, section 3; the decoupled normalisation of several rewards from
arXiv 2601.05242 (GDPO); the mean alone from arXiv 2503.20783 (Dr. GRPO); the mean of the others from arXiv 2402.14740
(RLOO).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

EPSILON = 1e-4
METHODS = ("per_axis", "weighted_sum")
BASELINES = ("standardised", "mean", "leave_one_out")
_EQUAL = 1e-6
"""Rewards that differ by less than this are equal up to rounding."""


@dataclass(frozen=True)
class AdvantageResult:
    """Advantages, and what they were made of.

    Attributes:
        advantages: `(groups, G)`, never NaN.
        frac_zero_std: by axis, share of the groups with a score in which all scores are equal (nothing to learn).
        mean: by axis, mean of all scores.
        std: by axis, mean over the groups of the standard deviation within the group.
        share: by axis, its part of the sum over episodes and axes of |contribution| to the advantage (sums to 1, or
            is 0 throughout where all advantages are), before whitening.

    An axis without a single score is in none of the dictionaries.
    """

    advantages: torch.Tensor
    frac_zero_std: dict[str, float]
    mean: dict[str, float]
    std: dict[str, float]
    share: dict[str, float]


def _moments(rewards: torch.Tensor, unbiased: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Present `(groups, G)` bool, mean `(groups, 1)` and standard deviation `(groups, 1)` over what is present."""
    present = ~rewards.isnan()
    count = present.sum(-1, keepdim=True)
    mean = rewards.nan_to_num(0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(present, rewards - mean, 0.0)
    divisor = (count - 1 if unbiased else count).clamp(min=1)
    return present, mean, (centred.square().sum(-1, keepdim=True) / divisor).sqrt()


def _all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """`(groups,)` bool: at least one score, and no two that differ."""
    present = ~rewards.isnan()
    high = rewards.masked_fill(~present, -torch.inf).amax(-1)
    low = rewards.masked_fill(~present, torch.inf).amin(-1)
    return present.any(-1) & (high - low <= _EQUAL)


def _check(rewards: torch.Tensor, what: str) -> torch.Tensor:
    """The rewards in float64.

    Raises:
        ValueError: not `(groups, G)`, or infinite.
    """
    if rewards.ndim != 2:
        raise ValueError(f"{what} must have the shape (groups, G), found {tuple(rewards.shape)}")
    if rewards.isinf().any():
        raise ValueError(f"{what} must be finite, or NaN where a score is missing")
    return rewards.double()


def standardise(
    rewards: torch.Tensor, eps: float = EPSILON, unbiased: bool = False, baseline: str = "standardised"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's rewards in standard deviations from the group's mean: `(r - mean) / (std + eps)`.

    Args:
        rewards: `(groups, G)`, NaN where missing.
        baseline: `mean` leaves the division out (Dr. GRPO); `leave_one_out` takes the mean of the other members of the
            group, `n / (n - 1) (r - mean)` for n scores, and does not divide either (RLOO).
        eps: added to the standard deviation (GDPO: 1e-4).
        unbiased: False divides the variance by G, as arXiv 2606.11167 writes it; True by G - 1, as TRL does.

    Returns:
        Advantages `(groups, G)` float32, exactly 0 where a score is missing or its group has no spread, and
        `(groups,)` bool: the group has scores and they are all equal. A group with no score is not among these.

    Raises:
        ValueError: another shape, or infinite rewards.
    """
    rewards = _check(rewards, "rewards")
    present, mean, std = _moments(rewards, unbiased)
    equal = _all_equal(rewards)
    useful = present & ~equal.unsqueeze(-1)
    return torch.where(useful, (rewards - mean) * _scale(present, std, eps, baseline), 0.0).float(), equal


def _scale(present: torch.Tensor, std: torch.Tensor, eps: float, baseline: str) -> torch.Tensor:
    """What a group's centred rewards are multiplied with, `(groups, 1)`."""
    if baseline == "standardised":
        return 1.0 / (std + eps)
    if baseline == "mean":
        return torch.ones_like(std)
    count = present.sum(-1, keepdim=True)
    return count / (count - 1).clamp(min=1)


def whitened(advantages: torch.Tensor, mask: torch.Tensor | None = None, eps: float = EPSILON) -> torch.Tensor:
    """Advantages with mean 0 and standard deviation 1 over the whole batch (GDPO's last step, population std).

    Args:
        advantages: `(groups, G)`.
        mask: `(groups, G)` bool, the episodes with any score; the others stay out of the statistics and are 0.
        eps: added to the standard deviation, so that a batch without any spread gives 0.
    """
    mask = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    flat = torch.where(mask, advantages.double(), torch.nan).reshape(1, -1)
    _, mean, std = _moments(flat, unbiased=False)
    return torch.where(mask, (advantages - mean) / (std + eps), 0.0).to(advantages.dtype)


def combine_advantages(
    rewards: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    method: str = "per_axis",
    whiten: bool = False,
    eps: Mapping[str, float] | None = None,
    unbiased: bool = False,
    baseline: str = "standardised",
) -> AdvantageResult:
    """One advantage for each episode, from the rewards of all axes.

    Args:
        rewards: by axis, `(groups, G)`, NaN where missing; all of one shape, on one device.
        weights: by axis.
        method: `per_axis` standardises each axis over its group, then adds: `A = sum_k w_k (r_k - mean_k) /
            (std_k + eps)` (GDPO, and arXiv 2606.11167 for two rewards on an axis). `weighted_sum` adds first:
            `r = sum_k w_k r_k`, then standardises r over the group (plain GRPO: the axis with the widest spread
            decides). There too a missing score counts as its axis' mean in the group, so that it moves nothing.
        whiten: apply `whitened` to the sum (GDPO's last step; arXiv 2606.11167 does not mention it).
        eps: by axis, as in `standardise`; 1e-4 for those that are not named, and for the sum of `weighted_sum`.
        unbiased, baseline: as in `standardise`.

    Raises:
        ValueError: no axis, another method or baseline, shapes that differ, an axis without a weight.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}' of combining advantages: choose one of {', '.join(METHODS)}")
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline '{baseline}' of advantages: choose one of {', '.join(BASELINES)}")
    if not rewards:
        raise ValueError("no rewards to make advantages of")
    table = {name: _check(values, f"rewards of axis '{name}'") for name, values in rewards.items()}
    if len({values.shape for values in table.values()}) > 1:
        raise ValueError(f"axes differ in shape: { {name: tuple(v.shape) for name, v in table.items()} }")
    missing = [name for name in table if name not in weights]
    if missing:
        raise ValueError(f"no weight for axis '{missing[0]}'")
    contributions = _contributions(table, weights, method, eps or {}, unbiased, baseline)
    advantages = torch.stack(list(contributions.values())).sum(0)
    if whiten:
        judged = torch.stack([~values.isnan() for values in table.values()]).any(0)
        advantages = whitened(advantages, judged)
    return AdvantageResult(advantages.float(), **_statistics(table, contributions, unbiased))


def _contributions(
    table: dict[str, torch.Tensor],
    weights: Mapping[str, float],
    method: str,
    eps: Mapping[str, float],
    unbiased: bool,
    baseline: str,
) -> dict[str, torch.Tensor]:
    """By axis, its part `(groups, G)` of the advantages; they add up to the advantages."""
    if method == "per_axis":
        return {
            name: weights[name] * standardise(values, eps.get(name, EPSILON), unbiased, baseline)[0].double()
            for name, values in table.items()
        }
    parts = {}
    for name, values in table.items():
        present, mean, _ = _moments(values, unbiased)
        parts[name] = weights[name] * torch.where(present, values - mean, 0.0)
    judged = torch.stack([~values.isnan() for values in table.values()]).any(0)
    total = torch.where(judged, torch.stack(list(parts.values())).sum(0), torch.nan)
    present, _, std = _moments(total, unbiased)
    scale = torch.where(_all_equal(total).unsqueeze(-1), 0.0, _scale(present, std, EPSILON, baseline))
    return {name: part * scale for name, part in parts.items()}


def _statistics(
    table: dict[str, torch.Tensor], contributions: dict[str, torch.Tensor], unbiased: bool
) -> dict[str, dict[str, float]]:
    frac_zero_std, mean, std, share = {}, {}, {}, {}
    size = {name: part.abs().sum().item() for name, part in contributions.items()}
    whole = sum(size.values())
    for name, values in table.items():
        present = ~values.isnan()
        groups = present.any(-1)
        if not groups.any():
            continue
        frac_zero_std[name] = _all_equal(values)[groups].double().mean().item()
        mean[name] = values[present].mean().item()
        std[name] = _moments(values, unbiased)[2][groups].mean().item()
        share[name] = size[name] / whole if whole > 0 else 0.0
    return {"frac_zero_std": frac_zero_std, "mean": mean, "std": std, "share": share}
