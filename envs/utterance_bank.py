"""Utterances of recorded users, cut out of the recordings by their segments' events: what a scripted user can say."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from envs.errors import InputError
from envs.frames import samples_in
from envs.segments import Segment
from envs.speech import Interval, SpeechDetector

KIND_OF_AXIS = {
    "pause_handling": "pausing",
    "turn_taking": "turn",
    "backchannel": "long",
    "user_interruption": "interruption",
}
_MARGIN_SECONDS = 0.05
_FADE_SECONDS = 0.01


@dataclass(frozen=True)
class BankUtterance:
    """Something that a recorded user says.

    Attributes:
        kind: `turn`, `pausing` (with a pause inside), `long` (invites backchannels) or `interruption` (barges in).
        audio: `(N,)` float32 at the bank's rate, faded at both ends.
        seconds: its duration.
        words: `(word, start, end)` in seconds from its beginning, where the transcript is known.
        source: the id of its segment.
    """

    kind: str
    audio: np.ndarray
    seconds: float
    words: tuple[tuple[str, float, float], ...]
    source: str


def utterance_bank(
    segments: Sequence[Segment], detector: SpeechDetector, sample_rate: int
) -> dict[str, list[BankUtterance]]:
    """What the users of these segments say, by kind.

    A turn ends at the segment's `user_turn_end`, an interruption is its `interruption`, the rest is the user's speech
    from its first to its last stretch.

    Args:
        segments: with their events (`envs.events.complete_events`).
        detector: finds where the user speaks, for segments without such an event.
        sample_rate: Hz of the utterances.

    Raises:
        InputError: there is no turn among them: a dialogue cannot begin.
    """
    audio = [segment.user_audio(sample_rate) for segment in segments]
    heard = detector.detect(audio, sample_rate)
    bank: dict[str, list[BankUtterance]] = {kind: [] for kind in KIND_OF_AXIS.values()}
    for segment, clip, speech in zip(segments, audio, heard, strict=True):
        span = _span(segment, speech)
        if span is not None:
            kind = KIND_OF_AXIS[segment.axis]
            bank[kind].append(_cut(segment, kind, clip, span, sample_rate))
    if not bank["turn"]:
        raise InputError("a live user needs recorded turns: give segments of the axis turn_taking")
    return bank


def _span(segment: Segment, speech: Sequence[Interval]) -> Interval | None:
    """Where in the segment's audio the utterance lies."""
    if segment.axis == "user_interruption":
        start, end = segment.events["interruption"]
        return Interval(float(start) - segment.start, float(end) - segment.start)
    if not speech:
        return None
    end = speech[-1].end
    if segment.axis == "turn_taking":
        end = float(segment.events["user_turn_end"]) - segment.start
    return Interval(speech[0].start, end) if end > speech[0].start else None


def _cut(segment: Segment, kind: str, clip: np.ndarray, span: Interval, rate: int) -> BankUtterance:
    first = max(0.0, span.start - _MARGIN_SECONDS)
    last = min(len(clip) / rate, span.end + _MARGIN_SECONDS)
    audio = clip[samples_in(first, rate) : samples_in(last, rate)].copy()
    fade = min(samples_in(_FADE_SECONDS, rate), len(audio) // 2)
    ramp = np.linspace(0.0, 1.0, fade, dtype=np.float32)
    audio[:fade] *= ramp
    audio[len(audio) - fade :] *= ramp[::-1]
    words = []
    for word, times, speaker in segment.transcript:
        start, end = (float(time) - segment.start for time in times)
        if speaker == "user" and first <= (start + end) / 2 <= last:
            words.append((str(word), max(0.0, start - first), max(0.0, end - first)))
    return BankUtterance(kind, audio, len(audio) / rate, tuple(words), segment.id)
