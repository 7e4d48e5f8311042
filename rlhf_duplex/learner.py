"""One update: from scored episodes to new weights.

Shapes: `B` episodes, `T` frames, `K` streams, `V` text vocabulary.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf_duplex.algorithms.losses import grpo_loss, masked_mean, truncated_weights
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.algorithms.values import (
    explained_variance,
    generalised_advantages,
    value_loss,
    whitened_frames,
)
from rlhf_duplex.batch import Batch
from rlhf_duplex.config import OptimiserConfig, PpoConfig, TrainerConfig
from rlhf_duplex.critic import Critic
from rlhf_duplex.optimiser_state import load_optimiser_state, optimiser_state
from rlhf_duplex.parallel import Alone
from rlhf_duplex.policy.lora import has_lora, is_fresh, part_of, without_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.scoring import score_text


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite: the run stops before anything is saved."""


class Learner:
    """The optimiser, the reference policy, and the update.

    Args:
        policy: is trained in place.
        trainer, optimiser: configuration.
        seed: of the order of minibatches, and of a value function's first weights.
        ppo: of the value function, which `trainer.algorithm` `ppo` has.
        parallel: the group of learners that share the update.
        apart: tokens that the objective tells from others where a sentence may begin.

    The reference is a frozen copy of the policy as it is now: of a warm-started policy if that is what it is, with
    adapters as without. Weights that are not trained are shared with it: with adapters it is the model with them off,
    and costs no memory. Trained weights in bfloat16 have a float32 copy, which the optimiser works on (a rate of 2e-7
    is lost in 8 bits).
    """

    def __init__(
        self,
        policy: MoshiPolicy,
        trainer: TrainerConfig,
        optimiser: OptimiserConfig,
        seed: int,
        ppo: PpoConfig | None = None,
        parallel: Alone | None = None,
        apart: Sequence[int] = (),
    ) -> None:
        self.trainer, self.config, self.seed, self.ppo = trainer, optimiser, seed, ppo or PpoConfig()
        self.parallel = parallel or Alone()
        self.objective = Objective(
            trainer.objective,
            policy.lm.text_padding_token_id,
            policy.lm.end_of_text_padding_id,
            trainer.onset_frames,
            tuple(apart),
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
        uncut = MoshiPolicy(reference, replace(policy.sampling, text_top_k=0), policy.prompt)
        self.policy, self.reference = self.parallel.prepare(policy, uncut)
        self.parameters = {n: p for n, p in policy.lm.named_parameters() if p.requires_grad}
        self.masters = {
            n: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for n, p in self.parameters.items()
        }
        self.critic = None
        if trainer.algorithm == "ppo":
            self.critic = Critic(policy.lm.dim, self.ppo, seed, policy.device)
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
        """What is computed with the policy as it is before the update: PPO's advantages, importance weights, the
        log-probabilities of what was done as the objective sees it; and how they differ from the recorded ones."""
        trainer = self.trainer
        weighted = trainer.ahead or trainer.importance == "truncated"
        if self.critic is None and not weighted and trainer.objective == "tokens":
            return batch, {}
        tokens, done, values = self._before(batch)
        drawn, mask = batch.log_probs, batch.mask
        log_ratio = torch.where(mask, tokens - drawn, torch.zeros_like(drawn))
        figures = {
            "mismatch/ratio_mean": float(masked_mean(log_ratio.exp(), mask).mean()),
            "mismatch/ratio_max": float(log_ratio.exp().max()),
            "mismatch/kl": float(masked_mean(torch.expm1(log_ratio) - log_ratio, mask).mean()),
        }
        if weighted:
            weights = truncated_weights(tokens, drawn, mask, trainer.importance_cap)
            figures["importance_mean"] = float(weights[mask].mean())
            figures["importance_truncated"] = float((weights[mask] >= trainer.importance_cap).float().mean())
            batch = replace(batch, weights=weights)
        if weighted or trainer.objective != "tokens":
            batch = replace(batch, log_probs=done)
        if self.critic is not None:
            advantages, returns = generalised_advantages(
                batch.advantages, values, mask, self.ppo.gamma, self.ppo.gae_lambda
            )
            figures["explained_variance"] = explained_variance(values, returns, mask)
            batch = replace(batch, advantages=whitened_frames(advantages, mask), values=values, returns=returns)
        return batch, figures

    def _before(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, T)` each: log-probabilities of the tokens, of what was done as the objective sees it, and values."""

        def evaluate(part: tuple[torch.Tensor, bool]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            with torch.no_grad():  # of this thread
                rows = batch.rows(part[0])
                scores = score_text(self.policy, rows.codes, rows.mask, objective=self.objective, critic=self._critic)
                return scores.tokens, scores.done, scores.values

        result = torch.zeros(3, *batch.log_probs.shape, device=batch.log_probs.device)
        order = batch.mask.sum(dim=1).argsort(descending=True).cpu()
        parts = self.parallel.share(order.split(self.trainer.microbatch))
        for (index, counts), found in zip(parts, self.parallel.map(evaluate, parts, self.policy.device), strict=True):
            for place, values in enumerate(found if counts else ()):
                result[place, index, : values.shape[1]] = values
        tokens, done, values = self.parallel.total(result).unbind()
        return tokens, done, values

    @property
    def _critic(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return None if self.critic is None else self.critic.values

    def _step(self, batch: Batch, index: torch.Tensor, update: int, length: float | None) -> dict[str, float]:
        totals: dict[str, torch.Tensor] = {}
        # Similar lengths together: less padding in each forward pass. The sum over microbatches is the same.
        index = index[batch.mask[index].float().sum(dim=1).argsort().cpu()]
        # The longest first: what is left at the end of the queue is short.
        parts = self.parallel.share(index.split(self.trainer.microbatch)[::-1])
        heads = [] if self.critic is None else list(self.critic.parameters.values())
        trained, stepped = [*self.parameters.values(), *heads], [*self.masters.values(), *heads]
        for parameter in (*trained, *stepped):
            parameter.grad = None

        def part_gradients(part: tuple[torch.Tensor, bool]) -> tuple[Any, dict[str, torch.Tensor]]:
            rows, counts = part
            return self._gradients(batch.rows(rows), counts * len(rows) / len(index), trained, length)

        results = self.parallel.map(part_gradients, parts, self.policy.device)
        for (part, counts), (gradients, diagnostics) in zip(parts, results, strict=True):
            for master, gradient in zip(stepped, gradients, strict=False):
                if gradient is not None:
                    gradient = gradient.to(master.dtype)
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            for name, value in diagnostics.items():
                totals.setdefault(name, torch.zeros_like(value))
                if name.endswith("max"):
                    totals[name] = torch.maximum(totals[name], value * counts)
                else:
                    totals[name] = totals[name] + value * (counts * len(part) / len(index))
        for parameter, master in zip(trained, stepped, strict=True):
            if parameter.grad is not None and master is not parameter:  # of a backward pass that wrote them there
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
        self.parallel.reduce(stepped)
        totals = {name: self.parallel.total(value, name.endswith("max")) for name, value in totals.items()}
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.clip_norm)
        norm = self.parallel.whole({"norm": norm}, everywhere=True)["norm"]
        values = {**{name: float(value) for name, value in totals.items()}, "grad_norm": float(norm)}
        if self.critic is not None:
            values["value_grad_norm"] = self.critic.clip(self.config.clip_norm)
        checked = [name for name in ("loss", "grad_norm", "value_loss", "value_grad_norm") if name in values]
        wrong = [name for name in checked if not math.isfinite(values[name])]
        if wrong:
            raise NonFiniteError(
                f"{wrong[0]} is {values[wrong[0]]} in update {update}: nothing of this update is saved; "
                f"lower {'ppo.value_' if wrong[0].startswith('value') else 'optimiser.'}"
                "learning_rate, or look at the episodes of the last checkpoint"
            )
        self.optimiser.step()
        self._to_policy()
        if self.critic is not None:
            self.critic.optimiser.step()
        return values

    @torch.no_grad()
    def _to_policy(self) -> None:
        """The float32 copies' values into the policy's weights."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _gradients(
        self, batch: Batch, share: float, trained: list[torch.nn.Parameter], length: float | None
    ) -> tuple[Sequence[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Of one microbatch, which is this share of its minibatch."""
        loss, diagnostics = self._loss(batch, length)
        whole = loss + diagnostics.get("value_loss", 0.0)
        gradients = self.parallel.gradients(whole * share, trained)
        return gradients, {name: value.detach() for name, value in {**diagnostics, "loss": loss}.items()}

    def _loss(self, batch: Batch, length: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trainer = self.trainer
        anchored, openings = trainer.audio_beta > 0, trainer.opening_kl_beta > 0
        scores = score_text(
            self.policy,
            batch.codes,
            batch.mask,
            self.reference,
            self.objective,
            anchored,
            self._critic,
            word_kl=openings,
        )
        # Weighted by frame; `grpo_loss` takes the mean over all of them.
        onsets = self.objective.onsets(batch.codes[:, 0])
        kl = (trainer.kl_beta + trainer.sentence_kl_beta * (~onsets).float()) * scores.kl
        if openings:
            kl = kl + trainer.opening_kl_beta * onsets.float() * scores.word_kl
        loss, diagnostics = grpo_loss(
            scores.done,
            batch.log_probs,
            batch.advantages,
            kl,
            batch.mask,
            trainer.clip,
            1.0,
            trainer.clip_high,
            sequence_ratio=trainer.algorithm == "gspo",
            length=length,
            weights=batch.weights,
        )
        if openings:
            diagnostics["opening_kl"] = masked_mean(scores.word_kl, batch.mask & onsets).mean().detach()
        if anchored:
            drift = masked_mean(scores.drift, batch.mask).mean()
            loss = loss + trainer.audio_beta * drift
            diagnostics["audio_drift"] = drift.detach()
        with torch.no_grad():
            diagnostics["kl"] = masked_mean(scores.kl, batch.mask).mean()
            diagnostics["entropy"] = masked_mean(scores.entropy, batch.mask).mean()
        if batch.values is not None and batch.returns is not None:
            diagnostics["value_loss"] = value_loss(
                scores.values, batch.values, batch.returns, batch.mask, self.ppo.value_clip
            )
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
        """The optimiser's state as named tensors (safetensors holds nothing else), float32 copies of weights in it."""
        copies = {n: m for n, m in self.masters.items() if m is not self.parameters[n]}
        kept = {f"master/{name}": master.detach().clone() for name, master in copies.items()}
        return self.parallel.whole(optimiser_state(self.masters, self.optimiser) | kept)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave (nothing, before the first update).

        Raises:
            ValueError: a parameter's state is not whole or has another shape.
        """
        load_optimiser_state(self.masters, self.optimiser, state, self.parallel.cut)
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    known = f"master/{name}" in state
                    master.copy_(self.parallel.cut(state[f"master/{name}"], master) if known else self.parameters[name])
