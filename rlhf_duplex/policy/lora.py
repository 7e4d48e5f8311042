"""Low-rank adapters (LoRA, arXiv 2106.09685) in two flavours, both in place on Moshi's `LMModel`.

- `moshi`: Moshi's own `LoRALinear` on every linear layer of the chosen parts; what is exported is read by
  `moshi.server --lora-weight`.
- `peft`: PEFT's layers on every linear layer but the attention's `in_projs`: Moshi asks the type of those when it makes
  its key-value cache, and refuses any it does not know.

Either way the layers are called as modules (a subclass of `nn.Linear` inside `gating` would be bypassed: Moshi reads
its weight there). The scale of an adapter is `scaling`, alpha / rank in PEFT's words.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from safetensors.torch import save_file
from torch import nn

from envs.errors import InputError
from envs.files import replacing

FLAVOURS = ("moshi", "peft")
PARTS = ("temporal", "depth", "embeddings")
LORA_NAME = "lora.safetensors"
_BASE_NAMES = ("frozen_W.", "base_layer.")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: `temporal`, `depth`, `embeddings` or `lora`."""
    if ".lora_" in name:
        return "lora"
    if name.startswith(("emb.", "text_emb.", "depformer_emb.", "depformer_text_emb.")):
        return "embeddings"
    return "depth" if name.startswith(("depformer", "linears")) else "temporal"


def is_adapted(name: str) -> bool:
    """Whether a parameter is the weight of a layer that has an adapter."""
    return any(word in name for word in _BASE_NAMES)


def add_lora(
    lm: LMModel,
    rank: int,
    scaling: float = 2.0,
    flavour: str = "moshi",
    parts: Sequence[str] = ("temporal",),
    seed: int = 0,
) -> list[str]:
    """Put adapters on the linear layers of some parts; they change nothing yet (B = 0), and they alone are trained.

    Args:
        lm: is changed in place.
        rank: of the adapters.
        scaling: of B A.
        flavour: `moshi` or `peft`.
        parts: `temporal`, `depth` or both.
        seed: of A.

    Returns:
        The names of the layers that have one.

    Raises:
        InputError: an unknown flavour or part, adapters that are there already, or no layer to put one on.
    """
    if flavour not in FLAVOURS:
        raise InputError(f"lora.flavour '{flavour}' is not known: choose {' or '.join(FLAVOURS)}")
    wrong = [part for part in parts if part not in ("temporal", "depth")]
    if wrong or not parts:
        raise InputError(f"lora.parts must name temporal, depth or both, found {list(parts)}")
    if has_lora(lm):
        raise InputError("the model has adapters already: merge them first")
    # Not those inside an embedding (low-rank embeddings), nor with a bias (Moshi's layer has none).
    names = [
        name
        for name, module in lm.named_modules()
        if type(module) is nn.Linear and module.bias is None and part_of(name + ".") in parts
    ]
    if flavour == "peft":
        names = [name for name in names if ".in_projs." not in name]
    if not names:
        raise InputError(f"the parts {list(parts)} have no linear layer for adapters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if flavour == "moshi":
            _add_moshi(lm, names, rank, scaling)
        else:
            _add_peft(lm, names, rank, scaling)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(part_of(name) == "lora")
    return names


def _add_moshi(lm: LMModel, names: Sequence[str], rank: int, scaling: float) -> None:
    for name in names:
        parent = lm.get_submodule(name.rpartition(".")[0])
        linear = lm.get_submodule(name)
        layer = LoRALinear(linear.in_features, linear.out_features, rank, scaling, device="meta")
        down, up = torch.empty(rank, linear.in_features), torch.zeros(linear.out_features, rank)
        nn.init.kaiming_uniform_(down, a=5**0.5)  # on the CPU, so that every device starts from the same adapters
        for inner, value in ((layer.lora_A, down), (layer.lora_B, up)):
            inner.weight = nn.Parameter(value.to(device=linear.weight.device, dtype=linear.weight.dtype))
        layer.frozen_W = linear
        setattr(parent, name.rpartition(".")[2], layer)


def _add_peft(lm: LMModel, names: Sequence[str], rank: int, scaling: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=list(names)), lm)


def has_lora(lm: nn.Module) -> bool:
    """Whether the model has adapters of either flavour."""
    return any(".lora_" in name for name, _ in lm.named_parameters())


@contextmanager
def lora_off(lm: nn.Module) -> Iterator[None]:
    """The model without its adapters: the one that they were put on.

    After a warm start that is not the warm-started policy unless its adapters were merged first.
    """
    switched: list[tuple[LoRALinear, float]] = []
    peft_layers = _peft_layers(lm)
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            switched.append((module, module.scaling))
            module.scaling = 0.0
    for layer in peft_layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for module, scaling in switched:
            module.scaling = scaling
        for layer in peft_layers:
            layer.enable_adapters(True)


def without_lora(lm: LMModel) -> LMModel:
    """The model with its adapters taken off, in place: the one that they were put on."""
    for name, module in list(lm.named_modules()):
        base = module.frozen_W if isinstance(module, LoRALinear) else getattr(module, "base_layer", None)
        if base is not None:
            setattr(lm.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], base)
    return lm


def merged_copy(lm: LMModel) -> LMModel:
    """A plain model that acts as this one does now: a frame of it costs no adapters.

    Weights that no adapter is on are shared with it; the others are its own, and `merge_into` brings them up to date.
    """
    adapted = {id(value) for name, value in lm.named_parameters() if is_adapted(name)}
    shared = {id(value): value for value in lm.parameters() if id(value) not in adapted}
    plain = without_lora(copy.deepcopy(lm, shared)).eval()
    merge_into(plain, lm)
    return plain


@torch.no_grad()
def merge_into(plain: LMModel, lm: LMModel) -> None:
    """Write W + scaling B A of the adapted layers into a model that `merged_copy` made of this one."""
    targets = dict(plain.named_parameters())
    for name, module in lm.named_modules():
        base = module.frozen_W if isinstance(module, LoRALinear) else getattr(module, "base_layer", None)
        if base is None:
            continue
        down, up = adapter_of(dict(module.named_parameters()), "")
        scaling = module.scaling if isinstance(module, LoRALinear) else module.scaling["default"]
        target = targets[f"{name}.weight"]
        target.requires_grad_(False)
        target.copy_(base.weight.float() + scaling * (up.float() @ down.float()))


def is_fresh(lm: nn.Module) -> bool:
    """Whether the adapters change nothing yet (shapes without storage are taken for new)."""
    known = [value for name, value in lm.named_parameters() if ".lora_B" in name and not value.is_meta]
    return not any(bool(value.any()) for value in known)


def _peft_layers(lm: nn.Module) -> list[Any]:
    names = [name for name, _ in lm.named_parameters() if ".base_layer." in name]
    return [lm.get_submodule(name.split(".base_layer.")[0]) for name in names]


def merged_weights(lm: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The weights of the plain model that acts as this one does; without adapters, its own.

    `weights`: of this model, where they are not those in memory (shards gathered).
    """
    scaling = 0.0
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            scaling = module.scaling
    for layer in _peft_layers(lm):
        scaling = layer.scaling["default"]
    return merge_weights(lm.state_dict() if weights is None else weights, scaling)


def merge_weights(weights: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """The weights of the plain model, W + scaling B A, from a state dict with adapters of either flavour.

    Works on names and tensors alone, so that it serves a state dict gathered from many devices as well; one without
    adapters comes back as it is.
    """
    merged = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        base = next((word for word in _BASE_NAMES if word in name), None)
        if base is not None:
            down, up = adapter_of(weights, name.split(base)[0])
            value = (value.float() + scaling * (up.float() @ down.float())).to(value.dtype)
            name = name.replace(base, "")
        merged[name] = value
    return merged


def adapter_of(weights: Mapping[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the layer whose name is `prefix` (with its point), whatever the flavour."""
    suffix = "weight" if f"{prefix}lora_A.weight" in weights else "default.weight"
    return weights[f"{prefix}lora_A.{suffix}"], weights[f"{prefix}lora_B.{suffix}"]


def adapter_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters alone, on the CPU: what training needs besides the base to go on."""
    return {n: v.detach().cpu().contiguous().clone() for n, v in weights.items() if ".lora_" in n}


def export_moshi_lora(
    weights: Mapping[str, torch.Tensor], lm: LMModel, config: Mapping[str, Any], rank: int, scaling: float, folder: Path
) -> Path:
    """Write adapters for `moshi.server --lora-weight FOLDER/lora.safetensors --config-path FOLDER/config.json`.

    The server puts an adapter on *every* linear layer and leaves one that the file lacks without storage; layers that
    have none here are therefore written with B = 0.

    Args:
        weights: a state dict with adapters of either flavour, or the adapters alone.
        lm: the model it is of, with adapters or without, on any device.
        config: the base bundle's config.json.
        rank, scaling: of the adapters.
        folder: appears whole, or not at all.
    """
    found: dict[str, torch.Tensor] = {}
    for name, module in lm.named_modules():
        inner = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or ".lora_" in f".{name}":
            continue
        base = name.rpartition(".")[0] if inner in ("frozen_W", "base_layer") else name
        if any(f"{base}.lora_A{suffix}.weight" in weights for suffix in ("", ".default")):
            down, up = adapter_of(weights, f"{base}.")
        else:
            down = torch.zeros(rank, module.in_features, dtype=module.weight.dtype)
            up = torch.zeros(module.out_features, rank, dtype=module.weight.dtype)
        found[f"{base}.lora_A.weight"] = down.detach().cpu().contiguous().clone()
        found[f"{base}.lora_B.weight"] = up.detach().cpu().contiguous().clone()
    server = {**config, "lora": True, "lora_rank": rank, "lora_scaling": scaling, "lora_name": LORA_NAME}
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(found, str(temporary / LORA_NAME))
        (temporary / "config.json").write_text(json.dumps(server, indent=2) + "\n")
    return folder / LORA_NAME
