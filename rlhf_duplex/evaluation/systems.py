"""Whom an evaluation is of: checkpoints of a policy, and folders with the outputs of any other system."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from envs.errors import InputError
from rlhf_duplex.config import Config
from rlhf_duplex.policy.bundle import check_bundle, find_bundle, load_bundle, local_info
from rlhf_duplex.policy.codec import MimiCodec
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.prompt import make_prompt
from rlhf_duplex.policy.sampling import Sampling


@dataclass(frozen=True)
class System:
    """One system under test.

    Attributes:
        name: in tables and file names.
        checkpoint: of a policy: `nano`, a run folder, a bundle's folder or a hub id.
        outputs: of a system that is not run here: the folder of its outputs.
    """

    name: str
    checkpoint: str | None = None
    outputs: Path | None = None


def parse_systems(checkpoints: Sequence[str], outputs: Sequence[str] = ()) -> tuple[System, ...]:
    """Systems from `PATH` or `NAME=PATH` arguments, each held against what can be known before a model is loaded.

    Raises:
        InputError: no system, two of one name, a folder that is not there, or a bundle that is not whole.
    """
    systems = []
    for argument in checkpoints:
        name, path = _named(argument)
        systems.append(System(name, checkpoint=path))
    for argument in outputs:
        name, path = _named(argument)
        if not Path(path).is_dir():
            raise InputError(f"--outputs {path} does not exist: give the folder of a system's outputs")
        systems.append(System(name, outputs=Path(path)))
    names = [system.name for system in systems]
    doubled = [name for index, name in enumerate(names) if name in names[:index]]
    if doubled:
        raise InputError(f"two systems are called '{doubled[0]}': name them, as in base=PATH")
    for system in systems:
        folder = find_bundle(system.checkpoint) if system.checkpoint else None
        if folder is not None:
            check_bundle(local_info(folder))
    return tuple(systems)


def _named(argument: str) -> tuple[str, str]:
    """`NAME=PATH`, or a name from the last part of the path; a name is safe as a file's."""
    given, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():  # runs/lr=0.1
        given, path = Path(argument).name, argument
    name = re.sub(r"[^\w.-]", "_", given).strip(".")[:80]
    if not name or not path:
        raise InputError(f"'{argument}' names no system: give PATH or NAME=PATH")
    return name, path


def load_policy(system: System, config: Config) -> tuple[MoshiPolicy, MimiCodec]:
    """A system's policy and codec, by the configuration's device, dtype, sampling and prompt.

    Raises:
        InputError: the checkpoint cannot be loaded.
    """
    assert system.checkpoint is not None
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    bundle = load_bundle(system.checkpoint, config.device, dtype)
    prompt = make_prompt(bundle, config.prompt)
    return MoshiPolicy(bundle.lm, Sampling(**vars(config.sampling)), prompt), bundle.codec
