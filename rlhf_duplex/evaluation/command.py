"""`rlhf-duplex evaluate`: its arguments, its suites, and its exit code."""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = """examples:
  rlhf-duplex evaluate checkpoint=nano
  rlhf-duplex evaluate checkpoint=runs/quickstart run_dir=runs/checked --fail-if "turn_taking.latency > 0.6"
  rlhf-duplex evaluate checkpoint=runs/quickstart run_dir=runs/checked \\
      --baseline runs/base/evaluation/before.json --fail-if "backchannel.f1 worse"
  rlhf-duplex evaluate --suite fdb-v1 --data full_duplex_bench/v1_0 --checkpoint nano --checkpoint rl=runs/quickstart
  rlhf-duplex evaluate --suite fdb-v1 --data full_duplex_bench/v1_0 --outputs theirs=outputs/ compatible=true
  rlhf-duplex evaluate --suite live --checkpoint base=nano --checkpoint rl=runs/quickstart
  rlhf-duplex evaluate --suite questions --checkpoint nano
  rlhf-duplex evaluate --suite safety --checkpoint nano --judge-url http://localhost:8000/v1 --judge-model MODEL"""
_MARK = ".evaluation"  # in a run folder of this command: it may be moved aside
SUITES = ("heldout", "fdb-v1", "fdb-v1.5", "live", "questions", "safety")


def add_command(commands: Any) -> None:
    """The command and its arguments."""
    text = "play a suite to one or more checkpoints, and print every metric with its interval"
    command = commands.add_parser(
        "evaluate", help=text, description=text, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("arguments", nargs="*", metavar="CONFIG | key=value", help="a YAML file, then overrides")
    command.add_argument("--suite", choices=SUITES, default="heldout", help="what is played (default: heldout)")
    data = (
        "folder of the benchmark, the questions or the safety set; of live it is a file, the manifest of the users' "
        "segments (default: what ships with nano; a benchmark has to be given)"
    )
    command.add_argument("--data", type=Path, metavar="PATH", help=data)
    command.add_argument("--out", type=Path, help="run folder (default: runs/SUITE; of heldout it is run_dir)")
    system = "a checkpoint to play, or NAME=PATH; may be given again"
    command.add_argument("--checkpoint", action="append", default=[], metavar="[NAME=]PATH", help=system)
    outputs = "outputs of another system in the benchmark's layout, to score without a policy; may be given again"
    command.add_argument("--outputs", action="append", default=[], metavar="[NAME=]DIR", help=outputs)
    command.add_argument("--asr", metavar="MODEL", help="transcribe by speech recognition, not by the inner monologue")
    command.add_argument("--human", type=Path, metavar="FILE", help="people's backchannel timing, where not in --data")
    command.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, up to and with /v1")
    command.add_argument("--judge-model", metavar="NAME", help="the judge's model")
    command.add_argument("--judge-key-variable", metavar="NAME", help="environment variable that holds the key")
    command.add_argument("--mos", action="store_true", help="predict speech quality, too (needs the extra `mos`)")
    gate = 'exit with code 3 if this holds, such as "turn_taking.latency > 0.2"; may be given again'
    command.add_argument("--fail-if", action="append", default=[], metavar="CONDITION", help=gate)
    command.add_argument("--baseline", type=Path, metavar="JSON", help="result that `worse` is held against")


def run_command(options: argparse.Namespace) -> int:
    """Run it: 0, or 3 where the gate is closed.

    Raises:
        InputError: what the user can fix.
    """
    from envs.errors import InputError
    from rlhf_duplex.config import load_config
    from rlhf_duplex.evaluation.gate import check_gate, parse_condition
    from rlhf_duplex.evaluation.metrics import read_results

    conditions = [parse_condition(text) for text in options.fail_if]
    baseline = None if options.baseline is None else read_results(options.baseline)
    check_gate(conditions, baseline)
    path, overrides = None, list(options.arguments)
    if overrides and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    compatible = [o for o in overrides if o.startswith("compatible=")]
    overrides = [o for o in overrides if o not in compatible]
    if any(o not in ("compatible=true", "compatible=false") for o in compatible):
        raise InputError(f"'{compatible[-1]}' is not known: write compatible=true or compatible=false")
    options.compatible = bool(compatible) and compatible[-1] == "compatible=true"
    if options.compatible and options.suite != "fdb-v1":
        raise InputError("compatible=true is of --suite fdb-v1: only its official scripts have faults to reproduce")
    _check_suite(options)
    if (options.judge_url is None) != (options.judge_model is None):
        raise InputError("a judge needs --judge-url and --judge-model")
    config = load_config(path, overrides)
    if options.suite == "heldout":
        results = _heldout(options, config)
    elif ignored := [o for o in overrides if o.startswith(("run_dir=", "resume="))]:
        raise InputError(f"{ignored[0]} is of --suite heldout, not of {options.suite}: say where to write with --out")
    else:
        results = _suite(options, config, checkpoint_given=any(o.startswith("checkpoint=") for o in overrides))
    return _gate(conditions, results, baseline)


# Of the suites, those that an option means something to.
_BENCHMARKS, _NOT_HELD_OUT = ("fdb-v1", "fdb-v1.5"), SUITES[1:]
_OF_SUITES = {
    "data": _NOT_HELD_OUT,
    "out": _NOT_HELD_OUT,
    "checkpoint": _NOT_HELD_OUT,
    "outputs": _BENCHMARKS,
    "human": ("fdb-v1",),
    "asr": (*_BENCHMARKS, "questions", "safety"),
    "judge_url": (*_BENCHMARKS, "live", "safety"),
    "mos": (*_BENCHMARKS, "live"),
}


def _check_suite(options: argparse.Namespace) -> None:
    """Options that would be without effect are a misunderstanding."""
    from envs.errors import InputError

    for name, suites in _OF_SUITES.items():
        if getattr(options, name) and options.suite not in suites:
            hint = "" if options.suite != "heldout" else "; heldout takes checkpoint=... run_dir=... as arguments"
            raise InputError(
                f"--{name.replace('_', '-')} is of --suite {' and '.join(suites)}, not of {options.suite}{hint}"
            )


def _heldout(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    from rlhf_duplex.evaluation.metrics import read_results
    from rlhf_duplex.run import evaluate

    return {Path(config.run_dir).name: read_results(evaluate(config))}


def _suite(options: argparse.Namespace, config: Any, checkpoint_given: bool) -> dict[str, Any]:
    from rlhf_duplex.evaluation.systems import parse_systems
    from rlhf_duplex.inputs import check_machine
    from rlhf_duplex.policy.prompt import check_prompt
    from rlhf_duplex.run_folder import claimed, make_console

    console = make_console()
    chosen = list(options.checkpoint)
    if checkpoint_given or not (chosen or options.outputs):
        chosen.insert(0, config.checkpoint)
    check_machine(config)
    check_prompt(config.prompt)
    systems = parse_systems(chosen, options.outputs)
    out = options.out or Path("runs") / options.suite
    prepare = functools.partial(prepare_out, out, _read_by(options, systems))
    run = {"fdb-v1": _benchmark, "fdb-v1.5": _benchmark, "live": _live, "questions": _spoken, "safety": _spoken}
    with claimed(out, "--out"):
        return finish(out, run[options.suite](options, config, systems, prepare, console), console)


def _benchmark(options: argparse.Namespace, config: Any, systems: Any, prepare: Any, console: Any) -> dict[str, Any]:
    from envs.errors import InputError
    from envs.speech import make_detector
    from rlhf_duplex.evaluation.full_duplex_bench.run import Benchmark, run_benchmark

    if options.data is None:
        raise InputError(f"--suite {options.suite} needs --data, the folder of the benchmark")
    quality = _quality(options)
    detector = make_detector(config.detector.name, **config.detector.options)
    benchmark = Benchmark(
        options.suite,
        options.data,
        options.out or Path("runs") / options.suite,
        systems,
        options.compatible,
        options.asr,
        options.human,
        judge_config(options),
        quality,
    )
    return run_benchmark(benchmark, prepare, config, detector, console)


def _quality(options: argparse.Namespace) -> Any:
    if not options.mos:
        return None
    from rlhf_duplex.evaluation.speech_quality import load_predictor

    return load_predictor()


def _spoken(options: argparse.Namespace, config: Any, systems: Any, prepare: Any, console: Any) -> dict[str, Any]:
    from envs.errors import InputError
    from envs.speech import make_detector
    from rlhf_duplex.evaluation.spoken import run_spoken

    judge = judge_config(options)
    if options.suite == "safety" and judge is None:
        raise InputError("--suite safety needs a judge: give --judge-url and --judge-model")
    detector = make_detector(config.detector.name, **config.detector.options)
    return run_spoken(options.suite, options.data, prepare, systems, config, detector, console, judge, options.asr)


def _live(options: argparse.Namespace, config: Any, systems: Any, prepare: Any, console: Any) -> dict[str, Any]:
    from rlhf_duplex.evaluation.live import run_live

    judge, quality = judge_config(options), _quality(options)
    return run_live(options.data, prepare, systems, config, console, judge, quality)


def judge_config(options: argparse.Namespace) -> Any:
    """The judge that the arguments name, or None.

    Raises:
        InputError: a value that cannot be.
    """
    from rewards.judge import JudgeConfig

    if options.judge_url is None:
        return None
    return JudgeConfig(options.judge_url, options.judge_model, key_variable=options.judge_key_variable)


def prepare_out(out: Path, used: Sequence[Path] = ()) -> Path:
    """The run folder, made and writable; the one of an earlier evaluation is kept as `NAME.old-1` (or the next number).

    Args:
        out: the folder.
        used: what the evaluation reads; none of it may lie in the folder.

    Raises:
        InputError: it cannot be written, holds something else, or what the evaluation reads.
    """
    from envs.errors import InputError
    from rlhf_duplex.run_folder import keep_old

    inside = [path for path in used if path.resolve().is_relative_to(out.resolve())]
    if inside:
        raise InputError(f"{inside[0]} lies in the run folder {out}: choose another with --out")
    try:
        if out.is_dir() and any(out.iterdir()):
            if not (out / _MARK).is_file():
                raise InputError(f"{out} holds something else than an evaluation: choose another folder with --out")
            keep_old(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).write_text("made by rlhf-duplex evaluate\n")
    except OSError as error:
        raise InputError(f"run folder {out} cannot be written ({error}): choose another with --out") from error
    return out


def _read_by(options: argparse.Namespace, systems: Any) -> list[Path]:
    """Folders and files that an evaluation reads."""
    paths = [options.data, options.human, options.baseline, *(system.outputs for system in systems)]
    checkpoints = [Path(system.checkpoint) for system in systems if system.checkpoint]
    return [path for path in paths if path is not None] + [path for path in checkpoints if path.exists()]


def finish(out: Path, results: Mapping[str, Any], console: Any) -> dict[str, Any]:
    """The table of all systems, the page, and the last line."""
    from rlhf_duplex.evaluation.comparison import as_table
    from rlhf_duplex.report.systems import build_systems_page

    console.print(as_table(results))
    page = build_systems_page(out, results)
    console.print(f"wrote {page} and {', '.join(str(out / f'{name}.json') for name in results)}", soft_wrap=True)
    return dict(results)


def _gate(conditions: Sequence[Any], results: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> int:
    from rlhf_duplex.evaluation.gate import EXIT_CODE, failures

    code = 0
    for name, result in results.items():
        for sentence in failures(conditions, result, baseline):
            print(f"rlhf-duplex: {name} fails: {sentence}", file=sys.stderr)
            code = EXIT_CODE
    if conditions and code == 0:
        print(f"all {len(conditions)} condition(s) of --fail-if pass")
    return code
