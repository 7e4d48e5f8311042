"""`evaluate --suite fdb-v1 | fdb-v1.5`: systems, policies or folders of outputs, played, scored and compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from envs.dialogues import UserSides
from envs.speech import SpeechDetector
from envs.vector import DuplexDialogueVectorEnv
from rewards.judge import Judge, JudgeConfig
from rewards.transcripts import make_transcriber
from rlhf_duplex.config import Config
from rlhf_duplex.evaluation.cases import save_cases
from rlhf_duplex.evaluation.full_duplex_bench.leaderboard import as_markdown, as_table
from rlhf_duplex.evaluation.full_duplex_bench.metrics import benchmark_detector
from rlhf_duplex.evaluation.full_duplex_bench.play import play_benchmark, transcribe_outputs
from rlhf_duplex.evaluation.full_duplex_bench.samples import Sample, read_benchmark, read_output
from rlhf_duplex.evaluation.full_duplex_bench.score import (
    check_audio,
    estimates,
    hear_outputs,
    official_figures,
    read_human_timing,
    read_outputs,
    score_v1,
    score_v15,
    timing_of,
)
from rlhf_duplex.evaluation.full_duplex_bench.worst import worst_cases
from rlhf_duplex.evaluation.metrics import SegmentValues, write_results
from rlhf_duplex.evaluation.speech_quality import Predictor, predict_quality
from rlhf_duplex.evaluation.systems import System, load_policy
from rlhf_duplex.run_folder import progress


@dataclass(frozen=True)
class Benchmark:
    """What is to be scored, and how.

    Attributes:
        suite: `fdb-v1` or `fdb-v1.5`.
        data: the benchmark's folder.
        out: run folder.
        systems: whom to score.
        compatible: the results' `axes` are the official scripts' values, and the corrected ones stand beside them.
        asr: a model for the transcripts; None takes the policy's inner monologue.
        human: people's backchannel timing, where it does not lie beside the tasks.
        judge: rates interruptions and behaviour.
        quality: predicts how the outputs sound.
    """

    suite: str
    data: Path
    out: Path
    systems: tuple[System, ...]
    compatible: bool = False
    asr: str | None = None
    human: Path | None = None
    judge: JudgeConfig | None = None
    quality: Predictor | None = None


def run_benchmark(
    benchmark: Benchmark, prepare: Callable[[], object], config: Config, detector: SpeechDetector, console: Console
) -> dict[str, Any]:
    """Play what is a policy, score everything, write `out/NAME.json` and `out/leaderboard.md`; gives results by name.

    Args:
        benchmark: what is scored.
        prepare: makes the run folder, once everything else is known to be right.
        config, detector: of the policies.

    Raises:
        InputError: before any model is loaded, where the data, the outputs of a system or the judge cannot be used.
    """
    samples = read_benchmark(benchmark.data, benchmark.suite)
    if benchmark.suite == "fdb-v1.5":
        samples = [variant for sample in samples for variant in (sample, replace(sample, clean=True))]
        for sample in samples:
            _ = sample.seconds  # a clean_input.wav that is missing is said now
    human = read_human_timing(benchmark.data, benchmark.human) if benchmark.suite == "fdb-v1" else None
    judge = None if benchmark.judge is None else Judge(benchmark.judge)
    if judge is not None:
        judge.check()
    asr = {"model": benchmark.asr, "timestamps": True, "device": config.device} if benchmark.asr else None
    transcriber = make_transcriber("agent", "asr" if asr else "inner_monologue", asr)
    transcriber.prepare([])
    for system in benchmark.systems:
        if system.outputs is not None:
            check_audio(samples, system.outputs)
            if asr is None:
                read_outputs(samples, system.outputs)
    prepare()
    results = {}
    for system in benchmark.systems:
        root = system.outputs
        written = benchmark.out / "outputs" / system.name
        if root is None:
            root = written
            policy, codec = load_policy(system, config)
            users = UserSides(codec, detector, config.context.lead_in)
            env = DuplexDialogueVectorEnv([s.segment() for s in samples], codec, detector, user_sides=users)
            frames = sum(sample.seconds + config.context.lead_in for sample in samples) * codec.frame_rate
            with progress(console, f"playing {benchmark.suite} to {system.name}", frames) as advance:
                play_benchmark(
                    policy,
                    env,
                    samples,
                    root,
                    transcriber,
                    config.evaluation.seed,
                    config.rollout.batch_size,
                    advance,
                )
        elif asr is not None:
            transcribe_outputs(samples, root, written, transcriber, detector)
        with console.status(Text(f"scoring {system.name}")):
            results[system.name] = _score(benchmark, config, system, samples, root, written, human, judge)
    if judge is not None:
        judge.close()
    if benchmark.suite == "fdb-v1":
        (benchmark.out / "leaderboard.md").write_text(as_markdown(results), encoding="utf-8")
        console.print(as_table(results))
    return results


def _score(
    benchmark: Benchmark,
    config: Config,
    system: System,
    samples: Sequence[Sample],
    root: Path,
    written: Path,
    human: Mapping[str, Sequence[float]] | None,
    judge: Judge | None,
) -> dict[str, Any]:
    words = read_outputs(samples, root, written)
    detector = benchmark_detector()
    extra: dict[str, Any] = {
        "suite": benchmark.suite,
        "system": system.name,
        "checkpoint": system.checkpoint,
        "outputs": str(root),
        "lead_in_seconds": None if system.checkpoint is None else config.context.lead_in,
        "transcripts": benchmark.asr or ("inner monologue" if system.checkpoint else "output.json"),
        "samples": len(samples),
        "data": str(benchmark.data),
    }
    failed = 0 if judge is None else judge.meter.failed  # with the systems before this one
    if benchmark.suite == "fdb-v1.5":
        values = score_v15(samples, root, words, detector, judge)
    else:
        heard = hear_outputs(samples, root, detector)
        corrected = score_v1(samples, words, heard, human, judge)
        faulty = hear_outputs(samples, root, detector, compatible=True)
        official = score_v1(samples, words, faulty, human, compatible=True)
        extra["timing"] = timing_of(heard, human)
        if rating := corrected.get("user_interruption", {}).get("rating"):
            official["user_interruption"]["rating"] = rating
        values, other = (official, corrected) if benchmark.compatible else (corrected, official)
        extra["compatible"] = benchmark.compatible
        extra["corrected" if benchmark.compatible else "official"] = {"axes": estimates(other)}
        extra["official_script"] = official_figures(official)
        extra["human_timing"] = human is not None
    if judge is not None:
        extra["judge"] = {"model": judge.config.model, "failed": judge.meter.failed - failed}
    if benchmark.quality is not None:
        extra["speech_quality"] = benchmark.quality.name
        values |= _quality(benchmark.quality, samples, root, detector)
    save_cases(benchmark.out / "cases" / system.name, worst_cases(samples, root, words, values, detector))
    return write_results(benchmark.out / f"{system.name}.json", values, extra)


def _quality(predictor: Predictor, samples: Sequence[Sample], root: Path, detector: SpeechDetector) -> SegmentValues:
    """Predicted mean opinion scores of the outputs, as a row `speech_quality`."""
    column = {}
    for sample in samples:
        audio, rate = read_output(sample.outputs(root)[0])
        (score,) = predict_quality(predictor, [audio], [rate], detector)
        if score is not None:
            column[f"{sample.name}{'-clean' if sample.clean else ''}"] = score
    return {"speech_quality": {"mos": column}} if column else {}
