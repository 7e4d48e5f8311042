"""What curate tells at its end: recordings, hours, utterances, segments of each axis, and what was left out and why."""

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from envs.segments import SEGMENT_AXES
from rlhf_duplex.data.recordings import Problem

SHOWN_PROBLEMS = 10


@dataclass
class Summary:
    """What a run of curate found.

    Attributes:
        layout: of the corpus.
        recordings, seconds, utterances, transcripts: that could be used, how long, of both speakers, with words.
        done_before: recordings whose speech was known from an earlier run.
        problems: what could not be used, or not wholly.
        found, kept, held_out: segments by axis: that met the criteria, in the manifest, in the held-out one.
        rejected: by axis, how many stretches did not, by reason.
    """

    layout: str
    recordings: int = 0
    seconds: float = 0.0
    utterances: int = 0
    transcripts: int = 0
    done_before: int = 0
    problems: list[Problem] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    held_out: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: {axis: Counter() for axis in SEGMENT_AXES})


def facts(summary: Summary) -> list[tuple[str, str]]:
    """The figures of a run, as (name, value)."""
    values = [
        ("Corpus", summary.layout),
        ("Recordings used", str(summary.recordings)),
        ("of them read before", str(summary.done_before) if summary.done_before else ""),
        ("with a transcript", str(summary.transcripts)),
        ("Hours", f"{summary.seconds / 3600:.2f}"),
        ("Utterances", str(summary.utterances)),
        ("Problems", str(len(summary.problems)) if summary.problems else ""),
        ("Segments held out", str(summary.held_out.total()) if summary.held_out else ""),
    ]
    return [(name, value) for name, value in values if value]


def axis_rows(summary: Summary) -> list[tuple[str, int, int, list[tuple[str, int]]]]:
    """For each axis: its name, segments that meet the criteria, segments kept, and reasons for the rest by count."""
    return [
        (axis, summary.found[axis], summary.kept[axis], summary.rejected[axis].most_common()) for axis in SEGMENT_AXES
    ]


def print_summary(console: Console, summary: Summary) -> None:
    """The figures, the table of axes, and the first problems."""
    table = Table(title=", ".join(f"{name.lower()} {value}" for name, value in facts(summary)), title_justify="left")
    table.add_column("axis")
    table.add_column("met", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("not met, and why", overflow="fold")
    for axis, met, kept, reasons in axis_rows(summary):
        table.add_row(axis, str(met), str(kept), "\n".join(f"{count} {reason}" for reason, count in reasons))
    console.print(table)
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        console.print(f"! {problem.recording}: {problem.message}", soft_wrap=True, highlight=False)
    left = len(summary.problems) - SHOWN_PROBLEMS
    if left > 0:
        console.print(f"! and {left} more, all on the page")
