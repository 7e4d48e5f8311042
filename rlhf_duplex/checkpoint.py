"""Checkpoints of a run: a bundle that can be served, and beside it what training needs to go on exactly.

`checkpoints/step_000010/` holds the bundle (adapters merged, and beside it themselves, in `lora.safetensors`),
`optimiser.safetensors`, with PPO the value head and its optimiser in `value.safetensors`, and `trainer.json`.
Everything random in a run is drawn from (seed, counters), so that the number of the update is the whole state of the
random numbers. `checkpoints/best` points to the best, and `best.json` says why.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from envs.files import replacing, write_text
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import Bundle, check_bundle, local_info
from rlhf_duplex.policy.lora import LORA_NAME, adapter_weights, merged_weights

_PATTERN = "step_*"
VALUE_NAME = "value.safetensors"


def save_checkpoint(run_dir: Path, update: int, bundle: Bundle, learner: Learner) -> Path:
    """Write `checkpoints/step_NNNNNN`, whole or not at all.

    All members of a learner group call it; the first one writes.
    """
    folder = run_dir / "checkpoints" / f"step_{update:06d}"
    weights, state = learner.weights(), learner.state()
    if learner.parallel.rank:
        return folder
    with replacing(folder) as temporary:
        bundle.save(temporary, weights=merged_weights(bundle.lm, weights))
        if learner.adapters:
            save_file(adapter_weights(weights), str(temporary / LORA_NAME))
        save_file(state, str(temporary / "optimiser.safetensors"))
        if learner.critic is not None:
            save_file(learner.critic.state(), str(temporary / VALUE_NAME))
        (temporary / "trainer.json").write_text(json.dumps({"update": update}) + "\n")
    return folder


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = sorted((run_dir / "checkpoints").glob(_PATTERN))
    return found[-1] if found else None


def updates_done(run_dir: Path) -> int:
    """Updates before the newest checkpoint of a run; 0 where there is none."""
    folder = last_checkpoint(run_dir)
    return 0 if folder is None else int(folder.name.removeprefix("step_"))


def mark_best(run_dir: Path, folder: Path, metric: str, value: float) -> bool:
    """Let `checkpoints/best` point to a checkpoint if its `value` is the highest so far; gives whether it is."""
    record = run_dir / "checkpoints" / "best.json"
    best = best_checkpoint(run_dir)
    if best is not None:
        known = json.loads(record.read_text())
        if known["metric"] == metric and known["value"] >= value and best != folder:
            return False
    write_text(record, json.dumps({"step": folder.name, "metric": metric, "value": value}))
    _point(run_dir / "checkpoints" / "best", folder)
    return True


def _point(link: Path, folder: Path) -> None:
    with replacing(link) as temporary:
        temporary.symlink_to(folder.name)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The best checkpoint so far, or None."""
    record = run_dir / "checkpoints" / "best.json"
    try:
        folder = record.with_name(json.loads(record.read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None
    return folder if folder.is_dir() else None


def prune(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best, and what a kill left half-written."""
    folder, best = run_dir / "checkpoints", best_checkpoint(run_dir)
    link = folder / "best"
    if best is not None and (not link.is_symlink() or os.readlink(link) != best.name):  # killed between the two
        _point(link, best)
    for old in [*sorted(folder.glob(_PATTERN))[:-keep], *folder.glob(".*step_*")]:
        if old != best:
            shutil.rmtree(old)


def _same(value: torch.Tensor, saved: torch.Tensor) -> bool:
    """But for what another order of summing the adapters' product rounds otherwise."""
    step = 2 * torch.finfo(value.dtype).eps
    return torch.allclose(value.float(), saved.float(), rtol=max(step, 1e-5), atol=1e-5)


def restore(folder: Path, bundle: Bundle, learner: Learner) -> int:
    """Put weights and optimiser back; gives the number of updates that were done.

    With adapters, these go back on the weights that the run began from, and both together must be what was saved.

    Raises:
        InputError: the checkpoint is damaged or of another model.
    """
    check_bundle(local_info(folder))
    try:
        saved = load_file(str(folder / "model.safetensors"))
        if learner.adapters:
            learner.load_weights(load_file(str(folder / LORA_NAME)))
            whole = learner.weights()
            merged = merged_weights(bundle.lm, whole) if whole else {}  # the first member of a group has them all
            changed = [name for name, value in merged.items() if not _same(value.cpu(), saved[name])]
            if changed:
                raise ValueError(f"'{changed[0]}' differs: the run began from another model")
        else:
            learner.load_weights(saved)
        learner.load_state(load_file(str(folder / "optimiser.safetensors")))
        if learner.critic is not None:
            learner.critic.load_state(load_file(str(folder / VALUE_NAME)))
        return int(json.loads((folder / "trainer.json").read_text())["update"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder} cannot be resumed from ({' '.join(str(error).split())})") from error
