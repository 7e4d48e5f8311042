"""One update: from scored episodes to new weights.

Shapes: `B` episodes, `T` frames, `K` streams, `V` text vocabulary.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from envs.episode import Episode
from rlhf_duplex.algorithms.losses import entropy, exact_kl, grpo_loss, masked_mean
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.algorithms.values import (
    explained_variance,
    generalised_advantages,
    truncated_importance,
    value_loss,
    whitened_frames,
)
from rlhf_duplex.config import OptimiserConfig, PpoConfig, TrainerConfig
from rlhf_duplex.critic import Critic
from rlhf_duplex.optimiser_state import load_optimiser_state, optimiser_state
from rlhf_duplex.parallel import Alone
from rlhf_duplex.policy.lora import has_lora, part_of
from rlhf_duplex.policy.moshi import MoshiPolicy


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite: the run stops before anything is saved."""


@dataclass(frozen=True)
class Batch:
    """Episodes as tensors, padded at the end to the longest.

    Attributes:
        codes: `(B, K, T)` int64, -1 in the padding.
        log_probs: `(B, T)` of the behaviour policy.
        mask: `(B, T)` bool, the frames that the loss is about.
        advantages: `(B,)`, or `(B, T)`; with PPO the rewards `(B,)`, until the update has made advantages of them.
        values, returns: `(B, T)` of the value function before the update and what it is taught; None without one.
    """

    codes: torch.Tensor
    log_probs: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some of the episodes, cut to the longest of them."""
        length = int(self.mask[index].any(dim=0).nonzero().max()) + 1 if self.mask[index].any() else 1
        advantages = self.advantages[index]
        return Batch(
            self.codes[index, :, :length],
            self.log_probs[index, :length],
            self.mask[index, :length],
            advantages if advantages.ndim == 1 else advantages[:, :length],
            None if self.values is None else self.values[index, :length],
            None if self.returns is None else self.returns[index, :length],
        )

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


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
        codes[index, :, :count] = torch.tensor(row)
        log_probs[index, :count] = torch.tensor(episode.log_probs)
        mask[index, :count] = torch.from_numpy(episode.frame_mask(frame_rate))
    return Batch(codes.to(device), log_probs.to(device), mask.to(device), advantages.to(device))


class Learner:
    """The optimiser, the reference policy, and the update.

    Args:
        policy: is trained in place.
        trainer, optimiser: configuration.
        seed: of the order of minibatches, and of a value function's first weights.
        ppo: of the value function, which `trainer.algorithm` `ppo` has.
        parallel: the group of learners that share the update.

    The reference is a frozen copy of the policy as it is now: of a warm-started policy if that is what it is, with
    adapters as without. Weights that are not trained are shared with it, so that with adapters it costs no memory.
    """

    def __init__(
        self,
        policy: MoshiPolicy,
        trainer: TrainerConfig,
        optimiser: OptimiserConfig,
        seed: int,
        ppo: PpoConfig | None = None,
        parallel: Alone | None = None,
    ) -> None:
        self.trainer, self.config, self.seed, self.ppo = trainer, optimiser, seed, ppo or PpoConfig()
        self.parallel = parallel or Alone()
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
        # The reference keeps its whole vocabulary: cut to its own top-k, KL to it would be infinite.
        uncut = MoshiPolicy(reference, replace(policy.sampling, text_top_k=0))
        self.policy, self.reference = self.parallel.prepare(policy, uncut)
        self.parameters = {n: p for n, p in policy.lm.named_parameters() if p.requires_grad}
        self.critic = None
        if trainer.algorithm == "ppo":
            self.critic = Critic(policy.lm.dim, self.ppo, seed, policy.device)
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=optimiser.learning_rate,
            betas=optimiser.betas,
            weight_decay=optimiser.weight_decay,
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
            `mismatch/kl` (KL of rollout to train policy) are of the first minibatch, before its optimiser step.

        Raises:
            NonFiniteError: before the weights are touched by the step that it happens in.
        """
        rate = self.learning_rate(update)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, update)).generate_state(1)[0]))
        seen: dict[str, list[float]] = defaultdict(list)
        batch, figures = self._prepare(batch)
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
        return {**joined, **figures, "learning_rate": rate, "optimiser_steps": float(len(seen["loss"]))}

    def _prepare(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """What is computed with the policy as it is before the update: PPO's advantages, what an older policy's
        episodes are worth, and the log-probabilities of what was done as another objective than `tokens` sees it."""
        trainer, figures = self.trainer, {}
        if self.critic is None and not trainer.ahead and trainer.objective == "tokens":
            return batch, {}
        tokens, projected, values = self._before(batch)
        if self.critic is not None:
            advantages, returns = generalised_advantages(
                batch.advantages, values, batch.mask, self.ppo.gamma, self.ppo.gae_lambda
            )
            figures["explained_variance"] = explained_variance(values, returns, batch.mask)
            advantages = whitened_frames(advantages, batch.mask)
            batch = replace(batch, advantages=advantages, values=values, returns=returns)
        if trainer.ahead:
            weights = truncated_importance(tokens, batch.log_probs, batch.mask, trainer.importance_cap)
            inside = weights[batch.mask]
            figures["importance_mean"] = float(inside.mean())
            figures["importance_truncated"] = float((inside >= trainer.importance_cap).float().mean())
            advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
            batch = replace(batch, advantages=advantages * weights, log_probs=tokens)
        if trainer.objective != "tokens":
            batch = replace(batch, log_probs=projected)
        return batch, figures

    @torch.no_grad()
    def _before(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, T)` each: log-probabilities of the text tokens, the same as the objective sees them, and values."""

        def evaluate(part: tuple[torch.Tensor, bool]) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():  # of this thread
                rows = batch.rows(part[0])
                hidden, tokens, distribution = self.policy.evaluate(rows.codes)
                values = torch.zeros_like(tokens) if self.critic is None else self.critic.values(hidden)
                return tokens, self.objective.log_probs(distribution, rows.codes[:, 0]), values

        result = torch.zeros(3, *batch.log_probs.shape, device=batch.log_probs.device)
        order = batch.mask.sum(dim=1).argsort(descending=True).cpu()
        parts = self.parallel.share(order.split(self.trainer.microbatch))
        for (index, counts), found in zip(parts, self.parallel.map(evaluate, parts, self.policy.device), strict=True):
            for place, values in enumerate(found if counts else ()):
                result[place, index, : values.shape[1]] = values
        tokens, projected, values = self.parallel.total(result).unbind()
        return tokens, projected, values

    def _step(self, batch: Batch, index: torch.Tensor, update: int, length: float | None) -> dict[str, float]:
        totals: dict[str, torch.Tensor] = {}
        # Similar lengths together: less padding in each forward pass. The sum over microbatches is the same.
        index = index[batch.mask[index].float().sum(dim=1).argsort().cpu()]
        # The longest first: what is left at the end of the queue is short.
        parts = self.parallel.share(index.split(self.trainer.microbatch)[::-1])
        trained = [*self.parameters.values(), *([] if self.critic is None else self.critic.parameters.values())]
        for parameter in trained:
            parameter.grad = None

        def part_gradients(part: tuple[torch.Tensor, bool]) -> tuple[Any, dict[str, torch.Tensor]]:
            rows, counts = part
            return self._gradients(batch.rows(rows), counts * len(rows) / len(index), trained, length)

        results = self.parallel.map(part_gradients, parts, self.policy.device)
        for (part, counts), (gradients, diagnostics) in zip(parts, results, strict=True):
            for parameter, gradient in zip(trained, gradients, strict=False):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            for name, value in diagnostics.items():
                totals.setdefault(name, torch.zeros_like(value))
                if name.endswith("max"):
                    totals[name] = torch.maximum(totals[name], value * counts)
                else:
                    totals[name] = totals[name] + value * (counts * len(part) / len(index))
        self.parallel.reduce(trained)
        totals = {name: self.parallel.total(value, name.endswith("max")) for name, value in totals.items()}
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
        norm = self.parallel.whole({"norm": norm}, everywhere=True)["norm"]
        values = {**{name: float(value) for name, value in totals.items()}, "grad_norm": float(norm)}
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if wrong:
            raise NonFiniteError(
                f"{wrong[0]} is {values[wrong[0]]} in update {update}: nothing of this update is saved; "
                "lower optimiser.learning_rate, or look at the episodes of the last checkpoint"
            )
        self.optimiser.step()
        if self.critic is not None:
            values["value_grad_norm"] = self.critic.step(self.config.clip_norm)
        return values

    def _gradients(
        self, batch: Batch, share: float, trained: list[torch.nn.Parameter], length: float | None
    ) -> tuple[Sequence[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Of one microbatch, which is this share of its minibatch."""
        loss, diagnostics = self._loss(batch, length)
        whole = loss + diagnostics.get("value_loss", 0.0)
        gradients = self.parallel.gradients(whole * share, trained)
        return gradients, {name: value.detach() for name, value in {**diagnostics, "loss": loss}.items()}

    def _loss(self, batch: Batch, length: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden, _, distribution = self.policy.evaluate(batch.codes)
        with torch.no_grad():
            _, reference = self.reference.evaluate_actions(batch.codes)
        kl = exact_kl(distribution, reference)
        trainer = self.trainer
        # Weighted by frame; `grpo_loss` takes the mean over all of them.
        weight = trainer.kl_beta + trainer.sentence_kl_beta * (~self.objective.onsets(batch.codes[:, 0])).float()
        loss, diagnostics = grpo_loss(
            self.objective.log_probs(distribution, batch.codes[:, 0]),
            batch.log_probs,
            batch.advantages,
            weight * kl,
            batch.mask,
            trainer.clip,
            1.0,
            trainer.clip_high,
            sequence_ratio=trainer.algorithm == "gspo",
            length=length,
        )
        with torch.no_grad():
            diagnostics["kl"] = masked_mean(kl, batch.mask).mean()
            diagnostics["entropy"] = masked_mean(entropy(distribution), batch.mask).mean()
        if self.critic is not None and batch.values is not None and batch.returns is not None:
            values = self.critic.values(hidden)
            diagnostics["value_loss"] = value_loss(values, batch.values, batch.returns, batch.mask, self.ppo.value_clip)
        return loss, diagnostics

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the policy, whole; of a group only its first member need be given any (see `parallel`)."""
        return self.parallel.whole(self.policy.lm.state_dict())

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Those that training changes: what a rollout worker needs to be given."""
        return self.parallel.whole({name: value.detach() for name, value in self.parameters.items()})

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put whole weights back, those that are there.

        Raises:
            ValueError: one is unknown or of another shape.
        """
        own = self.policy.lm.state_dict()
        for name, value in weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"weight '{name}' is unknown or has another shape than {tuple(value.shape)}")
            with torch.no_grad():
                own[name].copy_(self.parallel.cut(value, own[name]))

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's state as named tensors (safetensors holds nothing else)."""
        return self.parallel.whole(optimiser_state(self.parameters, self.optimiser))

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave (nothing, before the first update).

        Raises:
            ValueError: a parameter's state is not whole or has another shape.
        """
        load_optimiser_state(self.parameters, self.optimiser, state, self.parallel.cut)
