"""What a comparison shows of each run: its name, and the same segments' episodes to look at and listen to."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from envs.episode import Episode
from rlhf_duplex.report.build import build_report, median_segments
from rlhf_duplex.report.episodes import SavedEpisode, saved_episodes
from rlhf_duplex.report.labels import axis_title
from rlhf_duplex.report.runs import Comparison, Run
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg, user_words, words_are_cut

MAX_AUDIO_BYTES = 6_000_000


def run_cards(comparison: Comparison, path: Path, axes: Sequence[str]) -> list[dict[str, Any]]:
    """A card for each finished run, and one for the policy before training.

    Args:
        comparison: the runs.
        path: of the page, for links to the runs' own reports.
        axes: an episode of each is shown, on the same segment for all runs.

    Returns:
        dictionaries for the template; `index` is the place in the list.
    """
    finished = comparison.finished
    saved = [saved_episodes(run.folder / "evaluation" / "after") for run in finished]
    chosen = _chosen_segments(comparison, saved, axes)
    home = path.resolve().parent  # the runs' own folder, or an ablation's, above its trials/
    inside = all(home in run.folder.resolve().parents[:2] for run in finished)
    cards = [
        {
            "index": index,
            "name": run.name,
            "condition": run.condition,
            "seed": run.seed,
            "link": _link(run, path, inside),
        }
        for index, run in enumerate(finished)
    ]
    source = next((run for run in finished if run.before is not None), None)
    if source is not None:
        cards.append({"index": len(cards), "name": "before training", "seed": None, "link": ""})
        saved.append(saved_episodes(source.folder / "evaluation" / "before"))
    spent = 0
    order = sorted(range(len(cards)), key=lambda i: (-1 if cards[i]["seed"] is None else cards[i]["seed"], i))
    for index in order:  # one seed of every condition before the next, should the audio be too much for a page
        sides = []
        for place, segment in enumerate(chosen):
            record = saved[index].get(segment)
            if record is None:
                continue
            episode = Episode.load(record.folder)
            audio = audio_uri(episode) if spent < MAX_AUDIO_BYTES else ""
            spent += len(audio)
            words = [("User", user_words(episode)), ("Agent", episode.text)]
            sides.append(
                {
                    "axis": axis_title(record.axis),
                    "segment": segment,
                    "svg": timeline_svg(episode, record.scores, episode.duration, f"c{index}-{place}"),
                    "audio": audio,
                    "outcome": outcome(episode, record.scores),
                    "words": [(who, text) for who, text in words if words_are_cut(text)],
                }
            )
        cards[index]["sides"] = sides
    return cards


def _chosen_segments(
    comparison: Comparison, saved: Sequence[dict[str, SavedEpisode]], axes: Sequence[str]
) -> list[str]:
    """One segment of each axis: the baseline's median among those that all runs kept."""
    shared = set.intersection(*(set(found) for found in saved))
    runs = zip(comparison.finished, saved, strict=True)
    base = [found for run, found in runs if run.condition == comparison.baseline]
    chosen = []
    for axis in axes:
        rewards: dict[str, float] = {}
        for segment in sorted(shared):
            records = [found[segment] for found in base or saved]
            values = [record.reward for record in records if record.axis == axis and record.reward is not None]
            if values:
                rewards[segment] = float(np.mean(values))
        chosen += median_segments(rewards, 1)
    return chosen


def _link(run: Run, path: Path, inside: bool) -> str:
    """From the page to the run's own report, which is made where it is missing; empty where the page lies elsewhere."""
    if not inside:
        return ""
    report = run.folder / "report.html"
    if not report.is_file():
        build_report(run.folder)
    return quote(os.path.relpath(report, path.parent))  # nor is a folder called "javascript:..." a script
