"""A warm start and RL against RL alone, at the same number of RL updates, over seeds.

    python -m experiments.warmstart.then_rl --pairs runs/pairs/pairs.jsonl --out runs/then_rl --seeds 0,1,2
    python -m experiments.warmstart.then_rl --pairs runs/pairs/pairs.jsonl --out runs/then_rl_small --seeds 0 \
        trainer.updates=1 trainer.groups=4 evaluation.limit=2

Both are measured after RL with the same draws; the table has the difference on every axis. Arguments with `=` go to
every RL run.
"""

import argparse
from pathlib import Path

from envs.files import write_text
from experiments.warmstart.common import cell, markdown, mean_of, paired, run_once, seeds, write_json

CONFIGS = Path(__file__).parents[2] / "configs"
AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--warm", action="append", default=[], help="key=value for every warm start")
    parser.add_argument("overrides", nargs="*", help="key=value for every RL run")
    options = parser.parse_args()
    alone, after_warm = [], []
    for seed in options.seeds:
        warm, rl = options.out / f"warm-{seed}", [f"seed={seed}", *options.overrides]
        arguments = ["warmstart", str(CONFIGS / "nano_dpo_ln.yaml"), f"pairs={options.pairs}", f"run_dir={warm}"]
        run_once([*arguments, f"seed={seed}", "evaluation.segments=null", *options.warm], warm / "report.html")
        for found, name, checkpoint in ((alone, "alone", "nano"), (after_warm, "warm_rl", str(warm))):
            run = options.out / f"{name}-{seed}"
            arguments = ["train", str(CONFIGS / "quickstart.yaml"), f"checkpoint={checkpoint}", f"run_dir={run}"]
            run_once([*arguments, *rl], run / "evaluation" / "after.json")
            found.append(run / "evaluation" / "after.json")
    rows, record, words = [], {}, []
    for axis in AXES:
        difference = paired(alone, after_warm, axis, "reward")
        text = cell(difference, axis, "reward")
        means = [mean_of(paths, axis, "reward") for paths in (alone, after_warm)]
        rows.append([axis, *(f"{mean:+.3f}" for mean in means), text])
        words.append(text.rpartition("] ")[2])
        record[axis] = {"alone": means[0], "warm": means[1], "change": difference._asdict() if difference else None}
    table = markdown(["axis", "RL alone", "warm start + RL", "difference"], rows)
    verdict = f"better on {words.count('better')} axes, worse on {words.count('worse')}"
    write_text(options.out / "table.md", f"{table}\n{verdict}\n")
    write_json(options.out / "table.json", {"seeds": options.seeds, "axes": record, "verdict": verdict})
    print(f"{table}\n{verdict}\nwrote {options.out / 'table.md'} and {options.out / 'table.json'}")


if __name__ == "__main__":
    main()
