"""PPO, GRPO, RLOO, Dr. GRPO, clip-higher and the {speak, silent} objective on nano: one table, and curves.

python -m experiments.algorithms [key=value ...] [--seeds 0 1 2] [--methods grpo ppo ...] [--out DIR]

Every run is `configs/quickstart.yaml` with another method and seed: as many updates of as many episodes of the same
segments, so that all are compared at equal seconds of audio. Finished runs are not run again, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from envs.files import write_text
from rlhf_duplex.report.charts import line_chart, trailing_mean

ROOT = Path(__file__).resolve().parents[2]
AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")
METHODS: dict[str, list[str]] = {
    "grpo": [],
    "ppo": ["trainer.algorithm=ppo"],
    "rloo": ["trainer.algorithm=rloo"],
    "dr_grpo": ["trainer.algorithm=dr_grpo"],
    "clip_higher": ["trainer.clip_high=0.28"],
    "speaking": ["trainer.objective=speaking", "trainer.onset_words=[]"],
}


def run(method: str, seed: int, out: Path, overrides: Sequence[str]) -> None:
    """Train once, unless it was done before."""
    folder = out / f"{method}_{seed}"
    if (folder / "evaluation" / "after.json").exists():
        return
    arguments = [f"run_dir={folder}", f"seed={seed}", *METHODS[method], *overrides]
    if list(folder.glob("checkpoints/step_*")):
        arguments.append("resume=true")
    measured = [path for path in sorted(out.glob("*_[0-9]*/evaluation/before.json")) if path.parents[1] != folder]
    if measured:  # all begin with the same policy
        arguments.append(f"evaluation.before={measured[0]}")
    command = [sys.executable, "-m", "rlhf_duplex.cli", "train", str(ROOT / "configs" / "quickstart.yaml"), *arguments]
    print(f"{method}, seed {seed}: {' '.join(arguments)}", flush=True)
    with open(out / f"{method}_{seed}.log", "a") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def rewards(path: Path) -> dict[str, float]:
    """By axis, the mean reward of an evaluation."""
    axes = json.loads(path.read_text())["axes"]
    return {axis: axes[axis]["reward"]["mean"] for axis in AXES if axis in axes and "reward" in axes[axis]}


def table(out: Path) -> str:
    """All finished runs as Markdown: each method's rewards on held-out segments, mean and spread over its seeds."""
    lines = ["| method | seeds | audio-s | " + " | ".join(AXES) + " | axes improved (by seed) | known word pairs |"]
    lines.append("|---" * (len(AXES) + 5) + "|")
    first = sorted(out.glob("*_[0-9]*/evaluation/before.json"))
    if first:
        before = [rewards(path) for path in first]
        cells = [f"{np.mean([row[axis] for row in before if axis in row]):+.2f}" for axis in AXES]
        lines.append(f"| before | | | {' | '.join(cells)} | | {_pairs(first)} |")
    for method in METHODS:
        finished = sorted(out.glob(f"{method}_[0-9]*/evaluation/after.json"))
        if not finished:
            continue
        pairs = [(rewards(path.with_name("before.json")), rewards(path)) for path in finished]
        cells = []
        for axis in AXES:
            values = [after[axis] for _, after in pairs if axis in after]
            cells.append(f"{np.mean(values):+.2f} ± {np.std(values):.2f}" if values else "-")
        better = [sum(after[axis] > before[axis] for axis in after if axis in before) for before, after in pairs]
        audio = [sum(line["audio_seconds"] for line in metrics(path.parents[1])) for path in finished]
        lines.append(
            f"| {method} | {len(finished)} | {np.mean(audio):,.0f} | {' | '.join(cells)} | "
            f"{', '.join(map(str, better))} | {_pairs(finished)} |"
        )
    return "\n".join(lines)


def _pairs(paths: Sequence[Path]) -> str:
    """How much of what is said are known word pairs, mean over the evaluations: what a reward for timing costs."""
    found = [json.loads(path.read_text())["axes"].get("words", {}).get("known_pairs") for path in paths]
    values = [row["mean"] for row in found if row is not None]
    return f"{np.mean(values):.2f}" if values else "-"


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(out: Path, axis: str) -> dict[str, tuple[list[float], list[float]]]:
    """By method, the reward on an axis in training over the seconds of audio so far: mean over seeds, smoothed."""
    found = {}
    for method in METHODS:
        seeds = [metrics(path.parent) for path in sorted(out.glob(f"{method}_[0-9]*/metrics.jsonl"))]
        seeds = [lines for lines in seeds if lines]
        if not seeds:
            continue
        count = min(len(lines) for lines in seeds)
        audio = np.mean([np.cumsum([line["audio_seconds"] for line in lines[:count]]) for lines in seeds], axis=0)
        values = [[line.get(f"reward/{axis}", np.nan) for line in lines[:count]] for lines in seeds]
        mean = np.nanmean(values, axis=0)
        known = ~np.isnan(mean)
        found[method] = (audio[known].tolist(), trailing_mean(mean[known], 5).tolist())
    return found


def page(out: Path, text: str) -> str:
    """The table and the curves as one HTML page."""
    charts = "".join(
        f"<figure><figcaption>{axis}</figcaption>"
        f"{line_chart(axis, curves(out, axis), 'reward', axis, 'seconds of audio')}</figure>"
        for axis in AXES
    )
    style = "body{font:15px sans-serif;margin:2em} figure{display:inline-block;margin:1em} svg{width:480px;height:auto}"
    style += "table{border-collapse:collapse} th,td{text-align:left;padding:.3em .8em;border-bottom:1px solid #ccc}"
    style += "svg text{font:10px sans-serif}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Algorithms on nano</title><style>{style}</style>"
        f"<h1>Algorithms on nano, at equal seconds of audio</h1>{_html(text)}{charts}</html>"
    )


def _html(text: str) -> str:
    """A Markdown table as HTML."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.algorithms",
        description=__doc__.splitlines()[0],
        epilog="example: python -m experiments.algorithms trainer.updates=20 --seeds 0 --methods grpo ppo",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for every run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for method in options.methods:
            run(method, seed, options.out.resolve(), options.overrides)
    text = table(options.out)
    for name, content in (("table.md", text + "\n"), ("algorithms.html", page(options.out, text))):
        write_text(options.out / name, content)
    print(text)
    print(f"wrote {options.out / 'table.md'} and {options.out / 'algorithms.html'}")


if __name__ == "__main__":
    main()
