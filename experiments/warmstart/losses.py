"""DPO, DPO-LN, APO-Zero and SimPO from the same pairs, over seeds, in one table.

    python -m experiments.warmstart.losses --pairs runs/pairs/pairs.jsonl --out runs/losses --seeds 0,1,2
    python -m experiments.warmstart.losses --pairs runs/pairs/pairs.jsonl --out runs/losses_small --seeds 0 \
        evaluation.limit=2 training.epochs=1

Writes `table.md` and `table.json` into the folder; a run that is there is kept. Arguments with `=` go to every run.
"""

import argparse
from pathlib import Path

from envs.files import write_text
from experiments.warmstart.common import (
    cell,
    held_out_accuracy,
    markdown,
    mean_of,
    paired,
    reply_length,
    run_once,
    seeds,
    talk_over,
    write_json,
)
from rlhf_duplex.evaluation.statistics import bootstrap_interval

CONFIG = Path(__file__).parents[2] / "configs" / "nano_dpo_ln.yaml"
# |y| is some 80 frames: the length-normalised losses see log-ratios so much smaller, and take a beta so much larger.
LOSSES = {
    "DPO": ["loss.name=sigmoid", "loss.beta=0.12"],
    "DPO-LN": ["loss.name=sigmoid_norm", "loss.beta=10"],
    "APO-Zero": ["loss.name=apo_zero", "loss.beta=0.12"],
    "SimPO": ["loss.name=simpo", "loss.beta=10"],
}
AXES = (
    ("turn_taking", "barge_in_rate"),
    ("turn_taking", "takeover_rate"),
    ("turn_taking", "reward"),
    ("pause_handling", "takeover_rate"),
    ("backchannel", "f1"),
    ("user_interruption", "reward"),
)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    options = parser.parse_args()
    rows, record = [], {}
    for name, keys in LOSSES.items():
        runs = [options.out / f"{name.lower()}-{seed}" for seed in options.seeds]
        for run, seed in zip(runs, options.seeds, strict=True):
            arguments = ["warmstart", str(CONFIG), f"pairs={options.pairs}", f"run_dir={run}", f"seed={seed}"]
            # All episodes are kept: words and overlap are counted in them.
            arguments += [f"evaluation.seed={seed + 1}", "evaluation.episodes=1000", *keys, *options.overrides]
            run_once(arguments, run / "evaluation" / "after.json")
        befores, afters = ([run / "evaluation" / f"{s}.json" for run in runs] for s in ("before", "after"))
        accuracy = bootstrap_interval([held_out_accuracy(run) for run in runs])
        words = [sum(reply_length(run, stage) for run in runs) / len(runs) for stage in ("before", "after")]
        over = [sum(talk_over(run, stage) for run in runs) / len(runs) for stage in ("before", "after")]
        changes = {f"{axis}/{metric}": paired(befores, afters, axis, metric) for axis, metric in AXES}
        rows.append(
            [
                name,
                f"{accuracy.mean:.3f}",
                f"{over[0]:.3f} -> {over[1]:.3f}",
                f"{words[0]:.1f} -> {words[1]:.1f}",
                *(cell(changes[f"{axis}/{metric}"], axis, metric) for axis, metric in AXES),
            ]
        )
        record[name] = {
            "held_out_accuracy": accuracy._asdict(),
            "words": words,
            "talk_over": over,
            "before": {f"{a}/{m}": mean_of(befores, a, m) for a, m in AXES},
            "after": {f"{a}/{m}": mean_of(afters, a, m) for a, m in AXES},
            "change": {key: change._asdict() if change else None for key, change in changes.items()},
        }
    header = ["loss", "held-out accuracy", "talk-over a second", "words an episode"]
    header += [f"{axis} {metric}, change" for axis, metric in AXES]
    table = markdown(header, rows)
    write_text(options.out / "table.md", table)
    write_json(options.out / "table.json", {"seeds": options.seeds, "losses": record})
    print(table)
    print(f"wrote {options.out / 'table.md'} and {options.out / 'table.json'}")


if __name__ == "__main__":
    main()
