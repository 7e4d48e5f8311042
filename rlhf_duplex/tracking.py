"""Metrics: a line an update in `metrics.jsonl`, mirrored to TensorBoard or W&B through accelerate's trackers."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from envs.errors import InputError
from envs.files import write_text


class MetricsLog:
    """The record of a run's metrics.

    Args:
        run_dir: the run folder.
        trackers: mirrors by accelerate's names (`tensorboard`, `wandb`).
        config: scalars and strings that a mirror shows beside the curves.
        keep_updates: lines of later updates are cut off (a run that goes on from a checkpoint writes them again).
    """

    def __init__(self, run_dir: Path, trackers: list[str], config: dict[str, Any], keep_updates: int = 0) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.cut(keep_updates)
        self._mirrors = [_make_tracker(name, run_dir, keep_updates) for name in trackers]
        for mirror in self._mirrors:
            mirror.start()
            mirror.store_init_configuration(config)

    def cut(self, keep_updates: int) -> None:
        """Leave out the lines of later updates: the run went back to a checkpoint."""
        self._rewrite([line for line in read_metrics(self.path) if line["update"] <= keep_updates])

    def _rewrite(self, kept: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, update: int, metrics: dict[str, float]) -> None:
        """One update's metrics; the line is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps({"update": update, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for mirror in self._mirrors:
            mirror.log(metrics, step=update)

    def amend(self, update: int, figures: dict[str, float]) -> None:
        """Figures of an update that came late, into its line."""
        self._rewrite([line | (figures if line["update"] == update else {}) for line in read_metrics(self.path)])
        for mirror in self._mirrors:
            mirror.log(figures, step=update)

    def close(self) -> None:
        for mirror in self._mirrors:
            mirror.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a kill cut short; empty where there is no file.

    Raises:
        InputError: a line holds something else.
    """
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            raise InputError(f"{path} is damaged: a line is {line[:60]!r}, not an update's figures")
        lines.append(row)
    return lines


def flat(config: Any) -> dict[str, str | int | float | bool]:
    """The scalars of a configuration and of its sections, such as `trainer.updates`, which a mirror shows."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in vars(config).items():
        parts = {f"{key}.{k}": v for k, v in vars(value).items()} if hasattr(value, "__dict__") else {key: value}
        found.update({k: v for k, v in parts.items() if isinstance(v, str | int | float | bool)})
    return found


def check_trackers(names: list[str]) -> None:
    """Whether the mirrors can be started.

    Raises:
        InputError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"tracker '{name}' is not installed: pip install {name}")
        if name == "wandb" and not _wandb_knows_whose():
            raise InputError("tracker wandb has no key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")


def _wandb_knows_whose() -> bool:
    """Whether there is anything that wandb could log in with, or it need not."""
    files = (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc")
    variables = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE")
    return any(os.environ.get(name) for name in variables) or any(Path(f).expanduser().is_file() for f in files if f)


def _make_tracker(name: str, run_dir: Path, keep_updates: int) -> Any:
    from accelerate import PartialState, tracking

    PartialState(cpu=True)  # accelerate's trackers ask it which process they are in
    if name == "tensorboard":
        # What a run that goes on writes again is not shown twice.
        purged = {"purge_step": keep_updates + 1}
        return tracking.TensorBoardTracker(run_name="tensorboard", logging_dir=str(run_dir), **purged)
    return tracking.WandBTracker("rlhf-duplex", name=run_dir.resolve().name)  # the project, and the run in it
