"""What a training run would take, without a weight: sizes on the meta device, memory a device by part, steps.

Parameters, gradients and optimiser states are counted from the model's real configuration. What the backward pass
keeps is counted as well, not guessed: the forward pass is run on the meta device, where tensors have shapes and no
storage, and autograd's saved tensors are added up. Not in it: what the allocator loses to fragments, communication
buffers, and the evaluation of the axes.
"""

import json
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from envs.errors import InputError
from rlhf_duplex.data.pair import Pair, read_pairs
from rlhf_duplex.policy.bundle import find_bundle
from rlhf_duplex.policy.lora import add_lora, part_of
from rlhf_duplex.run_folder import make_console
from rlhf_duplex.warmstart.config import WarmstartConfig, accumulation_steps, set_trained, trained_parts
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, make_objective, stream_ids

FRAME_RATE = 12.5
GIB = 2**30
# Repositories without a config.json: Moshi's loaders take their own defaults for them, and so do we.
_MOSHI_7B = ("kyutai/moshiko-pytorch-bf16", "kyutai/moshika-pytorch-bf16")
_NOT_LM = (
    "moshi_name",
    "mimi_name",
    "mimi_config_name",
    "tokenizer_name",
    "lora_name",
    "model_type",
    "lm_gen_config",
    "tts_config",
    "stt_config",
    "model_id",
)


@dataclass(frozen=True)
class Memory:
    """Bytes a device by part of the model: parameters, of these trained, and what they cost.

    Attributes:
        parameters, trained: numbers, of the whole model.
        weights, gradients, optimiser: bytes on one device.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimiser: int

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return self.weights + self.gradients + self.optimiser


def model_config(checkpoint: str) -> tuple[dict[str, Any], str]:
    """The arguments of `LMModel` that a checkpoint has, and where they were read; no weight is fetched.

    Raises:
        InputError: there is no configuration to be had.
    """
    folder = find_bundle(checkpoint)
    if folder is None and checkpoint in _MOSHI_7B:
        return dict(loaders._lm_kwargs), "Moshi's own defaults for the 7B"
    if folder is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(checkpoint, "config.json"))
        except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, OSError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"config.json of '{checkpoint}' cannot be had from the model hub ({first})") from error
    else:
        path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        return {k: v for k, v in config.items() if k not in _NOT_LM}, str(path)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of a bundle ({error})") from error


def meta_model(arguments: Mapping[str, Any], dtype: torch.dtype) -> LMModel:
    """Moshi's language model with shapes and no storage.

    Raises:
        InputError: the arguments are not those of an `LMModel`.
    """
    try:
        # Embeddings and norms of Moshi's do not all take the device that they are told.
        with torch.device("meta"):
            return loaders.get_moshi_lm(None, dict(arguments), device="meta", dtype=dtype)
    except (TypeError, AssertionError, KeyError, ValueError) as error:
        raise InputError(f"the checkpoint's config.json: {' '.join(str(error).split())}") from error


def count_memory(lm: torch.nn.Module, devices: int, sharded: bool, optimiser_states: int = 2) -> dict[str, Memory]:
    """Memory a device by part of the model, as the model stands: its number types, and what of it requires gradients.

    Args:
        lm: on any device, the meta device too.
        devices: that share it, where it is `sharded` (FSDP's full sharding).
        sharded: whether weights, gradients and optimiser are cut over the devices.
        optimiser_states: tensors of a parameter's size that the optimiser keeps (AdamW: 2).
    """
    share = devices if sharded else 1
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    for name, parameter in lm.named_parameters():
        size, trained = parameter.numel() * parameter.element_size(), parameter.requires_grad
        values = (
            parameter.numel(),
            parameter.numel() * trained,
            size // share,
            size * trained // share,
            optimiser_states * size * trained // share,
        )
        counts[part_of(name)] = [a + b for a, b in zip(counts[part_of(name)], values, strict=True)]
    return {part: Memory(*values) for part, values in counts.items()}


def gathered_bytes(lm: LMModel, compute_size: int) -> int:
    """Bytes that full sharding gathers on a device at a time: all outside the layers, and two layers (one ahead).

    Args:
        lm: on any device.
        compute_size: bytes of a number in the type that products are computed in.
    """
    layers = [*lm.transformer.layers, *(lm.depformer.layers if lm.depformer is not None else [])]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in lm.parameters()) - sum(sizes)
    return (rest + 2 * max(sizes, default=0)) * compute_size


class _Held(TorchDispatchMode):
    """Adds up the storages that are made and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that a function holds at once, of what it makes itself; on the meta device, too."""
    with torch.no_grad(), _Held() as held:
        function()
    return held.most


def saved_bytes(forward: Callable[[], Any], parameters: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `forward`, each storage once, weights not."""
    weights = {value.untyped_storage()._cdata for value in parameters.values()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held on to, so that no storage takes another's place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    found = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    del output
    return found


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
    arguments, source = model_config(config.checkpoint)
    lm = meta_model(arguments, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype])
    _prepare(lm, config)
    training = config.training
    pairs, frames, counted = _pairs(config)
    memory = count_memory(lm, training.devices, training.fsdp)
    activations, logits = count_activations(config, arguments, frames)
    steps = training.epochs * -(-pairs // training.batch_size)
    half = config.dtype == "bfloat16" or training.autocast == "bfloat16"
    working = {"activations": activations, "gradient of the logits": logits}
    if training.fsdp and training.devices > 1:
        working["gathered weights"] = gathered_bytes(lm, 2 if half else 4)
    total = sum(part.total for part in memory.values()) + sum(working.values())
    console.print(f"checkpoint {config.checkpoint}: {source}")
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


def _pairs(config: WarmstartConfig) -> tuple[int, int, str]:
    """Training pairs, frames of the longest, and where that was learned."""
    path, assumed = Path(config.pairs), config.dry_run
    if not path.is_file():
        if not assumed.pairs:
            raise InputError(f"pairs {path} do not exist: make them, or say what to reckon with in dry_run.pairs")
        return assumed.pairs, round(assumed.seconds * FRAME_RATE), f"of {assumed.seconds:g} s are assumed"
    train = [pair for pair in read_pairs(path) if pair.split == "train"]
    if not train:
        raise InputError("none of the pairs has split 'train': there is nothing to learn from")
    longest = max(p.context.shape[1] + max(p.chosen.shape[1], p.rejected.shape[1]) for p in train)
    return len(train), longest, f"in {path}, the longest of {longest / FRAME_RATE:.1f} s"


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
