"""Inter-pausal units, utterances and pauses: pure functions on sorted speech intervals (arXiv 2606.11167, section 3).

An inter-pausal unit (IPU) is a stretch of speech with no silence longer than `min_silence`; an utterance is a series
of IPUs of one speaker with silences of at most `max_pause` between them; such an inner silence is a pause.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from envs.speech import Interval

MAX_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Utterance:
    """IPUs of one speaker, with the pauses between them."""

    units: tuple[Interval, ...]

    @property
    def start(self) -> float:
        return self.units[0].start

    @property
    def end(self) -> float:
        return self.units[-1].end

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def pauses(self) -> tuple[Interval, ...]:
        return tuple(Interval(a.end, b.start) for a, b in zip(self.units, self.units[1:], strict=False))


def merge_intervals(intervals: Sequence[Interval], max_gap: float) -> list[Interval]:
    """Sorted intervals in which any two with a silence of at most `max_gap` seconds between them are one."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.start - merged[-1].end <= max_gap + 1e-9:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, interval.end))
        else:
            merged.append(Interval(*interval))
    return merged


def inter_pausal_units(intervals: Sequence[Interval], min_silence: float = 0.2) -> list[Interval]:
    """Speech intervals joined over silences shorter than `min_silence` (the definition of an IPU).

    [B] gives no figure; 200 ms is the usual one in the study of turn-taking.
    """
    return merge_intervals(intervals, min_silence - 2e-9)


def utterances(intervals: Sequence[Interval], max_pause: float = MAX_PAUSE_SECONDS) -> list[Utterance]:
    """Utterances of one speaker: units with silences of at most `max_pause` seconds (inclusive) between them."""
    groups: list[list[Interval]] = []
    for unit in sorted(intervals):
        if groups and unit.start - groups[-1][-1].end <= max_pause + 1e-9:
            groups[-1].append(Interval(*unit))
        else:
            groups.append([Interval(*unit)])
    return [Utterance(tuple(group)) for group in groups]


def clip_intervals(intervals: Sequence[Interval], start: float, end: float) -> list[Interval]:
    """The parts of the intervals that lie within `[start, end]`."""
    clipped = [Interval(max(i.start, start), min(i.end, end)) for i in intervals]
    return [i for i in clipped if i.end > i.start]
