"""What a model takes, without a weight: sizes on the meta device, memory a device by part.

Parameters, gradients and optimiser states are counted from the model's real configuration. What the backward pass
keeps is counted as well, not guessed: the forward pass is run on the meta device, where tensors have shapes and no
storage, and autograd's saved tensors are added up. Not in it: what the allocator loses to fragments, communication
buffers, and the evaluation of the axes.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from envs.errors import InputError
from rlhf_duplex.policy.bundle import find_bundle
from rlhf_duplex.policy.bundle_config import complete_sizes, read_config, read_json, read_mimi_config
from rlhf_duplex.policy.lora import part_of

GIB = 2**30
OPTIMISER_STATES = 2  # tensors of a parameter's size that AdamW keeps
# Repositories whose config.json is missing or has no sizes: their own loaders know them, and so do we, with no network.
_SEVEN_B = ("kyutai/moshiko-pytorch-bf16", "kyutai/moshika-pytorch-bf16", "nvidia/personaplex-7b-v1")


@dataclass(frozen=True)
class ModelConfig:
    """What is built from a checkpoint's configuration.

    Attributes:
        lm: the arguments of `LMModel`.
        mimi: the sizes of a Mimi other than Moshi's own, or None.
        source: where they were read.
    """

    lm: dict[str, Any]
    mimi: dict[str, Any] | None
    source: str


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


def model_config(checkpoint: str) -> ModelConfig:
    """The sizes of a checkpoint, as they will be when it is loaded; no weight is fetched, none has to be there.

    Raises:
        InputError: there is no configuration to be had.
    """
    folder = find_bundle(checkpoint)
    if folder is not None:
        config = read_config(folder)
        sizes = complete_sizes(config, folder.name)
        return ModelConfig(sizes, read_mimi_config(folder, config), str(folder / "config.json"))
    if checkpoint in _SEVEN_B:
        return ModelConfig(complete_sizes({}, checkpoint), None, "Moshi's own defaults for the 7B")
    path = _from_hub(checkpoint, "config.json")
    config = read_json(path)
    name = config.get("mimi_config_name")
    mimi = None if name is None else read_json(_from_hub(checkpoint, name))
    return ModelConfig(complete_sizes(config, checkpoint), mimi, str(path))


def _from_hub(repository: str, name: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return loaders.hf_get(name, repository)
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} of '{repository}' cannot be had from the model hub ({first})") from error


def meta_model(arguments: Mapping[str, Any], dtype: torch.dtype) -> LMModel:
    """Moshi's language model with shapes and no storage.

    Raises:
        InputError: the arguments are not those of an `LMModel`.
    """
    try:
        # Embeddings and norms of Moshi's do not all take the device that they are told.
        with torch.device("meta"):
            return loaders.get_moshi_lm(None, dict(arguments), device="meta", dtype=dtype)
    except (TypeError, AssertionError, KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"the checkpoint's config.json: {' '.join(str(error).split())}") from error


def count_memory(lm: torch.nn.Module, devices: int, sharded: bool) -> dict[str, Memory]:
    """Memory a device by part of the model, as the model stands: its number types, and what of it requires gradients.

    Args:
        lm: on any device, the meta device too.
        devices: that share it, where it is `sharded` (FSDP's full sharding).
        sharded: whether weights, gradients and optimiser are cut over the devices.
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
            OPTIMISER_STATES * size * trained // share,
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
