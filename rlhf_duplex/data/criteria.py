"""Which stretches of a dialogue are segments: pure functions from speech intervals to candidates (arXiv 2606.11167, 3).

Two speakers' utterances in, candidates and the reasons for the others out. An utterance is one that METHODS' words
speak of: inter-pausal units with pauses of at most a second between them. "X" in the paper is the user here, "Y" the
agent, the person whose place the model takes.

Where the paper's words leave a choice:

- *At least one inner pause* (pause handling): one of `pause_min_silence` at least. A silence of 0.2 to 0.3 s parts the
  phrases of fluent speech; with any such silence as a pause, most long utterances would be segments of this axis.
- *Silent throughout* (pause handling) means no speech of the agent between the utterance's first and last moment.
- *X utterance then Y utterance* (turn-taking): the agent's next utterance to begin after the user's end (or at most
  `turn_max_overlap` before it, since people and detectors overlap by that much at a smooth change of turn); the user
  says nothing in between. An agent that begins earlier interrupts, and a model must not be taught to.
- *Only short utterances, at least one* (backchannel): every utterance of the agent that meets the user's is short, and
  one at least lies within it: a "yes" over the edge belongs to the change of turn.
- *X -> Y -> X -> Y* (interruption): utterances that follow each other; the user says nothing else between the third
  and the fourth, begins the third within the second, and ends it before the fourth does: what is over before the
  interruption is answers nothing.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from envs.segments import SEGMENT_AXES
from envs.speech import Interval
from envs.utterances import Utterance, inter_pausal_units, utterances
from rlhf_duplex.data.curate_options import Criteria

# Times are sums of samples over rates: what is equal on paper may differ by a rounding error.
_EPSILON = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A stretch that meets an axis' criteria, in seconds of the recording (see `envs.segments.Segment.events`)."""

    axis: str
    start: float
    end: float
    events: dict[str, Any]


Rejected = Counter[str]
# A candidate, or why it is none.
Verdict = Candidate | str


def speaker_utterances(speech: Sequence[Interval], criteria: Criteria) -> list[Utterance]:
    """Utterances of one speaker's speech intervals."""
    return utterances(inter_pausal_units(speech, criteria.min_silence), criteria.max_pause)


def find_candidates(
    user: Sequence[Interval], agent: Sequence[Interval], criteria: Criteria
) -> tuple[list[Candidate], dict[str, Rejected]]:
    """All segments of a recording in one direction.

    Args:
        user, agent: speech intervals of the two speakers, seconds in the recording.
        criteria: thresholds.

    Returns:
        The candidates in order of axis and time, and for each axis how many others there were, by reason.
    """
    said = speaker_utterances(user, criteria), speaker_utterances(agent, criteria)
    found: list[Candidate] = []
    rejected: dict[str, Rejected] = {axis: Counter() for axis in SEGMENT_AXES}
    for axis in SEGMENT_AXES:
        for verdict in _FINDERS[axis](*said, criteria):
            if isinstance(verdict, Candidate) and 0 < criteria.max_seconds < verdict.end - verdict.start - _EPSILON:
                verdict = f"segment longer than {criteria.max_seconds:g} s"
            if isinstance(verdict, Candidate):
                found.append(verdict)
            else:
                rejected[axis][verdict] += 1
    return found, rejected


def _shorter(utterance: Utterance, seconds: float) -> bool:
    return utterance.duration < seconds - _EPSILON


# Utterances of one speaker are in order and apart, so that each look-up is a bisection: hours have thousands of them.
def _meeting(others: Sequence[Utterance], utterance: Utterance) -> Sequence[Utterance]:
    """Those of the other speaker that overlap the utterance."""
    first = bisect_right(others, utterance.start + _EPSILON, key=lambda o: o.end)
    return others[first : bisect_left(others, utterance.end - _EPSILON, key=lambda o: o.start)]


def _next(others: Sequence[Utterance], time: float) -> Utterance | None:
    """The first of the other speaker that begins at that time or later."""
    index = bisect_left(others, time, key=lambda o: o.start)
    return others[index] if index < len(others) else None


def _time(seconds: float) -> float:
    """To the millisecond: finer than any detector, and short in a manifest."""
    return round(seconds, 3)


def _pair(interval: Interval | Utterance) -> list[float]:
    return [_time(interval.start), _time(interval.end)]


def _pause_handling(user: Sequence[Utterance], agent: Sequence[Utterance], criteria: Criteria) -> list[Verdict]:
    def judge(said: Utterance) -> Verdict:
        if _shorter(said, criteria.pause_min):
            return f"user's utterance shorter than {criteria.pause_min:g} s"
        pauses = [p for p in said.pauses if p.duration >= criteria.pause_min_silence - _EPSILON]
        if not pauses:
            return f"no pause of {criteria.pause_min_silence:g} s within the user's utterance"
        span = Interval(said.start, said.end)
        if any(unit.overlap(span) > _EPSILON for other in _meeting(agent, said) for unit in other.units):
            return "agent not silent throughout"
        return Candidate("pause_handling", _time(said.start), _time(said.end), {"pauses": [_pair(p) for p in pauses]})

    return [judge(said) for said in user]


def _turn_taking(user: Sequence[Utterance], agent: Sequence[Utterance], criteria: Criteria) -> list[Verdict]:
    def judge(said: Utterance, following: Utterance | None) -> Verdict:
        earliest = said.end - criteria.turn_max_overlap - _EPSILON
        if any(a.start < earliest and a.end > said.end + _EPSILON for a in _meeting(agent, said)):
            return f"agent begins more than {criteria.turn_max_overlap:g} s before the user ends"
        reply = _next(agent, max(earliest, said.start))
        if reply is None or reply.end <= said.end or (following is not None and following.start <= reply.start):
            return "user goes on, or nobody does"
        if reply.start - said.end > criteria.turn_max_gap + _EPSILON:
            return f"gap longer than {criteria.turn_max_gap:g} s"
        if _shorter(said, criteria.turn_min):
            return f"user's utterance shorter than {criteria.turn_min:g} s"
        if _shorter(reply, criteria.turn_min):
            return f"agent's utterance shorter than {criteria.turn_min:g} s"
        return Candidate("turn_taking", _time(said.start), _time(reply.end), {"user_turn_end": _time(said.end)})

    return [judge(said, following) for said, following in zip(user, [*user[1:], None], strict=False)]


def _backchannel(user: Sequence[Utterance], agent: Sequence[Utterance], criteria: Criteria) -> list[Verdict]:
    def judge(said: Utterance) -> Verdict:
        if _shorter(said, criteria.backchannel_min):
            return f"user's utterance shorter than {criteria.backchannel_min:g} s"
        meanwhile = _meeting(agent, said)
        if not meanwhile:
            return "agent silent throughout"
        if any(other.duration > criteria.backchannel_max + _EPSILON for other in meanwhile):
            return f"agent says more than {criteria.backchannel_max:g} s at once"
        within = [o for o in meanwhile if o.start >= said.start - _EPSILON and o.end <= said.end + _EPSILON]
        if not within:
            return "agent speaks only over the utterance's edge"
        # Unit by unit, as generated ones are counted: the recorded agent's own "yeah ... yeah" is two of them.
        true = [_pair(unit) for utterance in within for unit in utterance.units]
        return Candidate("backchannel", _time(said.start), _time(said.end), {"true_backchannels": true})

    return [judge(said) for said in user]


def _user_interruption(user: Sequence[Utterance], agent: Sequence[Utterance], criteria: Criteria) -> list[Verdict]:
    def judge(index: int, second: Utterance) -> Verdict:
        first, third = user[index - 1], user[index]
        if index == 0 or first.start >= second.start:
            return "agent's interrupted utterance answers nothing of the user's"
        fourth = _next(agent, second.end)
        following = user[index + 1] if index + 1 < len(user) else None
        goes_on = fourth is not None and following is not None and following.start <= fourth.start
        if fourth is None or goes_on or fourth.end <= third.end + _EPSILON:
            return "agent does not answer the interruption"
        for place, utterance in zip(
            ("first", "second", "third", "fourth"), (first, second, third, fourth), strict=True
        ):
            if _shorter(utterance, criteria.interruption_min):
                return f"{place} utterance shorter than {criteria.interruption_min:g} s"
        return Candidate("user_interruption", _time(first.start), _time(fourth.end), {"interruption": _pair(third)})

    verdicts = []
    for index, third in enumerate(user):
        # The utterance that the user begins in; one that began at the same moment is not interrupted.
        speaking = [a for a in _meeting(agent, third) if a.start < third.start - _EPSILON]
        if speaking:
            verdicts.append(judge(index, speaking[0]))
    return verdicts


_FINDERS: dict[str, Callable[[Sequence[Utterance], Sequence[Utterance], Criteria], list[Verdict]]] = {
    "pause_handling": _pause_handling,
    "turn_taking": _turn_taking,
    "backchannel": _backchannel,
    "user_interruption": _user_interruption,
}
