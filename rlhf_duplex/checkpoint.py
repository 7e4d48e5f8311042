"""Checkpoints of a run: a bundle that can be served, and beside it what training needs to go on exactly.

`checkpoints/step_000010/` holds the bundle, `optimiser.safetensors` and `trainer.json`. Everything random in a run is
drawn from (seed, counters), so that the number of the update is the whole state of the random numbers.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import Bundle, load_bundle

_PATTERN = "step_*"


def save_checkpoint(run_dir: Path, update: int, bundle: Bundle, learner: Learner, keep: int) -> Path:
    """Write `checkpoints/step_NNNNNN`, whole or not at all, and remove the oldest beyond `keep`."""
    folder = run_dir / "checkpoints" / f"step_{update:06d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    bundle.save(temporary)
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

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    saved = load_bundle(str(folder), str(bundle.lm.device), bundle.lm.dtype)
    try:
        bundle.lm.load_state_dict(saved.lm.state_dict())
        learner.load_state(load_file(str(folder / "optimiser.safetensors")))
        return int(json.loads((folder / "trainer.json").read_text())["update"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be resumed from ({' '.join(str(error).split())})") from error
