"""Bundles: a policy in Moshi's own folder layout, read and written so that `python -m moshi.server` can serve it.

A bundle holds `config.json`, the language model and Mimi as safetensors, and the SentencePiece tokenizer, exactly what
`moshi.models.loaders.CheckpointInfo` reads. Everything is checked against the files' headers before a weight is read.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, get_mimi
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from envs.files import replacing
from rlhf_duplex.policy.bundle_config import (
    NAMES,
    NOT_LM,
    complete_sizes,
    named_file,
    read_config,
    read_mimi_config,
)
from rlhf_duplex.policy.codec import MimiCodec, agent_codebooks
from rlhf_duplex.policy.personaplex import expand_depth, is_personaplex

NANO = "nano"
NANO_FOLDER = Path(__file__).parent.parent / "nano"


@dataclass
class Bundle:
    """A loaded model folder.

    Attributes:
        config: what config.json says (the arguments of `LMModel`, file names, generation defaults).
        mimi_config: the sizes of a Mimi other than the 24 kHz one, or None.
        lm, mimi, tokenizer: Moshi's own classes.
        folder: where it was read from.
    """

    config: dict[str, Any]
    mimi_config: dict[str, Any] | None
    lm: LMModel
    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor
    folder: Path

    @property
    def codec(self) -> MimiCodec:
        """Audio and text to tokens and back, at the sizes of this bundle."""
        return MimiCodec(self.mimi, self.lm, self.tokenizer)

    def save(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the bundle, all or nothing: the folder appears whole, replacing one of that name.

        Args:
            folder: to write to.
            dtype: of the language model's floating-point weights on disk; None keeps what they have in memory.
            weights: of the language model, where they are not those in memory (adapters merged, shards gathered).
        """
        config = self.config | {key: name for key, name in NAMES.items() if key != "mimi_config_name"}
        config.pop("mimi_config_name", None)
        lm_weights = self.lm.state_dict() if weights is None else weights
        with replacing(Path(folder)) as temporary:
            temporary.mkdir()
            if self.mimi_config is not None:
                config["mimi_config_name"] = NAMES["mimi_config_name"]
                (temporary / NAMES["mimi_config_name"]).write_text(json.dumps(self.mimi_config, indent=2) + "\n")
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(_on_disk(lm_weights, dtype), str(temporary / NAMES["moshi_name"]))
            save_file(_on_disk(self.mimi.state_dict(), None), str(temporary / NAMES["mimi_name"]))
            (temporary / NAMES["tokenizer_name"]).write_bytes(self.tokenizer.serialized_model_proto())


def _on_disk(weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        found[name] = value.contiguous().clone()
    return found


def find_bundle(checkpoint: str) -> Path | None:
    """The local folder of a checkpoint: `nano`, an existing folder; None for a hub repository id.

    A run folder stands for its last checkpoint: `checkpoint=runs/warm` trains on from what a warm start made.

    Raises:
        InputError: neither a folder nor the form of a hub id; or its first part is a folder here that holds other runs
            or bundles (`runs/typo` is no repository).
    """
    if checkpoint == NANO:
        return NANO_FOLDER
    path = Path(checkpoint)
    if path.is_dir():
        steps = [] if (path / "config.json").is_file() else sorted((path / "checkpoints").glob("step_*"))
        return steps[-1] if steps else path
    if checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~")):
        beside = sorted(config.parent.name for config in path.parent.glob("*/config.*"))
        if beside:
            raise InputError(f"checkpoint '{checkpoint}' is not there: {path.parent} holds {', '.join(beside[:8])}")
        return None
    raise InputError(
        f"checkpoint '{checkpoint}' is no folder: give 'nano', a bundle's folder or a hub id like owner/name"
    )


def bundle_info(checkpoint: str) -> CheckpointInfo:
    """The files of a checkpoint as `find_bundle` takes it; those of a hub repository are fetched, once.

    Raises:
        InputError: there is no such checkpoint, or a file of it is missing.
    """
    folder = find_bundle(checkpoint)
    return local_info(folder) if folder is not None else _completed(_hub_info(checkpoint), checkpoint)


def load_bundle(checkpoint: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a bundle: `nano`, a local folder, or a hub repository id.

    Args:
        checkpoint: which one.
        device: of the language model and Mimi.
        dtype: of the language model's weights in memory (Mimi stays float32, as in Moshi).

    Raises:
        InputError: a missing file, an unknown or missing key, a wrong shape; the message names file and key.
    """
    folder = find_bundle(checkpoint)
    info = bundle_info(checkpoint)
    check_bundle(info)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # Moshi's own CUDA graphs are recorded on the device that is current
    mimi_weights = load_file(info.mimi_weights, device="cpu")
    codebooks = _mimi_codebooks(info)
    mimi = get_mimi(None, info.mimi_config, num_codebooks=codebooks, device=device)
    mimi.load_state_dict({name: value.float() for name, value in mimi_weights.items()})
    lm = _load_lm(info, device, dtype)
    for path, module in ((info.mimi_weights, mimi), (info.moshi_weights, lm)):
        broken = next((name for name, value in module.named_parameters() if not bool(value.isfinite().all())), None)
        if broken is not None:
            raise InputError(f"{path}: '{broken}' holds numbers that are not finite: take an earlier checkpoint")
    try:
        tokenizer = info.get_text_tokenizer()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{info.tokenizer} is not a SentencePiece model ({_one_line(error)})") from error
    return Bundle(
        info.raw_config or {},
        info.mimi_config,
        lm,
        mimi,
        tokenizer,
        folder or info.moshi_weights.parent,
    )


def _load_lm(info: CheckpointInfo, device: str, dtype: torch.dtype) -> LMModel:
    """Moshi's own loading, but for weights that PersonaPlex's larger depth transformer has to be filled from."""
    if not is_personaplex(info.lm_config or {}):
        return info.get_moshi(device=device, dtype=dtype)
    lm = info.get_moshi(device="meta", dtype=dtype, load_weight=False)
    weights = expand_depth(load_file(info.moshi_weights, device=device), lm)
    # Cloned, since a copied weight is trained apart from its source.
    lm.load_state_dict({name: value.to(dtype, copy=True) for name, value in weights.items()}, assign=True)
    return lm.eval()


def local_info(folder: Path) -> CheckpointInfo:
    """What Moshi's loaders are told of a local bundle.

    Raises:
        InputError: config.json is missing or wrong, or names a file that is not there.
    """
    config = read_config(folder)
    paths = {key: named_file(folder, config, key) for key in NAMES}
    read_mimi_config(folder, config)  # for its errors: the loaders read it themselves
    info = CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=paths["moshi_name"],
        mimi_weights=paths["mimi_name"],
        tokenizer=paths["tokenizer_name"],
        config_path=folder / "config.json",
        mimi_config_path=paths["mimi_config_name"],
    )
    return _completed(info, folder.name)


def weights_digest(checkpoint: str) -> str:
    """SHA-256 of a checkpoint's weights; empty for a hub id.

    Of a file of 64 MiB or more, 4 KiB at the beginning of each 1/256 stand for all: training, adapters
    that are merged too, changes most of it.

    Raises:
        InputError: as `find_bundle` and `local_info`.
    """
    folder = find_bundle(checkpoint)
    if folder is None:
        return ""
    digest, path = hashlib.sha256(), local_info(folder).moshi_weights
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 2**26:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for part in range(256):
            file.seek(part * size // 256)
            digest.update(file.read(4096))
    return digest.hexdigest()


def _completed(info: CheckpointInfo, name: str) -> CheckpointInfo:
    raw = info.raw_config or {}
    sizes = complete_sizes(raw, name)
    kept = {key: value for key, value in raw.items() if key in NOT_LM or key in sizes}
    return replace(info, lm_config=sizes, raw_config=kept | sizes)


def _hub_info(repository: str) -> CheckpointInfo:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return CheckpointInfo.from_hf_repo(repository)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint '{repository}' is no folder here, and cannot be had from the model hub ({first})"
        ) from error


def _mimi_codebooks(info: CheckpointInfo) -> int:
    config = info.lm_config
    if config is None:
        return 8
    return agent_codebooks(config["n_q"], config["dep_q"])


def check_bundle(info: CheckpointInfo) -> None:
    """Hold the files' headers against the configuration, with no weight read.

    Raises:
        InputError: naming the file and the key.
    """
    for path in (info.moshi_weights, info.mimi_weights):
        if Path(path).suffix != ".safetensors":
            raise InputError(f"{path} is not a .safetensors file: convert it first (pickled weights are not read)")
    try:
        lm = info.get_moshi(device="meta", load_weight=False)
    except (TypeError, AssertionError, KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"config.json of {Path(info.moshi_weights).parent}: {_one_line(error)}") from error
    _check_weights(lm, Path(info.moshi_weights))
    mimi = meta_mimi(info.mimi_config, str(Path(info.mimi_weights).parent), _mimi_codebooks(info))
    _check_weights(mimi, Path(info.mimi_weights))


def meta_mimi(config: Mapping[str, Any] | None, checkpoint: str, codebooks: int = 8) -> MimiModel:
    """Mimi with shapes and no storage.

    Args:
        config: its sizes; None for Moshi's own.
        checkpoint: whose it is, for the error.
        codebooks: that it encodes to.

    Raises:
        InputError: the sizes are not those of a Mimi.
    """
    try:
        with torch.device("meta"):
            return get_mimi(None, config, num_codebooks=codebooks, device="meta")
    except (TypeError, AssertionError, KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"Mimi configuration of {checkpoint}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"missing key {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _check_weights(model: torch.nn.Module, path: Path) -> None:
    """Names and shapes of a safetensors file against those of a model on the meta device."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118 (safe_open is no dictionary)
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({_one_line(error)})") from error
    if isinstance(model, LMModel):
        header = expand_depth(header, model)
    # Loading meta tensors applies the models' own renaming of old keys and compares every shape.
    try:
        result = model.load_state_dict(header, strict=False, assign=True)
    except RuntimeError as error:
        detail = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise InputError(f"{path}: {detail[0] if detail else _one_line(error)}") from error
    if result.missing_keys:
        raise InputError(f"{path}: key '{result.missing_keys[0]}' is missing ({len(result.missing_keys)} in all)")
    if result.unexpected_keys:
        raise InputError(
            f"{path}: key '{result.unexpected_keys[0]}' is not known to the model "
            f"({len(result.unexpected_keys)} in all)"
        )
