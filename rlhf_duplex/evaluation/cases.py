"""Episodes that are worth hearing: the worst of every axis, kept beside the figures for the report."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.episode import Episode
from envs.errors import InputError
from envs.files import write_text


@dataclass(frozen=True)
class Case:
    """An episode and how bad it is.

    Attributes:
        axis: of the result that it belongs to.
        name: of the segment or sample.
        badness: the higher, the worse; compared within an axis.
        why: what happened, in a sentence.
        episode: both sides.
    """

    axis: str
    name: str
    badness: float
    why: str
    episode: Episode


def worst_first(cases: Sequence[Case], per_axis: int) -> list[Case]:
    """The `per_axis` worst of every axis, the worst first (ties by name)."""
    chosen = []
    for axis in dict.fromkeys(case.axis for case in cases):
        mine = sorted((c for c in cases if c.axis == axis), key=lambda case: (-case.badness, case.name))
        chosen += mine[:per_axis]
    return chosen


def save_cases(folder: Path, cases: Sequence[Case]) -> None:
    """Write the cases, each an episode's folder with `case.json` in it, in their order; what was there before goes."""
    shutil.rmtree(folder, ignore_errors=True)
    for index, case in enumerate(cases):
        place = folder / f"{index:03d}"
        case.episode.save(place)
        record = {"axis": case.axis, "name": case.name, "badness": case.badness, "why": case.why}
        write_text(place / "case.json", json.dumps(record, ensure_ascii=False))


def load_cases(folder: Path) -> list[Case]:
    """What `save_cases` wrote, in its order; none where there is no folder.

    Raises:
        InputError: one of them is damaged.
    """
    found = []
    for path in sorted(folder.glob("*/case.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            axis, name, why = (str(record[key]) for key in ("axis", "name", "why"))
            found.append(Case(axis, name, float(record["badness"]), why, Episode.load(path.parent)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path.parent} is no whole case ({type(error).__name__}: {error})") from error
    return found
