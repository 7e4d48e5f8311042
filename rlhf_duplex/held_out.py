"""Whether what is measured as held-out was trained on: the same seconds of the same recordings."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

from envs.segments import Segment
from rlhf_duplex.data.pair import Pair

_TOUCHING = 0.05  # seconds that neighbours may share
Stretch = tuple[Path, float, float]  # a recording, and from where to where in it, seconds


def segment_stretches(segments: Iterable[Segment]) -> list[Stretch]:
    return [(s.recording, s.start, s.end) for s in segments]


def pair_stretches(pairs: Iterable[Pair], frame_rate: float) -> list[Stretch]:
    """Of pairs that say what recording they are of: those of rollouts name the segment's, those of logs the log."""
    return [
        (Path(p.provenance["recording"]), start, start + (p.context.shape[1] + p.chosen.shape[1]) / frame_rate)
        for p in pairs
        if isinstance(p.provenance.get("recording"), str)
        and isinstance(start := p.provenance.get("start"), int | float)
    ]


def trained_on(held_out: Sequence[Segment], trained: Iterable[Stretch]) -> int:
    """How many held-out segments share audio with what is trained on."""
    real: dict[Path, Path] = {}
    ends: dict[Path, list[tuple[float, float]]] = {}  # by recording, in order of the ends

    def resolved(path: Path) -> Path:
        return real[path] if path in real else real.setdefault(path, path.resolve())

    for recording, start, end in trained:
        ends.setdefault(resolved(recording), []).append((end, start))
    for stretches in ends.values():
        stretches.sort()
    count = 0
    for segment in held_out:
        stretches = ends.get(resolved(segment.recording), [])
        after = bisect_left(stretches, (segment.start + _TOUCHING, 0.0))
        count += any(start < segment.end - _TOUCHING for _, start in stretches[after:])
    return count


def overlap_line(count: int, of: int) -> str:
    """The warning about a suite that was partly trained on."""
    return (
        f"{count} of {of} held-out segments are of audio that is trained on: leave them out of evaluation.segments, or "
        "read its figures as such"
    )
