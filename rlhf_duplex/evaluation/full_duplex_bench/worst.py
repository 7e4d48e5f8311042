"""The worst samples of every task, as episodes to look at and listen to."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.audio import resample
from envs.episode import Episode, Word
from envs.speech import SpeechDetector
from rlhf_duplex.evaluation.cases import Case, worst_first
from rlhf_duplex.evaluation.full_duplex_bench.samples import Sample, read_output
from rlhf_duplex.evaluation.metrics import SegmentValues

RATE = 16000
_NEVER = 1e3  # worse than any latency


def worst_cases(
    samples: Sequence[Sample],
    root: Path,
    words: Mapping[str, Sequence[Word]],
    values: SegmentValues,
    detector: SpeechDetector,
    per_task: int = 3,
) -> list[Case]:
    """The worst samples of every task, the worst first: takeovers of pauses and of backchannels, turns not taken, then
    the slowest.

    Args:
        samples, root, words: of a benchmark and a system.
        values: their scores.
        detector: of the speech in the timelines.
        per_task: how many.
    """
    judged = [_judge(sample, values.get(sample.task, {})) for sample in samples if not sample.clean]
    by_name = {sample.name: sample for sample in samples if not sample.clean}
    chosen = []
    for task in dict.fromkeys(task for task, *_ in judged):
        mine = sorted((row for row in judged if row[0] == task), key=lambda row: (-row[2], row[1]))
        chosen += mine[:per_task]
    cases = []
    for task, name, badness, why in chosen:
        cases.append(Case(task, name, badness, why, _episode(by_name[name], root, words[name], detector)))
    return worst_first(cases, per_task)


def _judge(sample: Sample, columns: Mapping[str, Mapping[str, float]]) -> tuple[str, str, float, str]:
    """Task, name, badness, and why."""
    found = {metric: column[sample.name] for metric, column in columns.items() if sample.name in column}
    taken = found.get("takeover_rate")
    if sample.base in ("pause_handling", "backchannel"):
        jsd = found.get("jsd", 0.0)
        why = "The agent takes over." if taken else "The agent does not take over."
        return sample.task, sample.name, _NEVER * (taken or 0.0) + jsd, why
    if taken == 0:
        return sample.task, sample.name, _NEVER, "The agent does not take the turn."
    latency = found.get("latency", found.get("response_latency"))
    stop = found.get("stop_latency")
    parts = [f"latency {latency:.2f} s"] if latency is not None else ["no response"]
    parts += [f"overlap {stop:.2f} s"] if stop is not None else []
    why = f"{', '.join(parts)}."
    return sample.task, sample.name, _NEVER if latency is None else latency + (stop or 0.0), why.capitalize()


def _episode(sample: Sample, root: Path, words: Sequence[Word], detector: SpeechDetector) -> Episode:
    user, agent = (resample(*read_output(path), RATE) for path in (sample.input, sample.outputs(root)[0]))
    user_speech, agent_speech = detector.detect([user, agent], RATE)
    seconds = max(len(user), len(agent)) / RATE
    segment = sample.segment()
    events: dict[str, Any] = {}
    if sample.event is not None and sample.base == "turn_taking":
        events = {"user_turn_end": sample.event.start}
    elif sample.event is not None and sample.base != "pause_handling":
        events = {"interruption": list(sample.event)}
    text = " ".join(word.text for word in words)
    if sample.event is not None and not 0 <= sample.event.start <= sample.event.end <= segment.end:
        events = {}  # an annotation beyond its audio cannot be drawn
    segment = replace(segment, events=events)
    return Episode(segment, user, agent, RATE, user_speech, agent_speech, seconds, 0.0, text, words=tuple(words))
