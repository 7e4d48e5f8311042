"""From a system's outputs to its figures: by task and metric a value a sample, corrected and as the scripts have it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.audio import audio_info
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval, SileroDetector
from rewards.judge import Judge
from rlhf_duplex.evaluation.distributions import position_shares
from rlhf_duplex.evaluation.full_duplex_bench import judged, metrics
from rlhf_duplex.evaluation.full_duplex_bench.overlap import overlap_metrics, speech_at_16k
from rlhf_duplex.evaluation.full_duplex_bench.samples import Sample, read_json, read_output, read_words
from rlhf_duplex.evaluation.metrics import SegmentValues, axis_metrics

HUMAN_TIMING = "icc_gt_distribution.json"
_OFFICIAL = {
    "pause_handling": ("takeover_rate",),
    "turn_taking": ("takeover_rate", "latency"),
    "user_interruption": ("takeover_rate", "latency", "rating"),
    "backchannel": ("takeover_rate", "frequency", "jsd"),
}


def read_human_timing(data: Path, given: Path | None = None) -> dict[str, list[float]] | None:
    """People's backchannel timing by sample id: the file given, or the official one beside the tasks; None without.

    Raises:
        InputError: the file is damaged, or the one given does not exist.
    """
    found = next((path for path in (data / HUMAN_TIMING, data.parent / HUMAN_TIMING) if path.is_file()), None)
    path = given or found
    if path is None:
        return None
    record = read_json(path)
    if not isinstance(record, dict) or not all(
        isinstance(row, list)
        and all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in row)
        and sum(row) > 0
        for row in record.values()
    ):
        raise InputError(
            f"{path} is no distribution of backchannels: it needs {{ID: [share of each bin, ...]}}, not all of them 0"
        )
    return {str(key): row for key, row in record.items()}


def check_audio(samples: Sequence[Sample], root: Path) -> None:
    """Whether a system has audio for every sample.

    Raises:
        InputError: an `output.wav` is missing or damaged.
    """
    for sample in samples:
        audio = sample.outputs(root)[0]
        if not audio.is_file():
            raise InputError(
                f"{audio} is missing: every sample needs the system's output.wav, as long as its input.wav"
            )
        audio_info(audio)


def read_outputs(samples: Sequence[Sample], root: Path, written: Path | None = None) -> dict[str, list[Word]]:
    """The agent's words in every sample, by its name.

    Args:
        samples: of a benchmark.
        root: the system's folder.
        written: where transcripts lie that were recognised here.

    Raises:
        InputError: an `output.json` is missing or damaged.
    """
    words = {}
    for sample in samples:
        transcript = sample.outputs(root)[1]
        if not transcript.is_file() and written is not None:
            transcript = sample.outputs(written)[1]
        if not transcript.is_file():
            raise InputError(
                f"{transcript} is missing: transcribe output.wav, or give --asr MODEL to have it done here"
            )
        words[_key(sample)] = read_words(transcript)
    return words


def _key(sample: Sample) -> str:
    return f"{sample.name}{'-clean' if sample.clean else ''}"


Heard = Mapping[str, tuple[Sequence[Interval], float]]


def hear_outputs(
    samples: Sequence[Sample], root: Path, detector: SileroDetector, compatible: bool = False
) -> dict[str, tuple[list[Interval], float]]:
    """Silero's intervals in `output.wav` and its seconds, for every sample of backchannel, by the sample's name.

    Args:
        samples, root: of a benchmark and a system.
        detector: `metrics.benchmark_detector()`.
        compatible: with the official script's fault of the sample rate.
    """
    heard = {}
    for sample in samples:
        if sample.base == "backchannel":
            audio, rate = read_output(sample.outputs(root)[0])
            speech = metrics.official_speech(audio, rate, detector, compatible)
            heard[sample.name] = (speech, len(audio) / rate)
    return heard


def score_v1(
    samples: Sequence[Sample],
    words: Mapping[str, Sequence[Word]],
    heard: Heard,
    human: Mapping[str, Sequence[float]] | None,
    judge: Judge | None = None,
    compatible: bool = False,
) -> SegmentValues:
    """By task and metric, the value of each sample.

    Args:
        samples, words: of the benchmark and of the system.
        heard: `hear_outputs`, with the fault or without it.
        human: people's backchannel timing by sample id; without it there is no `jsd`.
        judge: rates interruptions; without one there is no `rating`.
        compatible: with the official scripts' faults.
    """
    values: SegmentValues = {}
    for sample in samples:
        said = words[_key(sample)]
        if sample.base == "backchannel":
            speech, seconds = heard[sample.name]
            people = None if human is None else human.get(sample.id)
            found = metrics.backchannel(speech, said, seconds, people, compatible)
        else:
            found = _v1(sample, said)
        for metric, value in found.items():
            values.setdefault(sample.task, {}).setdefault(metric, {})[sample.name] = value
    if judge is not None and "user_interruption" in values:
        rated = judged.ratings(judge, samples, words)
        if rated:
            values["user_interruption"]["rating"] = rated
    return values


def _v1(sample: Sample, words: Sequence[Word]) -> dict[str, float]:
    if sample.base == "pause_handling":
        return metrics.pause_handling(words)
    assert sample.event is not None  # `read_benchmark` requires it
    if sample.base == "turn_taking":
        return metrics.turn_taking(words, sample.event.start)
    return metrics.user_interruption(words, sample.event.end)


def timing_of(heard: Heard, human: Mapping[str, Sequence[float]] | None) -> dict[str, list[float]]:
    """Shares over the length of the samples, for drawing: of the agent's short intervals, and of people's."""
    places = [
        (interval.start + interval.end) / 2 / seconds
        for speech, seconds in heard.values()
        for interval in speech
        if interval.duration <= metrics.LONG_SECONDS
    ]
    rows = (
        [] if human is None else [human[name.rpartition("/")[2]] for name in heard if name.rpartition("/")[2] in human]
    )
    positions = [(index + 0.5) / len(row) for row in rows for index in range(len(row))]
    weights = [share / sum(row) if sum(row) else 0.0 for row in rows for share in row]
    return {"agent": position_shares(places), "human": position_shares(positions, weights)}


def official_figures(values: SegmentValues) -> dict[str, dict[str, float | None]]:
    """What the official scripts print: means alone, and None where they end with a division by zero."""
    table: dict[str, dict[str, float | None]] = {}
    for task, columns in values.items():
        names = _OFFICIAL["pause_handling" if task.startswith("pause_handling") else task]
        means = {
            name: metrics.official_mean(columns.get(name, {})) for name in names if name in columns or _fires(name)
        }
        table[task] = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    return table


def _fires(metric: str) -> bool:
    """Whether the official script takes this mean even where nothing has a value (rating and jsd need their input)."""
    return metric not in ("rating", "jsd")


def score_v15(
    samples: Sequence[Sample],
    root: Path,
    words: Mapping[str, Sequence[Word]],
    detector: SileroDetector,
    judge: Judge | None = None,
) -> SegmentValues:
    """By scenario and metric, the value of each sample of v1.5; `clean_` metrics are of the inputs without overlap."""
    values: SegmentValues = {}
    for sample in samples:
        user = speech_at_16k(*read_output(sample.input), detector)
        agent = speech_at_16k(*read_output(sample.outputs(root)[0]), detector)
        for metric, value in overlap_metrics(user, agent).items():
            name = f"clean_{metric}" if sample.clean else metric
            values.setdefault(sample.task, {}).setdefault(name, {})[sample.name] = value
        values.setdefault(sample.task, {})
    if judge is not None:
        tasks = {sample.name: sample.task for sample in samples}
        for name, classes in judged.behaviours(judge, samples, words).items():
            for behaviour, share in classes.items():
                values[tasks[name]].setdefault(behaviour, {})[name] = share
    return values


def estimates(values: SegmentValues) -> dict[str, Any]:
    """By task and metric, mean and 95 % interval over samples, as dictionaries."""
    return {a: {m: e._asdict() for m, e in row.items()} for a, row in axis_metrics(values).items()}
