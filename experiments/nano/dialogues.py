"""Dialogues with known events: the user's track first, then an agent that answers it well or loosely.

The user's track does not depend on the agent, as in the environment, where recorded user audio is replayed. One track
therefore serves many training dialogues, each with another draw of the agent's behaviour: what can be learnt about
timing is then the distribution, not the draw.

All times are seconds from the start of the track; audio is float32 at 8 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.signal

from . import sentences, voices
from .sentences import Piece
from .voices import SAMPLE_RATE, Voice

KINDS = ("turn", "pause", "long", "interrupt", "silent")
STATES = ("quiet", "speaking", "to pause", "pause", "to invite", "invite", "to end", "end")
NOISE_LEVELS = tuple(10**exponent for exponent in (-3.6, -3.4, -3.2, -3.0, -2.8))  # root mean square


@dataclass(frozen=True)
class Spoken:
    """A user utterance of a bank: its pieces and their audio [N] each."""

    kind: str
    voice: Voice
    pieces: tuple[Piece, ...]
    audio: tuple[np.ndarray, ...]

    @property
    def seconds(self) -> float:
        """Of speech, without the pauses inside."""
        return sum(map(len, self.audio)) / SAMPLE_RATE


@dataclass(frozen=True)
class Cue:
    """What the user does at a time. kind: `pause`, `invite`, `end` (of a turn) or `start` (of a barge-in)."""

    kind: str
    start: float
    end: float


@dataclass
class Track:
    """The user's channel: audio [N], the cues in it, the utterances' [start, end], and words with times."""

    kind: str
    audio: np.ndarray
    cues: list[Cue] = field(default_factory=list)
    utterances: list[tuple[float, float]] = field(default_factory=list)
    words: list[tuple[str, float, float]] = field(default_factory=list)

    def states(self, frames: int, frame: float, before: float = 0.24) -> np.ndarray:
        """What the user is doing in each of `frames` frames of `frame` seconds: an index into `STATES`.

        The last `before` seconds of speech in front of a cue already count as leading to it: its words have been said.
        """
        out = np.zeros(frames, np.int64)

        def mark(start: float, end: float, state: str) -> None:
            out[max(0, round(start / frame)) : max(0, round(end / frame))] = STATES.index(state)

        for begin, end in self.utterances:
            mark(begin, end, "speaking")
        for cue in self.cues:
            if cue.kind == "start":
                continue
            after = [c.start for c in self.cues if c.kind == "start" and c.start > cue.start]
            mark(cue.start - before, cue.start, f"to {cue.kind}")
            mark(cue.start, cue.end if cue.kind != "end" else min(after, default=frames * frame), cue.kind)
        return out

    def moved(self, by: float) -> Track:
        """The cues and utterances `by` seconds later, without audio."""
        cues = [Cue(cue.kind, cue.start + by, cue.end + by) for cue in self.cues]
        return Track(self.kind, self.audio[:0], cues, [(s + by, e + by) for s, e in self.utterances])


@dataclass(frozen=True)
class Line:
    """An agent utterance: sentences of the closed set, or one backchannel, that begin at `start`."""

    start: float
    texts: tuple[str, ...]
    variants: tuple[int, ...]  # which rendition of each text
    end: float


@dataclass(frozen=True)
class AgentVoice:
    """Renditions of everything the agent says: text -> list of audio [N]."""

    audio: dict[str, list[np.ndarray]]
    gap: float = 0.16  # seconds between two sentences of one reply

    def line(self, start: float, texts: tuple[str, ...], rng: np.random.Generator) -> Line:
        """Draw renditions for `texts` and lay them out from `start`."""
        variants = tuple(int(rng.integers(len(self.audio[text]))) for text in texts)
        lengths = [len(self.audio[t][v]) / SAMPLE_RATE for t, v in zip(texts, variants, strict=True)]
        return Line(start, texts, variants, start + sum(lengths) + self.gap * (len(texts) - 1))

    def parts(self, line: Line) -> list[tuple[str, int, float, float]]:
        """(text, rendition, start, end) of each sentence of a line."""
        out, at = [], line.start
        for text, variant in zip(line.texts, line.variants, strict=True):
            end = at + len(self.audio[text][variant]) / SAMPLE_RATE
            out.append((text, variant, at, end))
            at = end + self.gap
        return out


def speak(kind: str, voice: Voice, held_out: bool, seed: int) -> Spoken:
    """Synthesise one user utterance. `kind` as in `sentences.user_sentence`."""
    rng = np.random.default_rng(seed)
    pieces = sentences.user_sentence(kind, rng, held_out)
    return Spoken(kind, voice, pieces, tuple(voices.say(piece.text, voice, seed) for piece in pieces))


def agent_voice(renditions: int = 3) -> AgentVoice:
    """Synthesise the closed set. Slower than the voice's own pace: a word then has two or three frames."""
    audio = {}
    for text in sentences.REPLIES:
        paces = np.linspace(0.8, 0.9, renditions)
        audio[text] = [voices.say(text, Voice("hibari", "heart", 1.0, p), i) for i, p in enumerate(paces)]
    for text in sentences.BACKCHANNELS:
        paces = np.linspace(0.6, 0.72, renditions)
        audio[text] = [voices.say(text, Voice("hibari", "heart", 1.0, p), i) for i, p in enumerate(paces)]
    return AgentVoice(audio)


def user_track(
    kind: str, utterances: list[Spoken], lead: float, tail: float, level: float, rng: np.random.Generator,
    quiet_lead: bool = False,
) -> Track:  # fmt: skip
    """Lay utterances out after `lead` seconds, with noise of root mean square `level`; `tail` seconds follow.

    quiet_lead: the lead-in is digital silence, as the environment feeds it; otherwise it has the room's noise.
    A second utterance (a barge-in) begins 1.7 to 2.9 s after the end of the first.
    """
    track = Track(kind, np.zeros(0, np.float32))
    gain = 10 ** rng.uniform(-0.3, 0.2)
    parts: list[tuple[int, np.ndarray]] = []
    at = lead
    for index, spoken in enumerate(utterances):
        if index:
            at += rng.uniform(1.7, 2.9)
            track.cues.append(Cue("start", at, at))
        begin = at
        for piece, audio in zip(spoken.pieces, spoken.audio, strict=True):
            parts.append((round(at * SAMPLE_RATE), gain * audio))
            end = at + len(audio) / SAMPLE_RATE
            track.words += voices.word_times(piece.text, at, end)
            at = end
            if piece.then != "end":
                at += rng.uniform(0.4, 0.9) if piece.then == "pause" else rng.uniform(0.25, 0.35)
            track.cues.append(Cue(piece.then, end, at))
        track.utterances.append((begin, at))
    track.audio = room_noise(round((at + tail) * SAMPLE_RATE), level, rng)
    if quiet_lead:
        track.audio[: round(lead * SAMPLE_RATE)] = 0
    for first, audio in parts:
        track.audio[first : first + len(audio)] += audio[: len(track.audio) - first]
    return track


def room_noise(length: int, level: float, rng: np.random.Generator) -> np.ndarray:
    """Background [N] at a root mean square of `level`: the low rumble of a room, which costs few bits on disk."""
    white = rng.standard_normal(length + 400)
    rumble = scipy.signal.lfilter([1.0], [1.0, -1.7, 0.72], white)[400:]
    return (level / 9.56 * rumble).astype(np.float32)


def behave_well(track: Track, agent: AgentVoice, rng: np.random.Generator) -> list[Line]:
    """The recorded agent: quiet in pauses, backchannels where invited, prompt answers, yields to a barge-in."""
    lines: list[Line] = []
    for cue in track.cues:
        if cue.kind == "invite":
            texts: tuple[str, ...] = (sentences.BACKCHANNELS[int(rng.integers(4))],)
            lines.append(agent.line(cue.start + rng.uniform(0.1, 0.25), texts, rng))
        elif cue.kind == "end":
            to_come = [c for c in track.cues if c.kind == "start" and c.start > cue.start]
            texts = _reply(rng, 3 if to_come else 2)
            line = agent.line(cue.start + rng.uniform(0.2, 0.3), texts, rng)
            lines.append(_stop(line, agent, to_come[0].start) if to_come else line)
    return lines


@dataclass(frozen=True)
class Looseness:
    """How the agent of the training dialogues errs: probabilities per cue, delays in seconds."""

    pause_takeover: float = 0.31
    invite_takeover: float = 0.15
    invite_backchannel: float = 0.2
    stray_backchannel: float = 0.05  # per utterance, anywhere in it
    answer: float = 0.82
    answer_delay: tuple[float, float, float] = (0.15, 2.0, 0.45)  # shortest, and shape and scale of a gamma beyond
    interrupt_answer: float = 0.98
    interrupt_delay: tuple[float, float, float] = (0.3, 3.0, 0.36)
    answer_after_takeover: float = 0.5
    yields: float = 0.85


def behave_loosely(
    track: Track, agent: AgentVoice, rng: np.random.Generator, loose: Looseness | None = None
) -> list[Line]:
    """An agent with the faults of a supervised model: it takes pauses for ends, answers late or not, runs on."""
    loose = loose or Looseness()
    lines: list[Line] = []
    barged = False
    for begin, end in track.utterances:
        if rng.random() < loose.stray_backchannel:
            _add(lines, agent, rng.uniform(begin + 0.5, end), _backchannel(rng), rng)
    for cue in track.cues:
        free = max((line.end for line in lines), default=-9.0)
        draw = rng.random()
        if cue.kind == "start":
            barged = True
            if lines and lines[-1].end > cue.start and rng.random() < loose.yields:
                lines[-1] = _stop(lines[-1], agent, cue.start + 0.3)
        elif cue.kind == "pause" and draw < loose.pause_takeover:
            _add(lines, agent, cue.start + rng.uniform(0.2, 1.0), _reply(rng), rng)
        elif cue.kind == "invite":
            if draw < loose.invite_takeover:
                _add(lines, agent, cue.start + rng.uniform(0.2, 0.9), _reply(rng), rng)
            elif draw < loose.invite_takeover + loose.invite_backchannel:
                _add(lines, agent, cue.start + rng.uniform(0.05, 1.1), _backchannel(rng), rng)
        elif cue.kind == "end":
            chance = loose.interrupt_answer if barged else loose.answer
            talked_over = free > cue.start - 1.5 and len(lines[-1].texts[0]) > 8
            shortest, shape, scale = loose.interrupt_delay if barged else loose.answer_delay
            if draw < (chance if barged or not talked_over else loose.answer_after_takeover):
                start = max(cue.start, free + 0.1) + shortest + rng.gamma(shape, scale)
                to_come = any(c.kind == "start" and c.start > cue.start for c in track.cues)
                _add(lines, agent, start, _reply(rng, 3 if to_come and rng.random() < 0.8 else 0), rng)
    return sorted(lines, key=lambda line: line.start)


def speak_on(agent: AgentVoice, seconds: float, rng: np.random.Generator) -> Line:
    """The agent alone: one sentence after another, for at least `seconds`."""
    start = rng.uniform(0.0, 0.6)
    count = 2
    while (line := agent.line(start, _reply(rng, count), rng)).end < seconds:
        count += 1
    return line


def agent_audio(lines: list[Line], agent: AgentVoice, length: float) -> np.ndarray:
    """The agent's channel [N]: its lines on digital silence."""
    out = np.zeros(round(length * SAMPLE_RATE), np.float32)
    for line in lines:
        for text, variant, start, _ in agent.parts(line):
            first = round(start * SAMPLE_RATE)
            part = agent.audio[text][variant][: max(0, len(out) - first)]
            out[first : first + len(part)] += part
    return out


def agent_words(lines: list[Line], agent: AgentVoice) -> list[tuple[str, float, float]]:
    """Words of the agent with their times."""
    parts = [part for line in lines for part in agent.parts(line)]
    return [word for text, _, start, end in parts for word in voices.word_times(text, start, end)]


def _reply(rng: np.random.Generator, count: int = 0) -> tuple[str, ...]:
    count = count or int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    return tuple(sentences.REPLIES[i] for i in rng.choice(len(sentences.REPLIES), count, replace=False))


def _backchannel(rng: np.random.Generator) -> tuple[str, ...]:
    return (sentences.BACKCHANNELS[int(rng.integers(len(sentences.BACKCHANNELS)))],)


def _add(lines: list[Line], agent: AgentVoice, start: float, texts: tuple[str, ...], rng: np.random.Generator) -> None:
    """Append a line unless the agent is talking then."""
    line = agent.line(start, texts, rng)
    if all(line.start > other.end + 0.1 or line.end < other.start - 0.1 for other in lines):
        lines.append(line)


def _stop(line: Line, agent: AgentVoice, after: float) -> Line:
    """Cut a line at the end of the sentence that runs at time `after`."""
    kept = [part for part in agent.parts(line) if part[2] <= after]
    return Line(line.start, tuple(p[0] for p in kept), tuple(p[1] for p in kept), kept[-1][3]) if kept else line
