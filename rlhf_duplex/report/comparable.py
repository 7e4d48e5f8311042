"""What of several runs can be held against each other, and what a page says of the rest."""

from collections.abc import Sequence

from rlhf_duplex.evaluation.metrics import other_options
from rlhf_duplex.report.labels import axis_title
from rlhf_duplex.report.runs import Comparison, Run


def scored_otherwise(runs: Sequence[Run], others: Sequence[Run]) -> set[str]:
    """The axes whose reward some of `runs` measured with other options than some of `others`."""
    return {axis for run in runs for other in others for axis in other_options(run.after or {}, other.after or {})}


def mixed_rewards(comparison: Comparison) -> set[str]:
    """The axes whose reward the finished runs measured with different options: no two numbers on one scale."""
    finished = comparison.finished
    return scored_otherwise(finished[1:], finished[:1])


def comparison_notes(comparison: Comparison) -> list[str]:
    """What a reader must know of the figures, a sentence each."""
    notes = []
    mixed = mixed_rewards(comparison)
    if mixed:
        names = ", ".join(axis_title(axis).lower() for axis in sorted(mixed))
        notes.append(
            f"Not all runs scored the reward of {names} with the same options: it is held against the baseline only "
            "where both scored it alike, and left out of everything else on this page."
        )
    return notes
