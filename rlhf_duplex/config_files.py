"""Configuration files: read over a schema with `key=value` overrides, written, and compared when a run is resumed."""

import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs.errors import InputError

DECIDES_NUMBERS = (
    "seed",
    "checkpoint",
    "dtype",
    "segments",
    "env",
    "live",
    "train_axes",
    "trainer",
    "ppo",
    "optimiser",
    "sampling",
    "context",
    "detector",
    "lora",
    "prompt",
    "rewards",
)
_JUDGE_DECIDES = ("model", "temperature", "max_tokens", "extra_body")


def load_structured(
    schema: type, path: Path | None = None, overrides: Sequence[str] = (), replaced: Sequence[str] = ()
) -> Any:
    """A configuration of any schema: its defaults, then the file, then `key=value` overrides, each checked for type.

    Args:
        schema: a dataclass.
        path: YAML file; its `stages` are those of a pipeline (see `rlhf_duplex.pipeline`) and left out here.
        overrides: such as `trainer.updates=20`.
        replaced: keys whose defaults are dropped where the file has the key; `KEY={...}` on the command line drops
            what the file says, too.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    base = OmegaConf.structured(schema)
    layers = []
    if path is not None:
        if not path.is_file():
            raise InputError(f"configuration {path} does not exist: give the path of a YAML file")
        if not path.read_bytes().strip():
            raise InputError(f"configuration {path} is empty: leave it out to take the defaults")
        try:
            layers.append((str(path), OmegaConf.load(path)))
        except Exception as error:
            raise InputError(f"configuration {path} is not valid YAML ({' '.join(str(error).split())})") from error
    malformed = [o for o in overrides if "=" not in o or o.startswith("=")]
    if malformed:
        raise InputError(f"argument '{malformed[0]}' is not of the form key=value")
    try:
        layers.append(("the command line", OmegaConf.from_dotlist(list(overrides))))
    except Exception as error:
        raise InputError(f"the key=value arguments cannot be read ({' '.join(str(error).split())})") from error
    config = base
    for source, layer in layers:
        try:
            given = {override.partition("=")[0] for override in overrides}  # not `rewards.pause_handling.weight`
            if source != "the command line" and OmegaConf.is_dict(layer):
                layer.pop("stages", None)
                given = set(layer)
            for key in given.intersection(replaced):
                config[key] = {}
            config = OmegaConf.merge(config, layer)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            why = _explain(error)
            raise InputError(f"{source}: {why}{_own_command(path, source) if 'unknown' in why else ''}") from error
    try:
        return _at_home(OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(f"the configuration cannot be resolved: {_explain(error)}") from error


def _at_home(value: Any) -> Any:
    """With `~/` as the user's folder in every text: a shell leaves it as it is after `key=`."""
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    for item in fields(value) if is_dataclass(value) else ():
        setattr(value, item.name, _at_home(getattr(value, item.name)))
    return value


def _own_command(path: Path | None, source: str) -> str:
    """What a file says of itself: a configuration that opens with its command may have been given to another."""
    first = path.read_text(errors="replace").split("\n")[0] if path and source == str(path) else ""
    return f" (the file opens with '{first.strip('# ')}')" if first.startswith("# rlhf-duplex ") else ""


def _explain(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if key and "not in" in first:
        return f"unknown configuration key '{key}': see the dataclasses in rlhf_duplex/*config.py for the keys"
    if key and "list, or tuple" in first:
        return f"configuration key '{key}' is a list: write {key}=[ONE, ANOTHER]"
    if key and "'None'" in first:
        return f"configuration key '{key}' must have a value"
    if "is not a subclass of" in first:
        return f"a section of the configuration has keys, such as trainer.updates, and no value of its own ({first})"
    return f"configuration key '{key}': {first}" if key else first


def _deciding(value: Any) -> Any:
    """A value without what decides no number: where a judge is and how patiently it is asked."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(value, dict) and isinstance(value.get("judge"), dict):
        return value | {"judge": {key: value["judge"].get(key) for key in _JUDGE_DECIDES}}
    return value


def check_resumed(
    config: Any, saved: Path, parts: Sequence[str] = DECIDES_NUMBERS, free: Sequence[str] = ("trainer.updates",)
) -> None:
    """A resumed run is the same run: whatever decides its numbers must be as it was (more updates may be added).

    A key that the saved configuration does not have, because there was none then, must have its default.

    Args:
        config: the configuration to go on with.
        saved: the run folder's config.yaml; nothing is checked where there is none.
        parts: the keys, or whole sections, that decide numbers.
        free: keys in them that may change.

    Raises:
        InputError: the first key that differs.
    """
    if not saved.is_file():
        return
    before, now, defaults = (OmegaConf.load(saved), *(OmegaConf.create(to_yaml(c)) for c in (config, type(config)())))
    for part in parts:
        names = [f"{part}.{name}" for name in now[part]] if OmegaConf.is_dict(now[part]) else [part]
        if part == "rewards":  # axes are no fixed set: one that is gone differs, too
            names += [f"{part}.{name}" for name in before.get(part) or {} if name not in now[part]]
        for key in names:
            missing = defaults if part != "rewards" else OmegaConf.create()
            old = OmegaConf.select(before, key, default=OmegaConf.select(missing, key))
            old, new = _deciding(old), _deciding(OmegaConf.select(now, key))
            if old != new and key not in free:
                raise InputError(f"resume: {key} was {old} and is {new}: a resumed run keeps its configuration")


def to_yaml(config: Any) -> str:
    """The resolved configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
