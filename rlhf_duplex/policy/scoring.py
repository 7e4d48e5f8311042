"""What a policy says of whole episodes' text, without ever holding the logits of all their frames.

The text vocabulary of the 7B has 32,000 entries: float32 logits of 16 episodes of 25 s are 640 MB, and log-softmax, KL
and their gradients several times that. They are computed for some frames at a time, and anew in the backward pass;
frames that no loss is about get none.

Shapes: `B` episodes, `T` frames, `K` streams, `V` text vocabulary, `n` frames of any episodes, `D` width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from rlhf_duplex.algorithms.losses import entropy, exact_kl
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import log_distribution

# Logits that are held at once: 256 MB in float32.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class TextScores:
    """Of each frame's text, `(B, T)` float32 each, 0 outside the mask.

    Attributes:
        tokens: log-probability of the token that was drawn.
        done: of what was done at the frame, as the objective sees it.
        kl: KL[policy || reference]; 0 without a reference.
        word_kl: the part of it that is about which word is said where one is, and not about whether; 0 unless asked
            for.
        entropy: in nats, without gradient.
        drift: squared distance between what the depth transformer is given and what the reference gives it, as a share
            of the latter's square; 0 unless asked for.
        values: of a value function, before the frame's token was drawn; 0 without one.
    """

    tokens: torch.Tensor
    done: torch.Tensor
    kl: torch.Tensor
    word_kl: torch.Tensor
    entropy: torch.Tensor
    drift: torch.Tensor
    values: torch.Tensor


def score_text(
    policy: MoshiPolicy,
    codes: torch.Tensor,
    mask: torch.Tensor,
    reference: MoshiPolicy | None = None,
    objective: Objective | None = None,
    drift: bool = False,
    critic: Callable[[torch.Tensor], torch.Tensor] | None = None,
    at_once: int = LOGITS_AT_ONCE,
    word_kl: bool = False,
) -> TextScores:
    """Score whole episodes, teacher-forced, under the transform that the policy samples with.

    Args:
        policy: with gradient, where that is enabled.
        codes: `(B, K, T)`, padded at the end with -1.
        mask: `(B, T)` bool, the frames that are wanted.
        reference: without gradient.
        objective: of `done`; None: the token.
        drift, word_kl: compute them (need a reference).
        critic: gives values `(n,)` of hidden states `(n, D)`.
        at_once: logits held at a time, at most.
    """

    def found() -> torch.Tensor:
        return _score_frames(policy, codes, mask, reference, objective, drift, critic, at_once, word_kl)

    # Where weights are cut over processes, all of both models' are needed at the same time.
    rows = policy.whole(found if reference is None else lambda: reference.whole(found))
    if mask.is_meta:
        return TextScores(*rows.unflatten(1, mask.shape))
    return TextScores(*torch.zeros(7, *mask.shape, device=codes.device).masked_scatter(mask, rows))


def _wanted(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(B, T, ...)` to `(n, ...)`; of shapes without storage (a dry run) nobody knows which, and it is all frames."""
    return values.flatten(0, 1) if mask.is_meta else values[mask]


def _score_frames(
    policy: MoshiPolicy,
    codes: torch.Tensor,
    mask: torch.Tensor,
    reference: MoshiPolicy | None,
    objective: Objective | None,
    drift: bool,
    critic: Callable[[torch.Tensor], torch.Tensor] | None,
    at_once: int,
    word_kl: bool,
) -> torch.Tensor:
    """`(7, n)` float32 in the order of `TextScores`."""
    text = _wanted(codes[:, 0].clamp(min=0), mask)
    goal = objective or Objective()
    onsets = _wanted(goal.onsets(codes[:, 0]), mask)
    hidden = _wanted(policy.text_hidden(codes), mask)
    others = None
    if reference is not None:
        with torch.no_grad():
            others = _wanted(reference.text_hidden(codes), mask)

    def part(
        hidden: torch.Tensor, text: torch.Tensor, onsets: torch.Tensor, others: torch.Tensor | None
    ) -> torch.Tensor:
        """`(5, n)` in the order of `TextScores`."""
        sampling = policy.sampling
        logits = policy.lm.text_linear(hidden)
        policys = log_distribution(logits, sampling.text_temperature, sampling.text_top_k, keep=text)
        tokens = policys.gather(-1, text[:, None])[:, 0]
        done = tokens if goal.name == "tokens" else goal.log_probs(policys, text, onsets)
        kl, words = torch.zeros_like(tokens), torch.zeros_like(tokens)
        if reference is not None and others is not None:
            with torch.no_grad():
                known = reference.sampling
                theirs = log_distribution(
                    reference.lm.text_linear(others), known.text_temperature, known.text_top_k, keep=text
                )
            kl = exact_kl(policys, theirs)
            if word_kl:
                words = kl - exact_kl(*(goal.choices(found) for found in (policys, theirs)))
        with torch.no_grad():
            uncertain = entropy(policys)
        return torch.stack([tokens, done, kl, words, uncertain])

    size = max(1, at_once // policy.lm.text_linear.out_features)
    starts = range(0, len(text), size)
    anew = len(starts) > 1 and torch.is_grad_enabled()
    found = []
    for rows in (slice(start, start + size) for start in starts):
        arguments = (hidden[rows], text[rows], onsets[rows], None if others is None else others[rows])
        if anew:
            found.append(checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(part(*arguments))
    scores = torch.cat(found, dim=1) if found else hidden.new_zeros(5, 0)
    moved = values = scores.new_zeros(1, scores.shape[1])
    if drift and reference is not None and others is not None:
        moved = _drift(policy.depth_inputs(hidden), reference.depth_inputs(others).detach())[None]
    if critic is not None:
        values = critic(hidden)[None]
    return torch.cat([scores.float(), moved.float(), values.float()])


def _drift(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    distance = (ours.float() - theirs.float()).square().sum(dim=-1)
    return distance / theirs.float().square().sum(dim=-1).clamp(min=1e-6)
