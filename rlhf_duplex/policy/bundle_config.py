"""What the config.json of a bundle says, with no other file read: sizes, and which files stand for what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshi.models import loaders

from envs.errors import InputError

NAMES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "tokenizer_name": "tokenizer.model",
    "mimi_config_name": "mimi_config.json",
}
_HUB_NAMES = {"mimi_name": loaders.MIMI_NAME, "tokenizer_name": loaders.TEXT_TOKENIZER_NAME}
NOT_LM = {*NAMES, "lora_name", "model_type", "lm_gen_config", "tts_config", "stt_config", "model_id"}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a local bundle; no other file has to be there.

    Raises:
        InputError: it is missing or wrong.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: a bundle needs config.json beside its weights")
    config = read_json(path)
    if config.get("lora_name") is not None:  # Moshi's loaders would look for it elsewhere, on the hub, too
        raise InputError(
            f"{path}: `lora_name` {config['lora_name']!r}: adapters are not read beside a model; export it "
            "merged, and leave the key out"
        )
    return config


def read_mimi_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes of Mimi that the config.json of a local bundle names; None for Moshi's own.

    Raises:
        InputError: the file is missing or wrong.
    """
    path = named_file(folder, config, "mimi_config_name")
    return None if path is None else read_json(path)


def named_file(folder: Path, config: Mapping[str, Any], key: str) -> Path | None:
    """The file that `key` of config.json stands for; None where Moshi's own Mimi needs none."""
    given = config.get(key)  # null is as good as not there
    name = given if given is not None or key == "mimi_config_name" else NAMES[key]
    if given is None and key in _HUB_NAMES and not (folder / str(name)).is_file():
        name = _HUB_NAMES[key]  # a copy of a repository of Kyutai's or NVIDIA's
    path = None if name is None else folder / Path(str(name).removeprefix("file://")).name
    if path is not None and not path.is_file():
        raise InputError(f"{folder / 'config.json'}: `{key}` names {path.name}, which is not in {folder}")
    return path


def complete_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of `LMModel`: the 7B's where config.json has none (moshiko, PersonaPlex), as Moshi's loaders do.

    Args:
        config: what config.json says.
        name: of the folder or repository: PersonaPlex is known by its name, or by `model_type`.
    """
    if "dim" in config:
        return {key: value for key, value in config.items() if key not in NOT_LM}
    sizes = dict(loaders._lm_kwargs)
    if "personaplex" in f"{name} {config.get('model_type')}".lower():
        sizes["dep_q"] = sizes["n_q"]
    return sizes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file holds anything else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found
