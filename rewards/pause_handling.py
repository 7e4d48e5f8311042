"""Pause handling: does the agent keep quiet while the user pauses within an utterance?"""

from dataclasses import dataclass

from envs.episode import Episode
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import agent_units, as_pairs, check_options, longer


@register_axis
@dataclass
class PauseHandling(RewardAxis):
    """-1 for taking the turn anywhere in the user's utterance, else 0 (arXiv 2606.11167, section 3, rewards).

        r = -1  if any generated speech interval is longer than `takeover_seconds`,  else 0

    A generated speech interval is an inter-pausal unit of the agent (silences < 0.2 s joined) within the scored
    window. One of exactly `takeover_seconds` is still a backchannel. No unit: the value is -1 or 0.

    Details: `takeover`, `takeovers` `[[start, end], ...]` and `longest` (seconds of the longest interval, 0 if none).

    Attributes:
        takeover_seconds: speech longer than this takes the turn (paper: 1 s).
    """

    takeover_seconds: float = 1.0

    name = "pause_handling"
    applies_to = ("pause_handling",)

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score:
        units = agent_units(episode)
        takeovers = [unit for unit in units if longer(unit, self.takeover_seconds)]
        details = {
            "takeover": bool(takeovers),
            "takeovers": as_pairs(takeovers),
            "longest": max((unit.duration for unit in units), default=0.0),
        }
        return Score(-1.0 if takeovers else 0.0, details)
