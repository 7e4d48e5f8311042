"""The signs of a leave-one-axis-out ablation against those of arXiv 2606.11167 (Moshi, Fisher), as a Markdown table.

python -m experiments.ablations.signs runs/ablations/leave_one_axis_out

The paper's interruption rating has a judge's score of the answers to interruptions beside it, and its latency that of
Full-Duplex-Bench v1, to which an agent that begins before the user has ended answers after 0 s.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from envs.errors import InputError
from rlhf_duplex.report.effect_table import effect_rows
from rlhf_duplex.report.runs import Comparison, read_ablation

METRICS = (
    (("pause_handling", "takeover_rate"), "pause TOR"),
    (("backchannel", "jsd"), "BC JSD"),
    (("turn_taking", "latency"), "turn latency"),
    (("content", "reward"), "interruption rating"),
)
PAPER_FULL = (0.42, 0.79, 0.12, 3.58)
PAPER = {
    "without pause": (0.74, 0.77, 0.05, 3.66),
    "without turn": (0.29, 0.79, 0.30, 3.28),
    "without backchannel": (0.47, 0.83, 0.22, 3.67),
    "without interruption": (0.39, 0.78, 0.14, 3.42),
    "without judge": (0.48, 0.78, 0.17, 3.05),
    "without schedule": (0.51, 0.78, 0.15, 3.70),
    "without context": (0.49, 0.78, 0.09, 3.53),
}
MIN_CONDITIONS = 4  # of which differences are correlated


def sign(value: float) -> str:
    """`+`, `-` or `0`."""
    return "0" if abs(value) < 5e-4 else "+" if value > 0 else "\u2212"


def as_the_paper_measures(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A result with the paper's measures: the judge's scores of interruptions alone, and 0 s for a barge-in.

    A segment drawn several times has the mean over the draws in which it was taken: its mean latency over those
    without a barge-in, and 0 s for each of the others.
    """
    if result is None:
        return None
    segments = dict(result["segments"])
    if "content" in segments:
        asked = segments["user_interruption"]["reward"]
        scores = {name: score for name, score in segments["content"]["reward"].items() if name in asked}
        segments["content"] = {"reward": scores}
    if "turn_taking" in segments:
        turns = segments["turn_taking"]
        early, taken, latency = (turns.get(name, {}) for name in ("barge_in_rate", "takeover_rate", "latency"))
        ours = {name: min(taken[name], 1 - rate) for name, rate in early.items()}  # answered, and not before the end
        means = {n: latency.get(n, 0.0) * ours[n] / (ours[n] + rate) for n, rate in early.items() if ours[n] + rate}
        segments["turn_taking"] = turns | {"latency": latency | means}
    return {**result, "segments": segments}


def sign_table(comparison: Comparison) -> str:
    """A row a condition of the paper, a cell a metric: the paper's sign, then ours with the difference.

    Bold where the corrected p is below 0.05; `agree` counts cells with equal signs among those where the paper has one.
    The last row has, for each metric, the correlation (Pearson) of the paper's differences with ours over conditions.
    """
    runs = tuple(replace(run, after=as_the_paper_measures(run.after)) for run in comparison.runs)
    comparison = replace(comparison, runs=runs)
    known = {(a, m) for run in comparison.finished for a, row in (run.after or {})["axes"].items() for m in row}
    shown = [(index, metric) for index, (metric, _) in enumerate(METRICS) if metric in known]
    rows = {row["name"]: row["cells"] for row in effect_rows(comparison, [metric for _, metric in shown])}
    lines = ["| | " + " | ".join(METRICS[index][1] for index, _ in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    same = compared = clear = clear_same = 0
    pairs: dict[int, list[tuple[float, float]]] = {index: [] for index, _ in shown}
    for name, figures in PAPER.items():
        if name not in rows:
            lines.append(f"| {name} |" + " not run |" * len(shown))
            continue
        cells = []
        for (index, _), cell in zip(shown, rows[name], strict=True):
            theirs = sign(figures[index] - PAPER_FULL[index])
            if "missing" in cell:
                cells.append(f"paper {theirs}; {cell['missing']}")
                continue
            ours = sign(cell["mean"])
            compared += theirs != "0"
            same += theirs != "0" and theirs == ours
            clear += theirs != "0" and bool(cell["verdict"])
            clear_same += theirs == ours and bool(cell["verdict"])
            pairs[index].append((figures[index] - PAPER_FULL[index], cell["mean"]))
            text = f"{cell['difference']}, {cell['p']}"
            cells.append(f"paper {theirs}; ours {ours} ({f'**{text}**' if cell['verdict'] else text})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if all(len(found) >= MIN_CONDITIONS for found in pairs.values()):
        likeness = [np.corrcoef(np.array(found).T)[0, 1] for found in pairs.values()]
        lines.append("| correlation | " + " | ".join(f"{r:.2f}" for r in likeness) + " |")
    beyond = f", {clear_same} of the {clear} beyond chance" if clear else ""
    return "\n".join([*lines, "", f"{same} of {compared} signs agree{beyond}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments.ablations.signs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the ablation")
    try:
        print(sign_table(read_ablation(parser.parse_args().folder)))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
