"""What the four timing axes share: the agent's speech as intervals, comparisons of seconds, checks of options."""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from envs.episode import Episode
from envs.errors import InputError
from envs.speech import Interval
from envs.utterances import inter_pausal_units

ROUNDING_SECONDS = 1e-6
"""Differences below this are rounding of floats, not time: 3.1 - 2.1 is exactly 1 s to every threshold."""


def longer(interval: Any, seconds: float) -> bool:
    """Whether an interval or utterance lasts longer than `seconds`; exactly `seconds` is not longer."""
    return interval.duration > seconds + ROUNDING_SECONDS


def agent_units(episode: Episode) -> list[Interval]:
    """The generated speech intervals of the scored window: the agent's inter-pausal units (silences < 0.2 s joined).

    arXiv 2606.11167 turns speech detection into inter-pausal units before anything else, for people and model alike.
    Speech that began before the window counts from the window's beginning on.
    """
    return inter_pausal_units(episode.scored_agent_speech)


def as_pairs(intervals: Iterable[Any]) -> list[list[float]]:
    """Intervals or utterances as `[[start, end], ...]` in episode time, for `Score.details`."""
    return [[interval.start, interval.end] for interval in intervals]


def check_options(axis: Any) -> None:
    """Every option of an axis (a dataclass) must be a finite number of at least 0.

    Raises:
        InputError: one is not; names axis and option.
    """
    for option in fields(axis):
        value = getattr(axis, option.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise InputError(
                f"reward axis '{axis.name}': option `{option.name}` must be a number of at least 0, found {value!r}"
            )
