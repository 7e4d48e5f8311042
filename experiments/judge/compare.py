"""Does a judge in the mix keep the words relevant while timing improves? Nano, with and without, several seeds.

    python -m experiments.judge.compare --out runs/judge
    python -m experiments.judge.compare trainer.updates=2 evaluation.limit=2 --out runs/tiny --seeds 0

Both arms score the content axis; without it in the mix its weight is 0. Writes `comparison.json` and `comparison.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.files import write_text
from experiments.judge.server import MODEL, JudgeServer

CONFIG = Path(__file__).parent / "nano_content.yaml"
ARMS: dict[str, list[str]] = {"with": [], "without": ["rewards.content.weight=0"]}  # the rest is as in the file
SHOWN = (
    ("content", "reward"),
    ("turn_taking", "latency"),
    ("turn_taking", "takeover_rate"),
    ("turn_taking", "reward"),
    ("user_interruption", "latency"),
    ("user_interruption", "reward"),
    ("pause_handling", "takeover_rate"),
    ("backchannel", "f1"),
)


def run(arm: str, seed: int, out: Path, judge: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train one arm with one seed, from where it stands; gives the results before and after."""
    from rlhf_duplex.checkpoint import last_checkpoint
    from rlhf_duplex.config import load_config
    from rlhf_duplex.run import train

    folder = out / f"{arm}-{seed}" / "evaluation"
    begun = last_checkpoint(out / f"{arm}-{seed}") is not None
    if not (folder / "after.json").is_file():
        config = load_config(
            CONFIG,
            [
                f"run_dir={out / f'{arm}-{seed}'}",
                f"seed={seed}",
                f"resume={str(begun).lower()}",
                f"rewards.content.judge.base_url={judge}",
                *ARMS[arm],
                *overrides,
            ],
        )
        train(config)
    return {name: json.loads((folder / f"{name}.json").read_text())["axes"] for name in ("before", "after")}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of each metric, before and after, for both arms, as Markdown."""
    lines = ["| metric | before | with content | without |", "|---|---|---|---|"]
    for axis, metric in SHOWN:
        cells = [
            _cell(results["with"] + results["without"], "before", axis, metric),
            *(_cell(results[arm], "after", axis, metric) for arm in ARMS),
        ]
        lines.append(f"| {axis} {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(runs: Sequence[dict[str, Any]], when: str, axis: str, metric: str) -> str:
    found = [run[when][axis][metric]["mean"] for run in runs if metric in run[when].get(axis, {})]
    return f"{np.mean(found):+.3f} ± {np.std(found):.3f}" if found else "-"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.judge.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for every run")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with JudgeServer() as server:
        for seed in options.seeds:
            for arm in ARMS:
                results[arm].append(run(arm, seed, options.out, server.base_url, options.overrides))
    text = table(results)
    for name, content in (
        ("comparison.json", json.dumps({"model": MODEL, "seeds": options.seeds, "runs": results}, indent=1)),
        ("comparison.md", text),
    ):
        write_text(options.out / name, content)
    print(text)
    print(f"wrote {options.out / 'comparison.json'} and {options.out / 'comparison.md'}")


if __name__ == "__main__":
    main()
