"""The policy losses: pure functions from tensors to tensors.

Shapes: `B` episodes, `T` frames, `V` text vocabulary. A mask `(B, T)` is True at the frames that count: those of the
segment, not of lead-in, context or padding.
"""

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each episode's own frames: `(B, T)` to `(B,)`; 0 for an episode with no frame.

    `torch.where` and not a product: a NaN outside the mask stays outside.
    """
    counted = torch.where(mask, values, torch.zeros_like(values))
    return counted.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)


def exact_kl(log_policy: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """KL[policy || reference] over the whole vocabulary, `(..., V)` log-probabilities to `(...)`.

    A token that the policy never draws (-inf under top-k) contributes nothing.
    """
    probability = log_policy.exp()
    difference = torch.where(probability > 0, log_policy - log_reference, torch.zeros_like(log_policy))
    return (probability * difference).sum(dim=-1)


def entropy(log_policy: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of `(..., V)` log-probabilities, `(...)`."""
    probability = log_policy.exp()
    return -torch.where(probability > 0, probability * log_policy, torch.zeros_like(log_policy)).sum(dim=-1)


def truncated_weights(
    log_probs: torch.Tensor, behaviour_log_probs: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """`min(pi_train / pi_rollout, cap)` of each token, `(B, T)`, 1 outside the mask.

    Truncated importance sampling: the policy that acts in bfloat16, frame by frame, is not quite the one that is
    trained in whole sequences (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
    2025; the cap is after Ionides, 2008), and with rollouts one step ahead it is an update older (arXiv 2505.24298,
    section 5.2, where the policy that the update begins with is called proximal).

    Args:
        log_probs: `(B, T)` of the tokens under the policy as it is trained, before the update.
        behaviour_log_probs: `(B, T)` as recorded when they were drawn.
        mask: `(B, T)` bool.
        cap: above 0.
    """
    return torch.where(mask, log_probs - behaviour_log_probs, torch.zeros_like(log_probs)).exp().clamp(max=cap)


def grpo_loss(
    log_probs: torch.Tensor,
    behaviour_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
    kl_beta: float = 0.01,
    clip_high: float | None = None,
    sequence_ratio: bool = False,
    length: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss with a KL penalty (arXiv 2606.11167, section 3; GRPO, arXiv 2402.03300, eq. 3).

        L = -1/B sum_b 1/N_b sum_n [ min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) - beta KL_n ]

    Args:
        log_probs: `(B, T)` of what was done at each frame under the policy that is trained: the text tokens, or
            their projection on {silent, speak}.
        behaviour_log_probs: `(B, T)` under the policy that acted.
        advantages: `(B,)`, one for a whole episode, or `(B, T)`.
        kl: `(B, T)` KL[policy || reference] at each frame.
        mask: `(B, T)` bool.
        clip: eps.
        kl_beta: beta.
        clip_high: eps_high, None for eps (clip-higher, DAPO, arXiv 2503.14476, section 3.1).
        sequence_ratio: one ratio for an episode, `exp(1/N_b sum_n log rho_n)` (GSPO, arXiv 2507.18071, eq. 7).
        weights: `(B, T)` of each frame's term, without gradient: truncated importance weights
            (`truncated_weights`).
        length: divides every episode's sum instead of its own N_b (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Returns:
        The loss, and detached diagnostics: `kl`, `approx_kl` (of behaviour to trained policy, Schulman's k3),
        `clip_fraction`, `ratio_mean`, `ratio_max`.
    """
    # Masked before the exponential: a gradient of exp at garbage would be NaN even where the value is dropped.
    log_ratio = torch.where(mask, log_probs - behaviour_log_probs, torch.zeros_like(log_probs))
    if sequence_ratio:
        log_ratio = torch.where(mask, masked_mean(log_ratio, mask)[:, None], torch.zeros_like(log_ratio))
    ratio = log_ratio.exp()
    gain = advantages[:, None] if advantages.ndim == 1 else advantages
    high = clip if clip_high is None else clip_high
    objective = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + high) * gain)
    if weights is not None:
        objective = objective * weights
    value = masked_mean(objective, mask) - kl_beta * masked_mean(kl, mask)
    if length is not None:
        value = value * mask.sum(dim=-1) / length
    with torch.no_grad():
        clipped = ((ratio < 1 - clip) | (ratio > 1 + high)).float()
        diagnostics = {
            "kl": masked_mean(kl, mask).mean(),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask).mean(),
            "clip_fraction": masked_mean(clipped, mask).mean(),
            "ratio_mean": masked_mean(ratio, mask).mean(),
            "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
        }
    return -value.mean(), diagnostics
