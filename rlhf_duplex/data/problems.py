"""Timing problems of a logged dialogue, by rule, on the speech intervals of its two channels.

Both follow arXiv 2506.21463 (section 3, preference data), in which an LLM finds them in transcripts with word times;
here the times themselves decide. Utterances are speech with silences of at most a second joined (`envs.utterances`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from envs.utterances import Utterance

OVERLAP_SECONDS = 0.2  # people overlap by so much at a smooth change of turn, and detectors widen speech
TAKEOVER_SECONDS = 1.0  # agent speech longer than this is no backchannel
TURN_SECONDS = 1.0  # user speech shorter than this is no turn that calls for an answer


@dataclass(frozen=True)
class Problem:
    """One reply, or the lack of one.

    Attributes:
        kind: `interruption`, `unresponsive` or `content`.
        time: seconds at which it shows; problems are taken in this order.
        user: the user's utterance that is spoken into, or not answered; None where the content is the problem.
        reply: the agent's utterance; None where there is none.
    """

    kind: str
    time: float
    user: Utterance | None = None
    reply: Utterance | None = None


def find_interruptions(
    user: Sequence[Utterance], agent: Sequence[Utterance], takeover_seconds: float = TAKEOVER_SECONDS
) -> list[Problem]:
    """Agent utterances that start while a turn of the user is running and go on for more than a second.

    A turn is a user utterance longer than `TURN_SECONDS`, and it is as good as over `OVERLAP_SECONDS` before its end.
    """
    found = []
    for reply in agent:
        if reply.duration <= takeover_seconds:
            continue
        turns = (u for u in user if u.duration > TURN_SECONDS)
        running = next((u for u in turns if u.start < reply.start < u.end - OVERLAP_SECONDS), None)
        if running is not None:
            found.append(Problem("interruption", reply.start, running, reply))
    return found


def find_unresponsive(
    user: Sequence[Utterance],
    agent: Sequence[Utterance],
    duration: float,
    response_seconds: float = 3.0,
    turn_seconds: float = TURN_SECONDS,
) -> list[Problem]:
    """Turns of the user after which nobody says anything for `response_seconds`.

    A turn is a user utterance longer than `turn_seconds`. Any agent speech at its end or within the time is an answer;
    where the user goes on, or the recording ends, within the time, there is nothing to be said.

    Args:
        user, agent: utterances in time order.
        duration: seconds of the recording.
        response_seconds: how long a turn may stay unanswered.
        turn_seconds: user utterances up to this length call for no answer.
    """
    found = []
    for index, turn in enumerate(user):
        until = turn.end + response_seconds
        goes_on = index + 1 < len(user) and user[index + 1].start < until
        if turn.duration <= turn_seconds or goes_on or until > duration + 1e-6:
            continue
        if not any(a.start < until and a.end > turn.end for a in agent):
            found.append(Problem("unresponsive", turn.end, turn))
    return found
