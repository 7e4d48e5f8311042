"""Events that a manifest leaves out, found in the recording itself."""

from dataclasses import replace

from envs.episode import recorded_episode
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.utterances import inter_pausal_units, utterances

BACKCHANNEL_SECONDS = 1.0
EVENT_OF_AXIS = {
    "pause_handling": "pauses",
    "turn_taking": "user_turn_end",
    "backchannel": "true_backchannels",
    "user_interruption": "interruption",
}


def complete_events(segments: list[Segment], detector: SpeechDetector) -> list[Segment]:
    """Segments that each have the event which their axis is scored by.

    What is missing is read off the recording with the definitions of arXiv 2606.11167, section 3: the user's
    pauses, the end of the user's first utterance, the units of the recorded agent's utterances of at most a second,
    or the first user utterance after it that begins while the agent speaks (the one that barges in; else the last one).

    Raises:
        InputError: the audio of such a segment cannot be read, or holds no user speech to read the event off.
    """
    found = [s if EVENT_OF_AXIS[s.axis] in s.events else _complete(s, detector) for s in segments]
    unheard = [segment for segment, complete in zip(segments, found, strict=True) if complete is None]
    if unheard:  # all of them at once, so that a manifest is mended at once
        raise no_user_speech(unheard, len(segments))
    return [segment for segment in found if segment is not None]


def no_user_speech(unheard: list[Segment], of: int) -> InputError:
    """What is wrong with segments in which the detector hears no user, which are some or all of a manifest's `of`."""
    first = unheard[0]
    return InputError(
        f"segment '{first.id}' of {first.recording} holds no user speech on channel {first.user_channel}: "
        f"is `user_channel` right? It is so in {len(unheard)} of {of} segments"
    )


def _complete(segment: Segment, detector: SpeechDetector) -> Segment | None:
    """The segment with its event, or None where nobody speaks as the user."""
    episode = recorded_episode(segment, detector)
    shift = segment.start  # the episode of the recording starts at the segment's start
    # Speech detection to inter-pausal units to utterances, as in scoring: a detector splits at shorter silences.
    user, agent = (utterances(inter_pausal_units(side)) for side in (episode.user_speech, episode.agent_speech))
    if not user:
        return None
    found: object
    if segment.axis == "pause_handling":
        found = [[p.start + shift, p.end + shift] for u in user for p in u.pauses]
    elif segment.axis == "turn_taking":
        found = user[0].end + shift
    elif segment.axis == "backchannel":
        short = [u for u in agent if u.duration <= BACKCHANNEL_SECONDS + 1e-6]
        found = [[unit.start + shift, unit.end + shift] for u in short for unit in u.units]
    else:
        barging = [u for u in user[1:] if any(a.start < u.start < a.end for a in agent)]
        chosen = (barging or user[-1:])[0]
        found = [chosen.start + shift, chosen.end + shift]
    return replace(segment, events={**segment.events, EVENT_OF_AXIS[segment.axis]: found})
