"""Fluency: how much of the user's time a dialogue costs in waiting and in being talked over, by rules on both sides."""

from dataclasses import dataclass

from envs.episode import Episode
from envs.floor import analyse_floor
from envs.segments import SEGMENT_AXES
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import check_options


@register_axis
@dataclass
class Fluency(RewardAxis):
    """Minus the seconds a turn that the user waits for an answer or is talked over; made for live dialogues.

    An answer's wait counts from the end of the user's turn; a turn that is never answered counts until the user goes
    on. Agent speech over the user's counts in turns only (more than 1 s), so a "mm-hm" costs nothing; an agent that
    does not stop when it is interrupted pays for every second (`envs.floor`).

    Details: `offsets`, `waits` and `stops` in seconds, `overlap`.

    Attributes:
        worst: the score is not below minus this; one hopeless dialogue must not decide an update.
    """

    worst: float = 10.0

    name = "fluency"
    applies_to = SEGMENT_AXES

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score | None:
        floor = analyse_floor(episode.user_speech, episode.agent_speech, episode.scored_from, episode.duration)
        lost = floor.seconds_lost
        if lost is None:
            return None
        details = {"offsets": floor.offsets, "waits": floor.waits, "stops": floor.stops, "overlap": floor.overlap}
        return Score(-min(lost, self.worst), details)
