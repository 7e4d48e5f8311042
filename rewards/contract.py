"""The contract test of a reward axis: recorded episodes in, what is wrong in plain words out."""

import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from envs.episode import Episode
from envs.segments import SEGMENT_AXES
from rewards.axis import RewardAxis, Score, check_scores
from rewards.details import not_finite

SLOW_SECONDS = 0.05
_TOKENS = ("text_tokens", "audio_tokens", "log_probs")
_NO_TOKENS = "it reads tokens, and recorded dialogues have none: give --episodes RUN/evaluation/after"


@dataclass
class ContractReport:
    """What became of an axis.

    Attributes:
        passed: what was looked at and found right.
        wrong: what breaks the contract.
        doubtful: what does not, and still is probably not meant.
        values: of the episodes that have a score.
        seconds_per_episode: in the largest batch.
    """

    passed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds_per_episode: float = math.nan


def check_contract(make: Callable[[], RewardAxis], episodes: Sequence[Episode]) -> ContractReport:
    """Hold an axis against what `RewardAxis` asks of it.

    Args:
        make: gives a new axis at each call.
        episodes: at least one; several of each segment axis tell most.
    """
    report = ContractReport()
    axis = make()
    _check_class(axis, report)
    before = [_fingerprint(episode) for episode in episodes]
    started = time.perf_counter()
    scores = _scores(axis, episodes, "all episodes at once", report)
    report.seconds_per_episode = (time.perf_counter() - started) / len(episodes)
    if (scores is None or not any(scores)) and _misses_tokens(axis, episodes):
        what = "scores none of the episodes" if scores else report.wrong.pop()
        report.doubtful.append(f"{what}: {_NO_TOKENS}")
        return report
    if scores is None:
        return report
    report.passed.append(f"gives a Score or None for each of {len(episodes)} episodes, every value finite")
    _check_details(scores, episodes, report)
    _check_applies(axis, scores, episodes, report)
    half = len(episodes) // 2
    batches = {
        "the same episodes again": [list(range(len(episodes)))],
        "the episodes in reverse order": [list(reversed(range(len(episodes))))],
        "the episodes one by one": [[row] for row in range(len(episodes))],
        "the episodes in two batches": [list(range(half)), list(range(half, len(episodes)))],
    }
    for name, rows in batches.items():
        _check_same(axis, scores, episodes, rows, name, report)
    _check_same(make(), scores, episodes, batches["the same episodes again"], "another instance of the axis", report)
    changed = [e.segment.id for e, b in zip(episodes, before, strict=True) if _fingerprint(e) != b]
    if changed:
        report.wrong.append(f"changes the episode of segment '{changed[0]}': score what is there and leave it as it is")
    else:
        report.passed.append("leaves the episodes as they are")
    empty = _scores(axis, [], "no episode at all", report)
    if empty == []:
        report.passed.append("gives [] for no episode")
    _judge_values(axis, scores, report)
    return report


def _check_class(axis: RewardAxis, report: ContractReport) -> None:
    cls = type(axis)
    if not isinstance(getattr(axis, "name", None), str) or not axis.name:
        report.wrong.append('has no name: write `name = "..."` in the class')
    unknown = [a for a in axis.applies_to if a not in SEGMENT_AXES] if isinstance(axis.applies_to, tuple) else ["?"]
    if unknown:
        report.wrong.append(f"applies_to is {axis.applies_to!r}: it must be a tuple of {', '.join(SEGMENT_AXES)}")
    if not (cls.__doc__ or "").strip():
        report.doubtful.append("has no docstring: `rlhf-duplex rewards` shows its first line")


def _scores(axis: RewardAxis, episodes: Sequence[Episode], what: str, report: ContractReport) -> list | None:
    try:
        return check_scores(axis, axis.begin(episodes)(), episodes)
    except ValueError as error:
        report.wrong.append(f"with {what}: {error}{_where(error)}")
    except Exception as error:  # noqa: BLE001  whatever the code of a user raises is reported, not passed on
        report.wrong.append(f"with {what}: raises {type(error).__name__}: {error}{_where(error)}")
    return None


def _misses_tokens(axis: RewardAxis, episodes: Sequence[Episode]) -> bool:
    """Whether an axis reads of episodes what they do not have, since no policy spoke in them."""
    read: set[str] = set()

    class Watched(Episode):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name in _TOKENS and value is None:
                read.add(name)
            return value

    watched = [Watched(**{f.name: getattr(episode, f.name) for f in fields(Episode)}) for episode in episodes]
    with suppress(Exception):  # reported already
        axis.begin(watched)()
    return bool(read)


def _where(error: Exception) -> str:
    """The line of the axis' own file that raised, where it was not ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != Path(__file__).parent]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _check_details(scores: Sequence[Score | None], episodes: Sequence[Episode], report: ContractReport) -> None:
    for score, episode in zip(scores, episodes, strict=True):
        if score is not None and (where := not_finite(score.details)):
            report.wrong.append(
                f"details of segment '{episode.segment.id}' hold a number that is not finite, `{where}`: JSON has no "
                "such number, give None"
            )
            return
    report.passed.append("gives details that can be saved")


def _check_applies(
    axis: RewardAxis, scores: Sequence[Score | None], episodes: Sequence[Episode], report: ContractReport
) -> None:
    for score, episode in zip(scores, episodes, strict=True):
        if score is not None and episode.segment.axis not in axis.applies_to:
            report.wrong.append(
                f"scores segment '{episode.segment.id}', a {episode.segment.axis} segment, which is not in its "
                f"applies_to {axis.applies_to}: give None there, or add it"
            )
            return
    report.passed.append("scores only segments that it applies to")


def _check_same(
    axis: RewardAxis,
    scores: Sequence[Score | None],
    episodes: Sequence[Episode],
    batches: Sequence[Sequence[int]],
    what: str,
    report: ContractReport,
) -> None:
    for rows in batches:
        if not rows:
            continue
        again = _scores(axis, [episodes[row] for row in rows], what, report)
        if again is None:
            return
        for row, score in zip(rows, again, strict=True):
            first = scores[row]
            same = (score is None) == (first is None) and (
                score is None or first is None or math.isclose(score.value, first.value, rel_tol=1e-6, abs_tol=1e-6)
            )
            if not same:
                values = [None if s is None else s.value for s in (first, score)]
                report.wrong.append(
                    f"with {what}, segment '{episodes[row].segment.id}' gets {values[1]} where it got {values[0]} "
                    "before: a score may depend on nothing but the episode"
                )
                return
    report.passed.append(f"gives the same with {what}")


def _judge_values(axis: RewardAxis, scores: Sequence[Score | None], report: ContractReport) -> None:
    report.values = [float(score.value) for score in scores if score is not None]
    if not report.values:
        report.wrong.append(
            f"scores none of the {len(scores)} episodes: does applies_to {axis.applies_to} fit the segments?"
        )
    elif len(report.values) > 1 and np.ptp(report.values) == 0:
        report.doubtful.append(
            f"gives {report.values[0]:g} to all {len(report.values)} episodes: a group of equal scores teaches nothing"
        )
    if report.seconds_per_episode > SLOW_SECONDS:
        report.doubtful.append(
            f"takes {1000 * report.seconds_per_episode:.0f} ms an episode: override `score` to work on the whole "
            "batch, or `begin` to work while the next batch plays"
        )


def _fingerprint(episode: Episode) -> Any:
    arrays = (episode.user_audio, episode.agent_audio, episode.text_tokens, episode.audio_tokens, episode.log_probs)
    plain = (episode.user_speech, episode.agent_speech, episode.text, episode.words, episode.segment.events)
    return [None if a is None else hash(np.ascontiguousarray(a).tobytes()) for a in arrays], repr(plain)
