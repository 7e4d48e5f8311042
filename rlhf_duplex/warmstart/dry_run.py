"""What a warm start would take, without a weight: memory a device by part, steps (see `rlhf_duplex.memory_model`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from rich.console import Console
from rich.table import Table

from envs.errors import InputError
from envs.frames import frames_in
from rlhf_duplex.data.pair import Pair, read_pairs
from rlhf_duplex.memory_model import (
    GIB,
    Memory,
    count_memory,
    gathered_bytes,
    meta_model,
    model_config,
    saved_bytes,
)
from rlhf_duplex.policy.bundle import meta_mimi
from rlhf_duplex.policy.lora import add_lora
from rlhf_duplex.run_folder import make_console
from rlhf_duplex.warmstart.config import WarmstartConfig, accumulation_steps, set_trained, trained_parts
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, make_objective, stream_ids


def count_activations(config: WarmstartConfig, arguments: Mapping[str, Any], frames: int) -> tuple[int, int]:
    """Bytes of activations of a forward pass of `training.microbatch` pairs of `frames` frames, and of its logits.

    The shapes of the whole pass are checked on the way: it runs, on the meta device.
    """
    half = config.dtype == "bfloat16" or config.training.autocast == "bfloat16"
    lm = meta_model(arguments, torch.bfloat16 if half else torch.float32)
    _prepare(lm, config)
    sft = config.loss.sft_streams if config.loss.sft_weight else None
    model = PairModel(lm, config.loss.streams, make_objective(lm, config.loss), sft_streams=sft)
    ids = stream_ids(lm, config.loss.streams)
    reply = max(2, frames // 2)
    context, either = (torch.zeros(1 + lm.n_q, n, dtype=torch.long) for n in (frames - reply, reply))
    pair = Pair("dry", "content", "train", context, either, either, (0, reply), (0, reply))
    batch = PairCollator(ids, config.loss.span)([(pair, None)] * config.training.microbatch)
    batch = {name: value.to("meta") for name, value in batch.items()}
    with torch.device("meta"):
        kept = saved_bytes(lambda: model(**batch), dict(lm.named_parameters()))
        output = model(**batch)
    if tuple(output.log_probs.shape) != (2 * config.training.microbatch, len(ids.targets) * frames):
        raise RuntimeError(f"the forward pass gives log-probabilities of shape {tuple(output.log_probs.shape)}")
    rows = 2 * config.training.microbatch * frames
    cards = lm.text_card + (max(len(ids.targets), len(model.sft_targets)) - 1) * lm.card
    logits = 4 * rows * cards  # float32: their gradient, the largest tensor of the backward pass
    if config.training.gradient_checkpointing:
        layers = len(lm.transformer.layers)
        inputs = layers * rows * lm.dim * (2 if half else 4)
        kept = inputs + max(0, kept - logits) // layers + logits
    return kept, logits


def _prepare(lm: LMModel, config: WarmstartConfig) -> None:
    if config.lora.rank:
        add_lora(lm, seed=config.seed, **vars(config.lora))
    set_trained(lm, config)


def dry_run(config: WarmstartConfig, console: Console | None = None) -> dict[str, Any]:
    """Print what a warm start would take; gives the figures.

    Raises:
        InputError: what is wrong with the configuration, the checkpoint's, or the pairs.
    """
    console = console or make_console()
    sizes = model_config(config.checkpoint)
    lm = meta_model(sizes.lm, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype])
    _prepare(lm, config)
    training = config.training
    pairs, frames, counted = _pairs(config, meta_mimi(sizes.mimi, config.checkpoint).frame_rate)
    memory = count_memory(lm, training.devices, training.fsdp)
    activations, logits = count_activations(config, sizes.lm, frames)
    steps = training.epochs * -(-pairs // training.batch_size)
    half = config.dtype == "bfloat16" or training.autocast == "bfloat16"
    working = {"activations": activations, "gradient of the logits": logits}
    if training.fsdp and training.devices > 1:
        working["gathered weights"] = gathered_bytes(lm, 2 if half else 4)
    total = sum(part.total for part in memory.values()) + sum(working.values())
    console.print(f"checkpoint {config.checkpoint}: {sizes.source}")
    console.print(
        f"a frame has {1 + lm.n_q} streams; a batch of {training.microbatch} pairs is "
        f"({2 * training.microbatch}, {1 + lm.n_q}, {frames}) tokens, text logits "
        f"({2 * training.microbatch}, {frames}, {lm.text_card})"
    )
    rates = ", ".join(f"{part} {rate:g}" for part, rate in trained_parts(config).items())
    console.print(
        f"loss {config.loss.name}, beta {config.loss.beta}, streams {config.loss.streams}; learning rates: {rates}; "
        f"{config.optimiser.schedule} schedule, {training.epochs} epoch{'s' if training.epochs > 1 else ''}"
    )
    console.print(_table(memory, working, total, training.devices, training.fsdp))
    console.print(
        f"{steps} steps of {training.batch_size} pairs ({pairs} pairs {counted}), "
        f"each in {accumulation_steps(config, training.devices)} forward pass(es) a device"
    )
    console.print(f"dry run: the configuration holds; {total / GIB:.1f} GiB a device, nothing was loaded or written")
    return {
        "memory": memory,
        "working": working,
        "total": total,
        "steps": steps,
        "pairs": pairs,
        "frames": frames,
    }


def _pairs(config: WarmstartConfig, frame_rate: float) -> tuple[int, int, str]:
    """Training pairs, frames of the longest, and where that was learned."""
    path, assumed = Path(config.pairs), config.dry_run
    if not path.is_file():
        if not assumed.pairs:
            raise InputError(f"pairs {path} do not exist: make them, or say what to reckon with in dry_run.pairs")
        return assumed.pairs, frames_in(assumed.seconds, frame_rate), f"of {assumed.seconds:g} s are assumed"
    train = [pair for pair in read_pairs(path) if pair.split == "train"]
    if not train:
        raise InputError("none of the pairs has split 'train': there is nothing to learn from")
    longest = max(p.context.shape[1] + max(p.chosen.shape[1], p.rejected.shape[1]) for p in train)
    return len(train), longest, f"in {path}, the longest of {longest / frame_rate:.1f} s"


def _table(memory: Mapping[str, Memory], working: Mapping[str, int], total: int, devices: int, sharded: bool) -> Table:
    how = f"sharded over {devices}" if sharded and devices > 1 else "whole on each" if devices > 1 else "one device"
    table = Table(title=f"GiB a device ({how})", title_justify="left")
    for column in ("part", "parameters", "trained", "weights", "gradients", "optimiser", "all"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, found in memory.items():
        cells = [f"{found.parameters / 1e6:,.1f} M", f"{found.trained / 1e6:,.1f} M"]
        cells += [f"{value / GIB:.2f}" for value in (found.weights, found.gradients, found.optimiser, found.total)]
        table.add_row(part, *cells)
    for name, size in working.items():
        table.add_row(name, *[""] * 5, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("all", *[""] * 5, f"{total / GIB:.2f}")
    return table
