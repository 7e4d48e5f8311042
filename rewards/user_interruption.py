"""User interruption: how soon does the agent answer a user who has barged in?"""

from dataclasses import dataclass
from typing import Any

from envs.episode import Episode
from envs.errors import InputError
from envs.speech import Interval
from envs.utterances import MAX_PAUSE_SECONDS, utterances
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import ROUNDING_SECONDS, agent_units, check_options, longer


@register_axis
@dataclass
class UserInterruption(RewardAxis):
    """Minus the seconds from the interruption's end to the agent's answer (arXiv 2606.11167, section 3, rewards).

        r = -d - yield_weight * max(0, s - yield_seconds)
        d = start of the next generated speech interval - end of the user's interrupting utterance
        s = seconds of agent speech during the interrupting utterance

    - Only an interval (inter-pausal unit, silences < 0.2 s joined) that *starts* at or after the end counts as the
      answer; speech that runs on through the interruption does not. (The paper does not say.)
    - No answer: d = what is left of the episode.
    - The interrupting utterance is the event `interruption`, else the user's last utterance in the scored window.
    - The yield term is not in the paper; it charges an agent that talks on instead of giving way.
    - Nor is `answer_seconds`. Where any speech is an answer, an "mm-hm" is the quickest one: one after another comes
      around the user's end, until one follows it.

    Details: `interruption` `[start, end]`, `overlap_seconds` (s), `answer` `[start, end]`, of what was rewarded as the
    answer (None without one), and `answer_seconds`; where there is any speech after the interruption also `latency` (d,
    seconds) and `response` `[start, end]`, which are those of the paper's answer whatever `answer_seconds`. None where
    the episode ended before the interruption did.

    Attributes:
        yield_weight: reward lost for each second of overlap beyond `yield_seconds` (paper: no such term, 0).
        yield_seconds: how long the agent may take to give way, uncharged.
        max_pause: the longest silence inside an utterance (paper: 1 s).
        answer_seconds: only an interval longer than this is rewarded as an answer (paper: any, 0). Up to 1 s, speech
            is a backchannel to the paper.
    """

    yield_weight: float = 0.0
    yield_seconds: float = 1.0
    max_pause: float = MAX_PAUSE_SECONDS
    answer_seconds: float = 0.0

    name = "user_interruption"
    applies_to = ("user_interruption",)

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score | None:
        interruption = self._interruption(episode)
        left = episode.duration - interruption.end
        if left <= 0:
            return None
        overlap = sum(interruption.overlap(spoken) for spoken in episode.scored_agent_speech)
        details: dict[str, Any] = {"interruption": list(interruption), "overlap_seconds": overlap}
        earliest = interruption.end - ROUNDING_SECONDS
        after = [unit for unit in agent_units(episode) if unit.start >= earliest]
        if after:
            details |= {"latency": max(0.0, after[0].start - interruption.end), "response": list(after[0])}
        answer = next((unit for unit in after if longer(unit, self.answer_seconds)), None)
        details |= {"answer": None if answer is None else list(answer), "answer_seconds": self.answer_seconds}
        waited = left if answer is None else max(0.0, answer.start - interruption.end)
        charge = self.yield_weight * max(0.0, overlap - self.yield_seconds)
        return Score(0.0 - waited - charge, details)

    def _interruption(self, episode: Episode) -> Interval:
        known = episode.event_intervals("interruption")
        if known:
            return known[0]
        user = utterances(episode.scored_user_speech, self.max_pause)
        if not user:
            raise InputError(
                f"reward axis '{self.name}': segment '{episode.segment.id}' has no event `interruption` and no user "
                "speech to read it off: add the event to the manifest"
            )
        return Interval(user[-1].start, user[-1].end)
