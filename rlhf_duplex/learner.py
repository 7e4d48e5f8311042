"""One update: from scored episodes to new weights.

Shapes: `B` episodes, `T` frames, `K` streams, `V` text vocabulary.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from envs.cores import map_on_cores
from envs.episode import Episode
from rlhf_duplex.algorithms.losses import grpo_loss, masked_mean, truncated_weights
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.config import OptimiserConfig, TrainerConfig
from rlhf_duplex.optimiser_state import load_optimiser_state, optimiser_state
from rlhf_duplex.policy.lora import has_lora, is_fresh, part_of, without_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.scoring import score_text


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite: the run stops before anything is saved."""


@dataclass(frozen=True)
class Batch:
    """Episodes as tensors, padded at the end to the longest.

    Attributes:
        codes: `(B, K, T)` int64, -1 in the padding.
        log_probs: `(B, T)` of the behaviour policy.
        mask: `(B, T)` bool, the frames that the loss is about.
        advantages: `(B,)`, or `(B, T)` where they differ from frame to frame.
        weights: `(B, T)` importance weights, or None.
    """

    codes: torch.Tensor
    log_probs: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the episodes, cut to the longest of them."""
        length = int(self.mask[index].any(dim=0).nonzero().max()) + 1 if self.mask[index].any() else 1
        return Batch(
            self.codes[index, :, :length],
            self.log_probs[index, :length],
            self.mask[index, :length],
            self.advantages[index] if self.advantages.ndim == 1 else self.advantages[index, :length],
            None if self.weights is None else self.weights[index, :length],
        )


def make_batch(episodes: Sequence[Episode], advantages: torch.Tensor, frame_rate: float, device: torch.device) -> Batch:
    """Episodes and their advantages `(B,)` as tensors on a device.

    Raises:
        ValueError: an episode without tokens (no policy acted in it).
    """
    for episode in episodes:
        if episode.text_tokens is None or episode.audio_tokens is None or episode.log_probs is None:
            raise ValueError(f"the episode of segment '{episode.segment.id}' has no tokens: no policy acted in it")
    rows = [np.concatenate([e.text_tokens[None], e.audio_tokens]) for e in episodes]  # type: ignore[index]
    frames = max(row.shape[1] for row in rows)
    codes = torch.full((len(rows), rows[0].shape[0], frames), -1, dtype=torch.long)
    log_probs = torch.zeros(len(rows), frames)
    mask = torch.zeros(len(rows), frames, dtype=torch.bool)
    for index, (episode, row) in enumerate(zip(episodes, rows, strict=True)):
        count = row.shape[1]
        codes[index, :, :count] = torch.from_numpy(row)
        log_probs[index, :count] = torch.from_numpy(episode.log_probs)
        mask[index, :count] = torch.from_numpy(episode.frame_mask(frame_rate))
    return Batch(codes.to(device), log_probs.to(device), mask.to(device), advantages.to(device))


class Learner:
    """The optimiser, the reference policy, and the update.

    Args:
        policy: is trained in place.
        trainer, optimiser: configuration.
        seed: of the order of minibatches.

    The reference is a frozen copy of the policy as it is now: of a warm-started policy if that is what it is, with
    adapters as without. Weights that are not trained are shared with it: with adapters it is the model with them off,
    and costs no memory. Trained weights in bfloat16 have a float32 copy, which the optimiser works on (a rate of 2e-7
    is lost in 8 bits).
    """

    def __init__(self, policy: MoshiPolicy, trainer: TrainerConfig, optimiser: OptimiserConfig, seed: int) -> None:
        self.policy, self.trainer, self.config, self.seed = policy, trainer, optimiser, seed
        self.objective = Objective(
            trainer.objective,
            policy.lm.text_padding_token_id,
            policy.lm.end_of_text_padding_id,
            trainer.onset_frames,
        )
        self.adapters = has_lora(policy.lm)
        for name, parameter in policy.lm.named_parameters():
            # The loss is on text tokens alone: the depth transformer gets no gradient, and no weight decay either.
            idle = name.startswith(("depformer", "linears"))
            parameter.requires_grad_(not idle and (not self.adapters or part_of(name) == "lora"))
        shared = {id(p): p for p in policy.lm.parameters() if not p.requires_grad}
        reference = copy.deepcopy(policy.lm, shared).requires_grad_(False).eval()
        if self.adapters and is_fresh(policy.lm):
            reference = without_lora(reference)
        policy.lm.transformer.checkpointing = trainer.gradient_checkpointing
        # The reference keeps its whole vocabulary: cut to its own top-k, KL to it would be infinite.
        self.reference = MoshiPolicy(reference, replace(policy.sampling, text_top_k=0), policy.prompt)
        self.parameters = {n: p for n, p in policy.lm.named_parameters() if p.requires_grad}
        self.masters = {
            n: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for n, p in self.parameters.items()
        }
        self.optimiser = torch.optim.AdamW(
            self.masters.values(),
            lr=optimiser.learning_rate,
            betas=optimiser.betas,
            weight_decay=optimiser.weight_decay,
            fused=policy.device.type == "cuda",
        )

    def learning_rate(self, update: int) -> float:
        """The rate at an update (from 0)."""
        config = self.config
        warmup = min(1.0, (update + 1) / (config.warmup_updates + 1))
        if config.schedule == "constant":
            return config.learning_rate * warmup
        share = 0.5 * (1 + math.cos(math.pi * update / max(1, self.trainer.updates)))
        return config.learning_rate * warmup * (config.final_share + (1 - config.final_share) * share)

    def update(self, batch: Batch, update: int) -> dict[str, float]:
        """Optimiser steps over all minibatches of a batch.

        Args:
            batch: all episodes of the update.
            update: its number, from 0 (schedule and order of the minibatches).

        Returns:
            Diagnostics, means over the steps (maxima for `ratio_max`). `mismatch/ratio_mean`, `mismatch/ratio_max` and
            `mismatch/kl` (KL of rollout to train policy) are from before the first optimiser step: of the first
            minibatch, or of the whole batch where the objective or importance weights need its log-probabilities.

        Raises:
            NonFiniteError: before the weights are touched by the step that it happens in.
        """
        rate = self.learning_rate(update)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, update)).generate_state(1)[0]))
        seen: dict[str, list[float]] = defaultdict(list)
        mismatch: dict[str, float] = {}
        if self.trainer.objective != "tokens" or self.trainer.importance != "none":
            batch, mismatch = self._as_trained(batch)
        # Dr. GRPO divides by one length for all: their mean, so that the loss is of the size of the others.
        length = float(batch.mask.sum(dim=1).float().mean()) if self.trainer.algorithm == "dr_grpo" else None
        for _ in range(self.trainer.passes):
            order = torch.randperm(len(batch.codes), generator=generator)
            for index in order.split(self.trainer.minibatch):
                for name, value in self._step(batch, index, update, length).items():
                    seen[name].append(value)
        joined = {name: max(v) if name.endswith("max") else sum(v) / len(v) for name, v in seen.items()}
        # Before the first optimiser step the policy is the one that acted: whatever is seen then is the mismatch of
        # streaming and teacher-forced log-probabilities.
        joined["ratio_first"] = seen["ratio_mean"][0]
        joined["mismatch/ratio_mean"], joined["mismatch/ratio_max"] = seen["ratio_mean"][0], seen["ratio_max"][0]
        joined["mismatch/kl"] = seen["approx_kl"][0]
        joined |= mismatch
        return {**joined, "learning_rate": rate, "optimiser_steps": float(len(seen["loss"]))}

    def _as_trained(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """The batch with log-probabilities as the objective sees them, under the policy before the update, and weights.

        Also how these differ from those that were recorded in the rollouts.
        """

        @torch.no_grad()
        def part(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = batch.rows(index)
            scores = score_text(self.policy, rows.codes, rows.mask, objective=self.objective)
            return index, scores.tokens, scores.done

        tokens, done = torch.zeros_like(batch.log_probs), torch.zeros_like(batch.log_probs)
        order = batch.mask.sum(dim=1).argsort(descending=True).cpu()
        for index, *values in map_on_cores(part, order.split(self.trainer.microbatch), self.policy.device):
            tokens[index, : values[0].shape[1]], done[index, : values[1].shape[1]] = values
        drawn = batch.log_probs
        weights = None
        if self.trainer.importance == "truncated":
            weights = truncated_weights(tokens, drawn, batch.mask, self.trainer.importance_cap)
        log_ratio = torch.where(batch.mask, tokens - drawn, torch.zeros_like(drawn))
        mismatch = {
            "mismatch/ratio_mean": float(masked_mean(log_ratio.exp(), batch.mask).mean()),
            "mismatch/ratio_max": float(log_ratio.exp().max()),
            "mismatch/kl": float(masked_mean(torch.expm1(log_ratio) - log_ratio, batch.mask).mean()),
        }
        return replace(batch, log_probs=done, weights=weights), mismatch

    def _step(self, batch: Batch, index: torch.Tensor, update: int, length: float | None) -> dict[str, float]:
        totals: dict[str, torch.Tensor] = {}
        self.optimiser.zero_grad(set_to_none=True)
        # Similar lengths together: less padding in each forward pass. The sum over microbatches is the same.
        index = index[batch.mask[index].float().sum(dim=1).argsort().cpu()]
        # The longest first: what is left at the end of the queue is short.
        parts = index.split(self.trainer.microbatch)[::-1]
        results = map_on_cores(
            lambda rows: self._gradients(batch.rows(rows), len(rows) / len(index), length), parts, self.policy.device
        )
        for part, (gradients, diagnostics) in zip(parts, results, strict=True):
            for master, gradient in zip(self.masters.values(), gradients, strict=True):
                if gradient is not None:
                    gradient = gradient.to(master.dtype)
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            for name, value in diagnostics.items():
                if name.endswith("max"):
                    totals[name] = torch.maximum(totals.get(name, value), value)
                else:
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value * (len(part) / len(index))
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.clip_norm)
        values = {**{name: float(value) for name, value in totals.items()}, "grad_norm": float(norm)}
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if wrong:
            raise NonFiniteError(
                f"{wrong[0]} is {values[wrong[0]]} in update {update}: nothing of this update is saved; "
                "lower optimiser.learning_rate, or look at the episodes of the last checkpoint"
            )
        self.optimiser.step()
        self._to_policy()
        return values

    @torch.no_grad()
    def _to_policy(self) -> None:
        """The float32 copies' values into the policy's weights."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _gradients(
        self, batch: Batch, share: float, length: float | None
    ) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        """Of one microbatch, which is this share of its minibatch."""
        loss, diagnostics = self._loss(batch, length)
        gradients = torch.autograd.grad(loss * share, list(self.parameters.values()), allow_unused=True)
        return gradients, {**diagnostics, "loss": loss.detach()}

    def _loss(self, batch: Batch, length: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trainer = self.trainer
        anchored = trainer.audio_beta > 0
        scores = score_text(self.policy, batch.codes, batch.mask, self.reference, self.objective, drift=anchored)
        # Weighted by frame; `grpo_loss` takes the mean over all of them.
        weight = trainer.kl_beta + trainer.sentence_kl_beta * (~self.objective.onsets(batch.codes[:, 0])).float()
        loss, diagnostics = grpo_loss(
            scores.done,
            batch.log_probs,
            batch.advantages,
            weight * scores.kl,
            batch.mask,
            trainer.clip,
            1.0,
            trainer.clip_high,
            sequence_ratio=trainer.algorithm == "gspo",
            length=length,
            weights=batch.weights,
        )
        if anchored:
            drift = masked_mean(scores.drift, batch.mask).mean()
            loss = loss + trainer.audio_beta * drift
            diagnostics["audio_drift"] = drift.detach()
        with torch.no_grad():
            diagnostics["kl"] = masked_mean(scores.kl, batch.mask).mean()
            diagnostics["entropy"] = masked_mean(scores.entropy, batch.mask).mean()
        return loss, diagnostics

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's state as named tensors (safetensors holds nothing else), float32 copies of weights in it."""
        copies = {n: m for n, m in self.masters.items() if m is not self.parameters[n]}
        kept = {f"master/{name}": master.detach().cpu().clone() for name, master in copies.items()}
        return optimiser_state(self.masters, self.optimiser) | kept

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave (nothing, before the first update).

        Raises:
            ValueError: a parameter's state is not whole or has another shape.
        """
        load_optimiser_state(self.masters, self.optimiser, state)
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    master.copy_(state.get(f"master/{name}", self.parameters[name]))
