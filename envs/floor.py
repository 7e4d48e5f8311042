"""Who has the floor: gaps, overlaps, floor-transfer offsets and yields, by rules on the speech of both sides.

A turn is an utterance (silences of at most 1 s inside) of more than 1 s; a shorter one of the agent is a backchannel
and takes nothing. Terms as in Heldner and Edlund (2010): the floor-transfer offset is the beginning of the answer minus
the end of what is answered, positive a gap, negative an overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from envs.speech import Interval
from envs.utterances import Utterance, clip_intervals, utterances

TURN_SECONDS = 1.0
YIELD_SECONDS = 1.0  # an agent that is interrupted and stops within this has yielded
_EDGE = 0.2  # nobody reacts faster: who begins this close to a beginning or an end did not mean to interrupt


@dataclass
class Floor:
    """What happened between user and agent in one dialogue.

    Attributes:
        user_turns: turns of the user.
        turns: those of them that ended while there was time for an answer.
        offsets: of the answered ones, the floor-transfer offset in seconds.
        waits: seconds that the user waited after each turn, answered or not; 0 where the answer began before its end.
            Speech that runs on from before the turn is no answer.
        barge_ins: turns of the agent that begin within a turn of the user.
        stops: for each turn of the user that begins while the agent has the floor, seconds until the agent is silent.
        overlap: seconds of agent turns over user speech; user_seconds: of user speech.
        backchannels: of the agent, while the user has the floor.
    """

    user_turns: int = 0
    turns: int = 0
    offsets: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    barge_ins: int = 0
    stops: list[float] = field(default_factory=list)
    overlap: float = 0.0
    user_seconds: float = 0.0
    backchannels: int = 0

    @property
    def seconds_lost(self) -> float | None:
        """Seconds a turn that the user waits or is talked over; None in a dialogue without a turn of the user.

        Waits are of the turns that could be answered, overlap is of all.
        """
        if not self.user_turns:
            return None
        return sum(self.waits) / max(1, self.turns) + self.overlap / self.user_turns

    def metrics(self) -> dict[str, float]:
        """The figures of one dialogue; what it does not have (a gap where nothing was answered) is absent."""
        found: dict[str, float] = {}
        if self.turns:
            found["answer_rate"] = len(self.offsets) / self.turns
        if self.user_turns:
            found["barge_in_rate"] = self.barge_ins / self.user_turns
            found["seconds_lost"] = float(self.seconds_lost or 0.0)
        gaps = [offset for offset in self.offsets if offset >= 0]
        if gaps:
            found["gap"] = sum(gaps) / len(gaps)
        if self.offsets:
            found["floor_transfer_offset"] = sum(self.offsets) / len(self.offsets)
        if self.user_seconds > 0:
            found["overlap"] = self.overlap / self.user_seconds
            found["backchannels_per_minute"] = 60 * self.backchannels / self.user_seconds
        if self.stops:
            found["yield_rate"] = sum(stop <= YIELD_SECONDS for stop in self.stops) / len(self.stops)
            found["stop_seconds"] = sum(self.stops) / len(self.stops)
        return found


def analyse_floor(user: Sequence[Interval], agent: Sequence[Interval], start: float, end: float) -> Floor:
    """Who had the floor when.

    Args:
        user, agent: speech intervals in seconds.
        start, end: of what is looked at; speech is cut there.
    """
    user, agent = (clip_intervals(speech, start, end) for speech in (user, agent))
    user_turns = [turn for turn in utterances(user) if _is_turn(turn)]
    ends = [turn.end for turn in user_turns]
    spoken = [part for whole in utterances(agent) for part in _apart(whole, ends)]
    agent_turns = [turn for turn in spoken if _is_turn(turn)]
    floor = Floor(len(user_turns), user_seconds=sum(interval.duration for interval in user))
    units = [unit for turn in agent_turns for unit in turn.units]
    floor.overlap = sum(unit.overlap(interval) for unit in units for interval in user)
    for turn in agent_turns:
        floor.barge_ins += any(u.start + _EDGE < turn.start < u.end - _EDGE for u in user_turns)
    short = [utterance for utterance in spoken if not _is_turn(utterance)]
    floor.backchannels = sum(any(u.start < s.start < u.end for u in user_turns) for s in short)
    for index, turn in enumerate(user_turns):
        running = next((a for a in agent_turns if a.start < turn.start - _EDGE and a.end > turn.start), None)
        if running is not None:
            floor.stops.append(min(running.end, turn.end) - turn.start)
        until = user_turns[index + 1].start if index + 1 < len(user_turns) else end
        if index + 1 == len(user_turns) and end - turn.end < TURN_SECONDS:
            continue  # the dialogue breaks off: nobody can tell whether it would have been answered
        floor.turns += 1
        answers = [a for a in agent_turns if a is not running and turn.start < a.start < until and a.end > turn.end]
        if answers:
            offset = answers[0].start - turn.end
            floor.offsets.append(offset)
            floor.waits.append(max(0.0, offset))
        else:
            floor.waits.append(max(0.0, until - turn.end))
    return floor


def _apart(utterance: Utterance, ends: Sequence[float]) -> list[Utterance]:
    """Cut in the silences in which a turn of the user ends: what follows is an answer, not the same speech going on."""
    groups = [[utterance.units[0]]]
    for unit in utterance.units[1:]:
        if any(groups[-1][-1].end <= end <= unit.start for end in ends):
            groups.append([unit])
        else:
            groups[-1].append(unit)
    return [Utterance(tuple(group)) for group in groups]


def _is_turn(utterance: Utterance) -> bool:
    return utterance.duration > TURN_SECONDS + 1e-6
