"""Measure the step on this machine, fit its model, and predict the step of the 7B on 8, 32 and 256 GPUs.

python -m experiments.scaling [key=value ...] [--out DIR] [--workers 1 2] [--updates 4] [--skip-runs]

1. Runs of nano with rollout workers on Ray: seconds by stage, and what share of the step is transport.
2. Rollouts and updates of several sizes in one process: the constants of the step's model, by least squares, and how
   far the model is off.
3. The step of Moshi 7B by `rlhf_duplex.step_model`, with the assumptions of the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.cores import cores
from envs.files import write_text
from experiments.scaling.measure import fit, measure_rollouts, measure_runs, measure_updates
from experiments.scaling.predict import predictions, table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description=__doc__.splitlines()[0],
        epilog="example: python -m experiments.scaling --workers 1 2 --updates 6",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--updates", type=int, default=4, help="of each run")
    parser.add_argument("--skip-runs", action="store_true", help="leave the runs on Ray out")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 8, 16], help="episodes of the measurements")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration of the runs")
    options = parser.parse_args(arguments)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": {"processor": platform.processor() or platform.machine(), "cores": cores()}}
    with tempfile.TemporaryDirectory() as folder:
        if not options.skip_runs:
            found["runs"] = measure_runs(Path(folder), [0, *options.workers], options.updates, options.overrides)
        with console.status("measuring rollouts and updates"):
            rollouts = measure_rollouts(options.sizes)
            updates = measure_updates(options.sizes)
    found["rollout"] = {"points": rollouts, **fit(rollouts, ("frames", "episode_frames"))}
    found["update"] = {"points": updates, **fit(updates, ("one", "tokens"))}
    found["predictions"] = predictions()
    text = table(found)
    write_text(options.out / "scaling.json", json.dumps(found, indent=2) + "\n")
    write_text(options.out / "scaling.md", text + "\n")
    console.print(text, soft_wrap=True)
    console.print(f"wrote {options.out / 'scaling.json'} and {options.out / 'scaling.md'}")


if __name__ == "__main__":
    main()
