"""Turn-taking: how soon after the user's turn does the agent take its own?"""

from dataclasses import dataclass
from typing import Any

from envs.episode import Episode
from envs.errors import InputError
from envs.utterances import MAX_PAUSE_SECONDS, utterances
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import ROUNDING_SECONDS, check_options, longer


@register_axis
@dataclass
class TurnTaking(RewardAxis):
    """Minus the seconds between the user's turn end and the agent's turn (arXiv 2606.11167, section 3, rewards).

        r = -|d|,  d = start of the first generated utterance longer than `takeover_seconds` - end of the user's turn

    - An utterance is the agent's speech with silences of at most `max_pause` seconds joined.
    - No such utterance: d = what is left of the episode after the turn end.
    - The first such utterance decides wherever it lies. One that starts before the turn end is a barge-in with d < 0,
      even if it is over before the turn ends and another follows in time, so that talking over the user never pays.
      (The paper does not say; here it costs its distance.)
    - The turn end is the event `user_turn_end`, else the end of the user's first utterance in the scored window.

    Details: `takeover` (an utterance decided), `barge_in`, `user_turn_end`; with a takeover also `latency` (d, seconds,
    negative in a barge-in) and `response` `[start, end]`. None where nobody took the turn and the episode
    ended before it did.

    Attributes:
        takeover_seconds: an utterance longer than this takes the turn (paper: 1 s).
        max_pause: the longest silence inside an utterance (paper: 1 s).
        barge_in_seconds: charged for a barge-in on top of its distance (not in the paper): with 0, an agent that begins
            half a second too early fares as one that begins half a second late.
        prompt_seconds: |d| below this counts as this (not in the paper): with 0, each tenth of a second pays up to the
            very end of the turn, and the agent comes to begin before it. (People's gaps are about 0.2 s: Stivers et al.
            2009, PNAS 106.)
    """

    takeover_seconds: float = 1.0
    max_pause: float = MAX_PAUSE_SECONDS
    barge_in_seconds: float = 0.0
    prompt_seconds: float = 0.0

    name = "turn_taking"
    applies_to = ("turn_taking",)

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score | None:
        turn_end = self._turn_end(episode)
        spoken = utterances(episode.scored_agent_speech, self.max_pause)
        response = next((u for u in spoken if longer(u, self.takeover_seconds)), None)
        details: dict[str, Any] = {"takeover": response is not None, "barge_in": False, "user_turn_end": turn_end}
        if response is None:
            left = episode.duration - turn_end
            return Score(0.0 - left, details) if left > 0 else None
        latency = response.start - turn_end
        details |= {
            "barge_in": latency < -ROUNDING_SECONDS,
            "latency": latency,
            "response": [response.start, response.end],
        }
        distance = max(abs(latency), self.prompt_seconds)
        return Score(0.0 - distance - details["barge_in"] * self.barge_in_seconds, details)

    def _turn_end(self, episode: Episode) -> float:
        known = episode.event_time("user_turn_end")
        if known is not None:
            return known
        user = utterances(episode.scored_user_speech, self.max_pause)
        if not user:
            raise InputError(
                f"reward axis '{self.name}': segment '{episode.segment.id}' has no event `user_turn_end` and no user "
                "speech to read it off: add the event to the manifest"
            )
        return user[0].end
