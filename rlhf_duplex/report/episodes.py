"""The episodes that an evaluation saved, with their scores and with what their rewards were told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import InputError
from rlhf_duplex.evaluation.metrics import read_results
from rlhf_duplex.report.timeline import real


@dataclass(frozen=True)
class SavedEpisode:
    """An episode on disk: its folder, the segment's id and axis, and its scores by axis, with the axis' `options`."""

    folder: Path
    segment: str
    axis: str
    scores: dict[str, Any]

    @property
    def reward(self) -> float | None:
        return real(self.scores.get(self.axis, {}).get("value"))


def saved_episodes(folder: Path) -> dict[str, SavedEpisode]:
    """Saved episodes by the id of their segment.

    Raises:
        InputError: one of them is damaged.
    """
    result = folder.with_suffix(".json")
    options = reward_options_of(read_results(result) if result.is_file() else {})
    found: dict[str, SavedEpisode] = {}
    for path in sorted(folder.glob("*/episode.json")):
        scores_path = path.with_name("scores.json")
        try:
            segment = json.loads(path.read_text(encoding="utf-8"))["segment"]
            scores = json.loads(scores_path.read_text(encoding="utf-8")) if scores_path.is_file() else {}
            scores = {
                str(axis): record | {"options": options.get(axis, {})}
                for axis, record in scores.items()
                if isinstance(record, dict)
            }
            found.setdefault(segment["id"], SavedEpisode(path.parent, segment["id"], segment["axis"], scores))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path.parent} is not a whole episode ({type(error).__name__}: {error})") from error
    return found


def reward_options_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By axis, the options that the configuration gave its reward, as a result of an evaluation records them."""
    found = result.get("rewards")
    if not isinstance(found, Mapping):
        return {}
    return {
        str(axis): {key: value for key, value in row.items() if key not in ("target", "judge")}
        for axis, row in found.items()
        if isinstance(row, Mapping)
    }
