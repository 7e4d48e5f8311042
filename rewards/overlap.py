"""Overlap: how long does the agent talk while the user does?"""

from dataclasses import dataclass

from envs.episode import Episode
from envs.speech import Interval
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import agent_units, as_pairs, check_options, longer


@register_axis
@dataclass
class Overlap(RewardAxis):
    """Minus the seconds in which agent and user speak at once, within the scored window.

    Details: `overlap_seconds` and `overlaps` `[[start, end], ...]`.

    Attributes:
        free_seconds: agent speech of at most so many seconds costs nothing, so that a backchannel is allowed.
    """

    free_seconds: float = 1.0

    name = "overlap"

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score:
        units = [unit for unit in agent_units(episode) if longer(unit, self.free_seconds)]
        overlaps = [
            Interval(max(unit.start, heard.start), min(unit.end, heard.end))
            for unit in units
            for heard in episode.scored_user_speech
            if unit.overlap(heard) > 0
        ]
        seconds = sum(overlap.duration for overlap in overlaps)
        return Score(0.0 - seconds, {"overlap_seconds": seconds, "overlaps": as_pairs(overlaps)})
