"""Checkpoints of a run: a bundle that can be served, and beside it what training needs to go on exactly.

`checkpoints/step_000010/` holds the bundle (adapters merged, and beside it themselves, in `lora.safetensors`),
`optimiser.safetensors` and `trainer.json`. Everything random in a run is drawn from (seed, counters), so that the
number of the update is the whole state of the random numbers.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import Bundle, load_bundle
from rlhf_duplex.policy.lora import LORA_NAME, adapter_weights, merged_weights

_PATTERN = "step_*"


def save_checkpoint(run_dir: Path, update: int, bundle: Bundle, learner: Learner, keep: int) -> Path:
    """Write `checkpoints/step_NNNNNN`, whole or not at all, and remove the oldest beyond `keep`."""
    folder = run_dir / "checkpoints" / f"step_{update:06d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    bundle.save(temporary, weights=merged_weights(bundle.lm))
    if learner.adapters:
        save_file(adapter_weights(bundle.lm.state_dict()), str(temporary / LORA_NAME))
    save_file(learner.state(), str(temporary / "optimiser.safetensors"))
    (temporary / "trainer.json").write_text(json.dumps({"update": update}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    stale = (run_dir / "checkpoints").glob(".*")  # what a kill left half-written
    for old in [*sorted((run_dir / "checkpoints").glob(_PATTERN))[:-keep], *stale]:
        shutil.rmtree(old)
    return folder


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = sorted((run_dir / "checkpoints").glob(_PATTERN))
    return found[-1] if found else None


def restore(folder: Path, bundle: Bundle, learner: Learner) -> int:
    """Put weights and optimiser back; gives the number of updates that were done.

    With adapters, these go back on the weights that the run began from, and both together must be what was saved.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    saved = load_bundle(str(folder), str(bundle.lm.device), bundle.lm.dtype).lm.state_dict()
    try:
        if learner.adapters:
            bundle.lm.load_state_dict(load_file(str(folder / LORA_NAME)), strict=False)
            merged = merged_weights(bundle.lm)
            changed = [name for name in saved if not torch.allclose(merged[name], saved[name], atol=1e-5)]
            if changed:
                raise ValueError(f"'{changed[0]}' differs: the run began from another model")
        else:
            bundle.lm.load_state_dict(saved)
        learner.load_state(load_file(str(folder / "optimiser.safetensors")))
        return int(json.loads((folder / "trainer.json").read_text())["update"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be resumed from ({' '.join(str(error).split())})") from error
