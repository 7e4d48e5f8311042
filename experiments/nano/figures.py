"""What the quickstart reaches, over seeds, and what leaving one axis out does: runs, and one table of them all.

python -m experiments.nano.figures [--seeds 0 1 2] [--conditions full pause_handling ...] [--out DIR] [key=value ...]

Every run is `configs/quickstart.yaml` with another seed; a condition named after an axis trains without that axis'
segments and without its reward, on as many groups. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from envs.segments import read_manifest, write_manifest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "rlhf_duplex" / "nano_data" / "train" / "segments.jsonl"
AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")
COLUMNS = (
    ("pause_handling", "takeover_rate", "pause TOR"), ("turn_taking", "takeover_rate", "turn TOR"),
    ("turn_taking", "latency", "turn latency, s"), ("backchannel", "takeover_rate", "BC TOR"),
    ("backchannel", "f1", "BC F1"), ("backchannel", "jsd", "BC JSD"),
    ("user_interruption", "takeover_rate", "interruption TOR"),
    ("user_interruption", "latency", "interruption latency, s"),
    ("words", "known", "known words"), ("words", "known_pairs", "known word pairs"),
    ("words", "repeated_4grams", "repeated 4-grams"),
)  # fmt: skip


def run(condition: str, seed: int, out: Path, overrides: Sequence[str]) -> None:
    """Train once, unless it was done before."""
    folder = out / f"{condition}_{seed}"
    if (folder / "evaluation" / "after.json").exists():
        return
    arguments = [f"run_dir={folder}", f"seed={seed}", "evaluation.segments=nano", *overrides]
    if condition != "full":
        manifest = out / f"without_{condition}.jsonl"
        kept = [s for s in read_manifest(NANO) if s.axis != condition]
        write_manifest(manifest, [replace(s, recording=s.recording.resolve()) for s in kept])
        arguments += [f"segments={manifest}", f"rewards.{condition}.weight=0"]
    command = [sys.executable, "-m", "rlhf_duplex.cli", "train", str(ROOT / "configs" / "quickstart.yaml"), *arguments]
    print(f"{condition}, seed {seed}: {' '.join(arguments)}", flush=True)
    with open(out / f"{condition}_{seed}.log", "w") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def table(out: Path) -> str:
    """All finished runs as a Markdown table: each seed of the full mix, and the mean of every condition."""
    rows: list[tuple[str, dict[str, float]]] = []
    for condition in ("full", *AXES):
        finished = sorted(out.glob(f"{condition}_[0-9]*/evaluation/after.json"))
        after = [_means(path) for path in finished]
        if not after:
            continue
        seeds = [path.parts[-3].rsplit("_", 1)[1] for path in finished]
        name = "all four axes" if condition == "full" else f"without {condition}"
        if condition == "full":
            rows.append(("before", _mean([_means(path.with_name("before.json")) for path in finished])))
            rows += [(f"{name}, seed {seed}", one) for seed, one in zip(seeds, after, strict=True)]
        rows.append((f"{name}, mean of {len(after)}", _mean(after)))
    lines = ["| | " + " | ".join(title for *_, title in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, values in rows:
        cells = [f"{values[title]:.2f}" if title in values else "-" for *_, title in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _means(path: Path) -> dict[str, float]:
    axes = json.loads(path.read_text())["axes"]
    return {title: axes[a][m]["mean"] for a, m, title in COLUMNS if m in axes.get(a, {})}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {title: float(np.mean([r[title] for r in rows])) for *_, title in COLUMNS if all(title in r for r in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.nano.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--conditions", nargs="+", choices=("full", *AXES), default=["full", *AXES])
    parser.add_argument("--out", type=Path, default=Path("runs/nano_figures"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for every run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for condition in options.conditions:
        for seed in options.seeds:
            run(condition, seed, options.out.resolve(), options.overrides)
    text = table(options.out)
    (options.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
