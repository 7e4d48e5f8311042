"""Folders as `rlhf-duplex ablate` and `train` leave them, with results made up here: no model, no training."""

import json
from pathlib import Path

import numpy as np
from report_runs import AGENT, HOSTILE, make_episode, score

from rlhf_duplex.ablate.trial import Record, write_record
from rlhf_duplex.evaluation.metrics import write_results
from rlhf_duplex.evaluation.suite import save_examples

SEGMENTS = 8


def values(pause: float, latency: float, seed: int) -> dict:
    """Segment by segment: a share `pause` of takeovers, and latencies about `latency` that seeds and segments move."""
    rng = np.random.default_rng(seed)
    noise = 0.02 * rng.standard_normal(SEGMENTS)
    takeovers = [float(index < round(pause * SEGMENTS)) for index in range(SEGMENTS)]
    return {
        "pause_handling": {
            "takeover_rate": {f"p{i}": v for i, v in enumerate(takeovers)},
            "reward": {f"p{i}": -v for i, v in enumerate(takeovers)},
        },
        "turn_taking": {"latency": {f"t{i}": latency + 0.1 * i + float(n) for i, n in enumerate(noise)}},
        "speech_rate": {"reward": {f"t{i}": -0.5 + float(n) for i, n in enumerate(noise)}},
    }


def write_run(folder: Path, result: dict, before: dict, config: str = "seed: 0\n", episodes: bool = True) -> Path:
    """A finished run folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    for stage, found, which in (("before", before, 0), ("after", result, 1)):
        write_results(folder / "evaluation" / f"{stage}.json", found, {"lead_in_seconds": 3.0, "samples": 1})
        if episodes:
            made = [make_episode(axis, AGENT[axis][which]) for axis in ("pause_handling", "turn_taking")]
            save_examples(folder / "evaluation" / stage, made, score(made), 1)
    return folder


def write_ablation(root: Path, conditions: dict[str, tuple[dict, float, float]], seeds=(0, 1, 2)) -> Path:
    """An ablation's folder. By condition: the keys that vary, its share of pause takeovers and its turn latency."""
    before, trials = values(0.75, 1.5, 99), []
    for seed in seeds:
        for name, (_, pause, latency) in conditions.items():
            trial = f"{len(trials)}_seed{seed}"
            run = write_run(root / "trials" / trial, values(pause, latency, 10 * seed + len(trials)), before)
            if trials:  # the page makes the first one's
                (run / "report.html").write_text("its own report")
            write_record(root, trial, Record("done", 1, 60.0))
            trials.append({"name": trial, "condition": name, "seed": seed})
    failed = {"name": "broken_seed0", "condition": next(iter(conditions)), "seed": 7}
    write_record(root, failed["name"], Record("failed", 2, 5.0, "NonFiniteError", f"loss is nan {HOSTILE}", "line 1"))
    plan = {
        "base": "configs/quickstart.yaml",
        "baseline": next(iter(conditions)),
        "metrics": [],
        "conditions": [{"name": name, "values": row[0]} for name, row in conditions.items()],
        "skipped": [{"name": "without judge", "why": "the base has no judged axis"}],
        "trials": [*trials, failed],
    }
    (root / "ablation.json").write_text(json.dumps(plan))
    return root
