"""The timing of Full-Duplex-Bench v1.5 (arXiv 2507.23159): how fast an agent stops, and how fast it answers.

Stop latency: seconds of each overlap of user and agent. Response latency: from the end of a user's speech to the next
beginning of the agent's. A sample's value is the mean over its overlaps or responses; a sample without any has none.
"""

from collections.abc import Sequence

import numpy as np

from envs.audio import resample
from envs.speech import Interval, SileroDetector
from envs.utterances import merge_intervals

USER_GAP_SECONDS, AGENT_GAP_SECONDS = 0.6, 0.5


def overlap_metrics(user: Sequence[Interval], agent: Sequence[Interval]) -> dict[str, float]:
    """`stop_latency` and `response_latency` of one sample, from Silero's intervals; absent where there is none."""
    users, agents = merge_intervals(user, USER_GAP_SECONDS), merge_intervals(agent, AGENT_GAP_SECONDS)
    stops = [interval.duration for interval in overlaps(users, agents)]
    gaps = [interval.duration for interval in response_gaps(users, agents)]
    found = {"stop_latency": stops, "response_latency": gaps}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def overlaps(user: Sequence[Interval], agent: Sequence[Interval]) -> list[Interval]:
    """Where both speak; of overlaps that end in the same millisecond, the shortest."""
    best: dict[int, Interval] = {}
    for one in user:
        for other in agent:
            both = Interval(max(one.start, other.start), min(one.end, other.end))
            key = round(both.end * 1000)
            if both.end > both.start and (key not in best or both.duration < best[key].duration):
                best[key] = both
    return sorted(best.values(), key=lambda interval: interval.end)


def response_gaps(user: Sequence[Interval], agent: Sequence[Interval]) -> list[Interval]:
    """From the end of each user's interval to the next beginning of the agent's; of several that lead to the same
    beginning, the one whose user ended last."""
    best: dict[int, Interval] = {}
    for one in user:
        start = next((other.start for other in agent if other.start > one.end), None)
        if start is None:
            continue
        key = round(start * 1000)
        if key not in best or one.end > best[key].start:
            best[key] = Interval(one.end, start)
    return sorted(best.values(), key=lambda interval: interval.end)


def speech_at_16k(audio: np.ndarray, rate: int, detector: SileroDetector) -> list[Interval]:
    """Silero's intervals; v1.5 resamples to 16 kHz, and does not round."""
    (found,) = detector.detect([resample(audio, rate, 16000)], 16000)
    return found
