"""TRL's `DPOTrainer` on dialogues: its losses, metrics and loop, with Moshi's `LMModel` behind them."""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPOTrainer lives in trl.experimental

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from envs.errors import InputError
from rlhf_duplex.data.pair import KINDS, Pair
from rlhf_duplex.learner import NonFiniteError
from rlhf_duplex.optimiser_state import load_optimiser_state, optimiser_state
from rlhf_duplex.policy.bundle import Bundle
from rlhf_duplex.policy.lora import LORA_NAME, adapter_weights, lora_off, merge_weights, part_of
from rlhf_duplex.policy.prompt import make_prompt
from rlhf_duplex.warmstart.arguments import trl_arguments
from rlhf_duplex.warmstart.config import WarmstartConfig, accumulation_steps, set_trained, trained_parts
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, make_objective, stream_ids

_OPTIMISER_NAME, _SCHEDULER_NAME = "optimiser.safetensors", "scheduler.json"


class PairDataset(Dataset):
    """Pairs with their reference log-probabilities `(chosen, rejected)`, or None."""

    def __init__(self, pairs: Sequence[Pair], references: torch.Tensor | None = None) -> None:
        self.pairs, self.references = list(pairs), references

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Pair, tuple[float, float] | None]:
        reference = None
        if self.references is not None:
            chosen, rejected = self.references[index].tolist()
            reference = (chosen, rejected)
        return self.pairs[index], reference


class PreferenceTrainer(DPOTrainer):
    """`DPOTrainer` with another front and back.

    What is TRL's and transformers': every loss but SimPO's (which is `CPOTrainer`'s), the metrics and their names, the
    loop, accumulation, clipping, schedule, devices and sharding. `_compute_loss` asks of a model only that it gives
    the log-probabilities of `input_ids`, which `PairModel` does.

    What is not: `DPOTrainer.__init__` prepares text (a tokenizer, chat templates, a fused head on the hidden states of
    a `PreTrainedModel`, a cache of reference log-probabilities in Arrow files) and would have to be handed a fake of
    each; it is passed by, and what `_compute_loss` reads is set here. Checkpoints are bundles, whole or not there,
    with the optimiser in safetensors instead of pickles. No generator state is kept: the order of the pairs comes from
    the seed, and nothing else is random.

    Args:
        bundle: is trained in place, with its adapters if it has any.
        config: checked.
        train, held_out: pairs with their references.
        run_dir: where checkpoints go.
        callbacks: of transformers' kind.

    Raises:
        InputError: the batch cannot be cut evenly over the devices.
    """

    optimizer: Any  # what transformers sets is not typed
    control: Any

    def __init__(
        self,
        bundle: Bundle,
        config: WarmstartConfig,
        train: PairDataset,
        held_out: PairDataset | None,
        run_dir: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.bundle, self.config, self.run_dir = bundle, config, Path(run_dir)
        self.rates = trained_parts(config)
        set_trained(bundle.lm, config)
        ids = stream_ids(bundle.lm, config.loss.streams)
        args = trl_arguments(config, run_dir)
        args._n_gpu = min(1, args.n_gpu)  # one device a process: nn.DataParallel would part chosen from rejected
        args.gradient_accumulation_steps = accumulation_steps(config, args.world_size)
        Trainer.__init__(
            self,
            model=PairModel(
                bundle.lm,
                config.loss.streams,
                make_objective(bundle.lm, config.loss),
                make_prompt(bundle, config.prompt),
                config.loss.sft_streams if config.loss.sft_weight else None,
            ),
            args=args,
            data_collator=PairCollator(ids, config.loss.span, config.loss.count_pad),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=list(callbacks),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: transformers divides it by the steps
        # What `_compute_loss` reads.
        loss = config.loss
        self.beta, self.label_smoothing = loss.beta, loss.label_smoothing
        self.loss_types, self.loss_weights = [loss.name], [1.0]
        self.precompute_ref_logps = config.reference.mode == "cached"
        self.ref_model: Callable[..., Any] | None = None
        self.f_divergence_type, self.f_alpha_divergence_coef = "reverse_kl", 0.5
        self.ld_alpha, self.use_weighting, self.aux_loss_enabled = None, False, False
        self.maybe_activation_offload_context = nullcontext()
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1
        # What `CPOTrainer.cpo_loss` reads.
        self.loss_type, self.alpha, self.simpo_gamma = loss.name, 0.0, loss.simpo_gamma

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Pairs of an optimiser step, over all devices."""
        pairs = torch.tensor(sum(len(batch["kinds"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean loss of the pairs, times their share of the step's as if all microbatches of a step were alike.

        The last of an epoch may be smaller; transformers means over microbatches and devices, whatever is in them.
        """
        loss = self._compute_loss(model, inputs, return_outputs)
        if num_items_in_batch is None:
            return loss
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return loss * (len(inputs["kinds"]) * parts / num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> torch.Tensor:
        """TRL's loss of a batch, with the rewards of its pairs logged by kind."""
        inputs = dict(inputs)
        kinds = inputs.pop("kinds")
        seen: list[Any] = []

        def remembering(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        if self.loss_type == "simpo":
            loss, chosen, rejected = self._simpo(remembering, inputs)
        else:
            if not self.precompute_ref_logps:
                self.ref_model = partial(self._without_adapters, model, seen)
            loss = super()._compute_loss(remembering, inputs, False)
            chosen, rejected = self.beta * self._log_ratios(seen, inputs)
        self._log_kinds(kinds, chosen, rejected)
        if self.config.loss.sft_weight:
            loss = loss + self.config.loss.sft_weight * seen[0].sft
            self._record({"sft": seen[0].sft.detach()[None]})
        return loss

    def _without_adapters(self, model: Any, seen: list[Any], **kwargs: Any) -> Any:
        with lora_off(self.bundle.lm):
            seen.append(model(**kwargs))
        return seen[-1]

    def _log_ratios(self, seen: Sequence[Any], inputs: dict[str, Any]) -> torch.Tensor:
        """`(2, P)` of what TRL just computed: log pi_theta / pi_ref of chosen and rejected."""
        log_probs = torch.stack(seen[0].log_probs.detach().sum(dim=1).chunk(2))
        if self.precompute_ref_logps:
            return log_probs - torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return log_probs - torch.stack(seen[1].log_probs.sum(dim=1).chunk(2))

    def _simpo(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """SimPO (arXiv 2405.14734, eq. 6) by TRL's `CPOTrainer.cpo_loss`, on log-probabilities per counted token."""
        given = {
            k: v for k, v in inputs.items() if k not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        }
        output = model(**given)
        sums = output.log_probs.sum(dim=1)
        chosen, rejected = (sums / inputs["completion_mask"].sum(dim=1).clamp(min=1)).chunk(2)
        losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(self, chosen, rejected)
        chosen_sum, rejected_sum = sums.detach().chunk(2)
        self._record(
            {
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                "rewards/margins": chosen_rewards - rejected_rewards,
                "logps/chosen": chosen_sum,
                "logps/rejected": rejected_sum,
            }
        )
        return losses.mean(), chosen_rewards, rejected_rewards

    def _log_kinds(self, kinds: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        kinds, chosen, rejected = self.accelerator.gather((kinds, chosen.contiguous(), rejected.contiguous()))
        for index in kinds.unique().tolist():
            rows = kinds == index
            self._record(
                {
                    f"rewards/accuracies/{KINDS[index]}": (chosen[rows] > rejected[rows]).float(),
                    f"rewards/margins/{KINDS[index]}": chosen[rows] - rejected[rows],
                },
                gather=False,
            )

    def _record(self, values: dict[str, torch.Tensor], gather: bool = True) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in values.items():
            value = self.accelerator.gather(value.contiguous()) if gather else value
            self._metrics[mode][name].append(value.mean().item())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As TRL's.

        Raises:
            NonFiniteError: the loss is not finite; nothing of this step is saved.
        """
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise NonFiniteError(
                f"the loss is {float(loss)} in step {self.state.global_step + 1}: nothing of this step is saved; "
                "lower optimiser.learning_rates"
            )
        return loss

    def create_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a group for each part, at its own rate."""
        if self.optimizer is None:
            optimiser = self.config.optimiser
            groups = [
                {"params": [p for n, p in self._trained().items() if part_of(n) == part], "lr": rate}
                for part, rate in self.rates.items()
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=max(self.rates.values()),
                betas=optimiser.betas,
                weight_decay=optimiser.weight_decay,
                fused=self.config.device.startswith("cuda"),  # else with a copy of all weights in between
            )
        return self.optimizer

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by their names in the language model, in the order of the model."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {_lm_name(name): p for name, p in named if p.requires_grad}

    def evaluate(
        self, eval_dataset: PairDataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """TRL's metrics over held-out pairs, means over pairs whatever the batches, in all and by kind.

        `entropy`, `mean_token_accuracy` and `logits` alone are TRL's, means over a batch's tokens. Adds `loss`, and
        for each kind of pair `rewards/accuracies/KIND`, `rewards/margins/KIND`; logged with the prefix `eval_`, as
        transformers does.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        model = self._wrap_model(self.model, training=False)
        self.model.eval()
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for inputs in self.get_eval_dataloader(dataset):
            self._metrics["eval"].clear()
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(inputs)
                loss = self._compute_loss(model, inputs)
            kinds = self.accelerator.gather(inputs["kinds"]).tolist()
            batch = {name: values[-1] for name, values in self._metrics["eval"].items() if name != "num_tokens"}
            batch["loss"] = self.accelerator.gather(loss.detach()).mean().item()
            for name, value in batch.items():
                kind = name.rpartition("/")[2]
                count = kinds.count(KINDS.index(kind)) if kind in KINDS else len(kinds)
                sums[name] += value * count
                counts[name] += count
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_{name}": sums[name] / counts[name] for name in sums}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`checkpoints/step_NNNNNN`, whole or not at all; the oldest beyond `checkpointing.keep` are removed."""
        folder = self.run_dir / "checkpoints" / f"step_{self.state.global_step:06d}"
        temporary = folder.with_name(f".{folder.name}.partial")  # one name for all processes
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(temporary), _internal_call=True)
        self._save_optimizer_and_scheduler(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(temporary / TRAINER_STATE_NAME))
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "flush"):  # the line of this step is on disk before its checkpoint
                    callback.flush(self.state)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            stale = folder.parent.glob(".*step_*")  # and what a kill left of writing in them
            for old in [*sorted(folder.parent.glob("step_*"))[: -self.config.checkpointing.keep], *stale]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """A bundle of the plain model, adapters merged, and beside it the adapters themselves."""
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is None:
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        weights = {_lm_name(name): value for name, value in state_dict.items()}
        self.bundle.save(folder, weights=merge_weights(weights, self.config.lora.scaling))
        adapters = adapter_weights(weights)
        if adapters:
            save_file(adapters, str(folder / LORA_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        name = LORA_NAME if self.config.lora.rank else "model.safetensors"
        path = Path(resume_from_checkpoint) / name
        try:
            saved = load_file(str(path))
            unknown = self.bundle.lm.load_state_dict(saved, strict=not self.config.lora.rank).unexpected_keys
            if unknown:
                raise KeyError(unknown[0])
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise InputError(f"{path} cannot be resumed from ({' '.join(str(error).split())})") from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state = optimiser_state(self._trained(), self._plain_optimiser())
            save_file(state, os.path.join(output_dir, _OPTIMISER_NAME))
            with open(os.path.join(output_dir, _SCHEDULER_NAME), "w") as file:
                json.dump(self.lr_scheduler.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        try:
            load_optimiser_state(
                self._trained(), self._plain_optimiser(), load_file(os.path.join(checkpoint, _OPTIMISER_NAME))
            )
            with open(os.path.join(checkpoint, _SCHEDULER_NAME)) as file:
                schedule = json.load(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{checkpoint} cannot be resumed from ({' '.join(str(error).split())})") from error
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate

    def _plain_optimiser(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: see the class."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: see the class."""


def _lm_name(name: str) -> str:
    return name.removeprefix("module.").removeprefix("lm.")
