"""What curate tells at its end: recordings, hours, utterances, segments of each axis, and what was left out and why."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from envs.segments import SEGMENT_AXES
from rlhf_duplex.data.curate_options import CurateOptions

if TYPE_CHECKING:
    from rlhf_duplex.data.curate import Summary

SHOWN_PROBLEMS = 10


def facts(summary: "Summary") -> list[tuple[str, str]]:
    """The figures of a run, as (name, value)."""
    values = [
        ("Corpus", summary.layout),
        ("Recordings used", str(summary.recordings)),
        ("of them read before", str(summary.done_before) if summary.done_before else ""),
        ("with a transcript", str(summary.transcripts)),
        ("Hours", f"{summary.seconds / 3600:.2f}"),
        ("Utterances", str(summary.utterances)),
        ("Problems", str(len(summary.problems)) if summary.problems else ""),
    ]
    return [(name, value) for name, value in values if value]


def axis_rows(summary: "Summary", options: CurateOptions) -> list[tuple[str, int, int, list[tuple[str, int]]]]:
    """For each axis: its name, segments that meet the criteria, segments kept, and reasons for the rest by count."""
    return [
        (axis, summary.found[axis], min(summary.found[axis], options.per_axis), summary.rejected[axis].most_common())
        for axis in SEGMENT_AXES
    ]


def print_summary(console: Console, summary: "Summary", options: CurateOptions) -> None:
    """The figures, the table of axes, and the first problems."""
    table = Table(title=", ".join(f"{name.lower()} {value}" for name, value in facts(summary)), title_justify="left")
    table.add_column("axis")
    table.add_column("met", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("not met, and why", overflow="fold")
    for axis, met, kept, reasons in axis_rows(summary, options):
        table.add_row(axis, str(met), str(kept), "\n".join(f"{count} {reason}" for reason, count in reasons))
    console.print(table)
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        console.print(f"! {problem.recording}: {problem.message}", soft_wrap=True, highlight=False)
    left = len(summary.problems) - SHOWN_PROBLEMS
    if left > 0:
        console.print(f"! and {left} more, all on the page")
