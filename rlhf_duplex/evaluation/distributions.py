"""When agent and people say their backchannels: shares over the length of what they listen to."""

from collections.abc import Iterable, Sequence

import numpy as np

from envs.episode import Episode
from envs.speech import Interval
from rewards.timing import agent_units, longer

BINS = 20
BACKCHANNEL_SECONDS = 1.0


def position_shares(positions: Iterable[float], weights: Iterable[float] | None = None) -> list[float]:
    """The share of positions (0 the beginning, 1 the end) in each of 20 equal bins; empty where there is none."""
    where = np.clip(np.fromiter(positions, dtype=float), 0.0, np.nextafter(1.0, 0.0))
    heavy = None if weights is None else np.fromiter(weights, dtype=float)
    counts, _ = np.histogram(where, bins=BINS, range=(0.0, 1.0), weights=heavy)
    total = float(counts.sum())
    return [float(count) / total for count in counts] if total > 0 else []


def backchannel_timing(episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """`agent` and `human` shares over the segments of the axis `backchannel`, from the middle of each backchannel."""
    agent: list[float] = []
    human: list[float] = []
    for episode in episodes:
        if episode.segment.axis != "backchannel":
            continue
        length = episode.duration - episode.scored_from
        short = [unit for unit in agent_units(episode) if not longer(unit, BACKCHANNEL_SECONDS)]
        agent += [_position(unit, episode.scored_from, length) for unit in short]
        true = episode.event_intervals("true_backchannels") or []
        human += [_position(unit, episode.scored_from, length) for unit in true]
    return {"agent": position_shares(agent), "human": position_shares(human)}


def _position(interval: Interval, start: float, length: float) -> float:
    return ((interval.start + interval.end) / 2 - start) / max(length, 1e-9)
