"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_duplex.data import curate_options
from rlhf_duplex.data.pair_arguments import add_commands as add_pair_commands
from rlhf_duplex.evaluation import command as evaluate

TRAIN_HELP = """examples:
  rlhf-duplex train configs/quickstart.yaml
  rlhf-duplex train configs/quickstart.yaml trainer.updates=5 run_dir=runs/short
  rlhf-duplex train checkpoint=nano segments=my/segments.jsonl
  rlhf-duplex train configs/quickstart.yaml resume=true
  rlhf-duplex train configs/quickstart.yaml cluster.workers=2
  rlhf-duplex train configs/moshi_7b_paper.yaml --dry-run"""
WARMSTART_HELP = """examples:
  rlhf-duplex warmstart configs/nano_dpo_ln.yaml
  rlhf-duplex warmstart configs/nano_dpo_ln.yaml loss.name=sigmoid run_dir=runs/dpo
  rlhf-duplex warmstart configs/nano_dpo_ln.yaml lora.rank=16 reference.mode=lora_off
  rlhf-duplex warmstart configs/nano_dpo_ln.yaml resume=true
  rlhf-duplex warmstart configs/moshi_7b_dpo_ln.yaml --dry-run"""
PIPELINE_HELP = """examples:
  rlhf-duplex pipeline configs/quickstart.yaml
  rlhf-duplex pipeline configs/quickstart.yaml run_dir=runs/second
  rlhf-duplex pipeline configs/quickstart.yaml --dry-run"""
ABLATE_HELP = """examples:
  rlhf-duplex ablate configs/ablations/leave_one_axis_out.yaml
  rlhf-duplex ablate configs/ablations/leave_one_axis_out.yaml seeds=[0] trainer.updates=10 run_dir=runs/short
  rlhf-duplex ablate configs/ablations/reward_weights.yaml --dry-run
  rlhf-duplex ablate configs/ablations/reward_weights.yaml --retry-failed

Started again, the same command goes on; finished trials are never run again."""
REPORT_HELP = """examples:
  rlhf-duplex report runs/quickstart                               the page of a run
  rlhf-duplex report runs/one runs/two runs/three --out page.html  runs held against the first
  rlhf-duplex report runs/ablations/leave_one_axis_out             the page of an ablation"""

EXPORT_HELP = """examples:
  rlhf-duplex export runs/quickstart --to served                    a bundle, adapters merged
  rlhf-duplex export runs/quickstart/checkpoints/step_000044 --to served --dtype bfloat16
  rlhf-duplex export runs/adapted --to adapters --lora              for moshi.server --lora-weight"""
REWARDS_HELP = """examples:
  rlhf-duplex rewards                                  all axes, with their options
  rlhf-duplex rewards overlap                          one of them, with its documentation
  rlhf-duplex rewards check my_axes.py                 every axis of a file keeps the contract?
  rlhf-duplex rewards check my_package.axes:Humour     a class
  rlhf-duplex rewards check overlap free_seconds=0     a registered axis with an option
  rlhf-duplex rewards check my_axes.py --episodes runs/mine/evaluation/after"""


class _Version(argparse.Action):
    """Prints versions, which takes imports that `--help` should not wait for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from rlhf_duplex.run_folder import versions

        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="rlhf-duplex",
        description="Teach a full-duplex speech model when to speak: GRPO on timing rewards.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="of this, and of what decides a run's numbers")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    configured = (
        ("warmstart", "preference optimisation (DPO-LN) on pairs, offline; evaluates before and after", WARMSTART_HELP),
        ("train", "improve a policy with RL; evaluates before and after, and writes a report", TRAIN_HELP),
    )
    for name, text, epilog in configured:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("arguments", nargs="*", metavar="CONFIG | key=value", help="a YAML file, then overrides")
        command.add_argument("--dry-run", action="store_true", help="check shapes, memory and steps; no weights")
    evaluate.add_command(commands)
    pipeline = commands.add_parser(
        "pipeline",
        help="run the stages of a configuration, each only when its inputs have changed",
        epilog=PIPELINE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pipeline.add_argument("config", type=Path, help="a YAML file with `stages`")
    pipeline.add_argument("overrides", nargs="*", metavar="key=value")
    pipeline.add_argument("--dry-run", action="store_true", help="say which stages would run")
    curate = commands.add_parser(
        "curate",
        help="find segments of the four axes in recordings of people, and write a manifest",
        description="Find segments of the four axes in two-channel recordings, and write a manifest to train on.",
        epilog=curate_options.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    curate_options.add_arguments(curate)
    export = commands.add_parser(
        "export",
        help="write what a run learned for Moshi's own server",
        description="Write what a run learned as a folder that `moshi.server` loads, or as a LoRA file for it.",
        epilog=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint), a checkpoint, or a bundle")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    export.add_argument("--lora", action="store_true", help="the adapters alone, of a run with lora.rank")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights on disk")
    ablate = commands.add_parser(
        "ablate",
        help="train with one thing changed at a time, over seeds; a table and a page of what it does",
        epilog=ABLATE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ablate.add_argument("config", type=Path, help="a YAML file with `base` and what varies")
    ablate.add_argument("overrides", nargs="*", metavar="key=value", help="of the ablation, or of every trial")
    ablate.add_argument("--dry-run", action="store_true", help="list the trials, run none")
    ablate.add_argument("--retry-failed", action="store_true", help="start trials again that have failed for good")
    report = commands.add_parser(
        "report",
        help="write the page of a run or an ablation anew, or compare any runs",
        epilog=REPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder or an ablation's; or several")
    report.add_argument(
        "--out",
        type=Path,
        help="the page to write (default: in the run's or the ablation's folder; comparison.html of several runs)",
    )
    add_pair_commands(commands)
    rewards = commands.add_parser(
        "rewards",
        help="list the reward axes, or check one of your own",
        epilog=REWARDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rewards.add_argument("name", nargs="?", metavar="NAME | check", help="an axis to read about, or `check`")
    rewards.add_argument("target", nargs="?", help="with check: a name, module:Class or file.py")
    rewards.add_argument("options", nargs="*", metavar="key=value", help="with check: options of the axis")
    rewards.add_argument("--episodes", type=Path, help="with check: a folder of episodes that a run saved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: exit code 0, 2 with one line for what the user can fix, 1 with a traceback for what not.

    A full disk is among what the user can fix. `evaluate --fail-if` ends with 3 where a condition holds, `ablate` with
    1 where trials failed (it says which). A signal ends `train`, `warmstart` and `ablate` with 0, since all is saved
    that it takes to go on (whoever chains them wants `pipeline`, which tells), the others with 130 and one line.
    """
    parser = build_parser()
    options, left = parser.parse_known_args(arguments)
    taken = next((name for name in ("arguments", "overrides") if hasattr(options, name)), None)
    if taken and all("=" in word and not word.startswith("-") for word in left):
        getattr(options, taken).extend(left)  # argparse takes key=value on one side of the options only
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    for name, value in vars(options).items():
        setattr(options, name, _at_home(value))
    try:
        return _caught(options)
    except KeyboardInterrupt:
        print(
            "rlhf-duplex: stopped; training that has a checkpoint goes on with resume=true, the rest with the same "
            "command",
            file=sys.stderr,
        )
        return 130


def _at_home(value: Any) -> Any:
    """Paths that begin with `~/`, expanded: a shell leaves `--out=~/x` and quoted ones as they are."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return value.expanduser() if isinstance(value, Path) and value.parts[:1] == ("~",) else value


def _caught(options: argparse.Namespace) -> int:
    from envs.errors import InputError  # seconds of imports, in which Ctrl-C is a line, too

    try:
        return _run(options)
    except InputError as error:
        print(f"rlhf-duplex: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if "No space left on device" not in str(error) and getattr(error, "errno", None) != errno.EDQUOT:
            raise  # safetensors has an error of its own for a full disk
        print(
            f"rlhf-duplex: the disk is full ({error}): make room; training that has a checkpoint goes on with "
            "resume=true, the rest with the same command",
            file=sys.stderr,
        )
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "curate":
        from rlhf_duplex.data.curate import curate

        curate(options.corpus, options.out, curate_options.from_arguments(options))
        return 0
    if options.command == "export":
        from rlhf_duplex.export import run

        print("\n".join(run(options.run, options.to, options.lora, options.dtype)))
        return 0
    if options.command == "report":
        return _report(options)
    if options.command in ("pairs", "converse"):
        from rlhf_duplex.pairs import run_converse, run_pairs

        (run_pairs if options.command == "pairs" else run_converse)(options)
        return 0
    if options.command == "rewards":
        return _rewards(options)
    if options.command == "pipeline":
        from rlhf_duplex.pipeline import load_pipeline, run_pipeline

        outcome = run_pipeline(load_pipeline(options.config, options.overrides), main, dry=options.dry_run)
        verb = "would run" if options.dry_run else "ran"
        print(f"{verb} {', '.join(outcome.ran) or 'nothing'}; done before: {', '.join(outcome.kept) or 'nothing'}")
        return 0
    if options.command == "evaluate":
        return evaluate.run_command(options)
    if options.command == "ablate":
        return _ablate(options)
    path, overrides = None, list(options.arguments)
    if overrides and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    if options.command == "warmstart":
        return _warmstart(path, overrides, options.dry_run)
    from rlhf_duplex.config import load_config

    config = load_config(path, overrides)
    if options.dry_run:
        from rlhf_duplex.train_dry_run import dry_run_training

        dry_run_training(config)
        return 0
    from rlhf_duplex.run import train

    train(config)
    return 0


def _report(options: argparse.Namespace) -> int:
    from rlhf_duplex.report.build import build_report
    from rlhf_duplex.report.comparison import build_comparison
    from rlhf_duplex.report.runs import is_ablation, read_ablation, read_runs

    first = options.runs[0]
    if len(options.runs) > 1:
        print(f"wrote {build_comparison(read_runs(options.runs), options.out or Path('comparison.html'))}")
    elif is_ablation(first):
        print(f"wrote {build_comparison(read_ablation(first), options.out or first / 'report.html')}")
    else:
        print(f"wrote {build_report(first, options.out)}")
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from rlhf_duplex.ablate.plan import load_plan
    from rlhf_duplex.ablate.run import ablate, failed_trials, finish, show_plan
    from rlhf_duplex.run_folder import make_console

    plan = load_plan(options.config, options.overrides)
    if options.dry_run:
        show_plan(plan, make_console())
    else:
        ablate(plan, make_console(), options.retry_failed)
        if plan.config.search is not None and plan.config.search.sampler == "optuna":
            plan = load_plan(options.config, options.overrides)  # with the points that were found
            finish(plan, make_console())
        return 1 if failed_trials(plan) else 0
    return 0


def _rewards(options: argparse.Namespace) -> int:
    from envs.errors import InputError
    from rlhf_duplex.rewards_command import check_axes, list_axes
    from rlhf_duplex.run_folder import make_console

    if options.name != "check":
        list_axes(options.name, make_console())
    elif options.target is None:
        raise InputError("rewards check needs an axis: give a name, module:Class or file.py")
    else:
        check_axes(options.target, options.options, options.episodes, make_console())
    return 0


def _warmstart(path: Path | None, overrides: list[str], dry: bool) -> int:
    from rlhf_duplex.warmstart.config import load_warmstart_config

    config = load_warmstart_config(path, overrides)
    if dry:
        from rlhf_duplex.warmstart.dry_run import dry_run

        dry_run(config)
        return 0
    from rlhf_duplex.warmstart.run import warmstart

    warmstart(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
