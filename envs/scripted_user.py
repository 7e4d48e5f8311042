"""A user who reacts: it speaks, waits, barges in and yields by what it hears of the agent, B dialogues at once.

What it says is recorded speech (`envs.utterance_bank`); when it says it is decided frame by frame from the agent's
decoded audio, by rules and a script that is drawn once. There is no randomness beyond the script: the same script and
the same agent give the same dialogue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from envs.codec import Codec
from envs.ear import Ear
from envs.errors import InputError
from envs.frames import frames_in, samples_in
from envs.segments import Segment
from envs.speech import SpeechDetector
from envs.utterance_bank import BankUtterance

HEARD_SECONDS = 0.6  # of agent speech that counts as an answer
YIELD_AFTER_SECONDS = 1.2  # of agent speech over its own at which a user that yields gives up
_FADE_SECONDS = 0.03


@dataclass(frozen=True)
class Move:
    """One thing that the user is going to say, and when.

    Attributes:
        utterance: what.
        gap: seconds of silence after the agent's answer before the user goes on.
        patience: seconds without an answer before the user goes on all the same.
        barge_after: for an interruption, seconds of agent speech after which the user barges in; None waits.
        yields: whether the user gives up when the agent talks over it.
    """

    utterance: BankUtterance
    gap: float
    patience: float
    barge_after: float | None
    yields: bool


@dataclass(frozen=True)
class Script:
    """What the user of one dialogue is going to say; `id` names it, and the dialogue."""

    id: str
    moves: tuple[Move, ...]


class CodecStream(Protocol):
    """Audio to codes and back, a frame of B dialogues at a time; `rlhf_duplex.policy.codec_stream` has Mimi's."""

    def begin(self, batch: int) -> None:
        """Start B streams."""
        ...

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        """A frame of audio `(B, frame_samples)` to codes `(B, user_codebooks)`."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """A frame of codes `(B, agent_codebooks)` to audio `(B, frame_samples)`."""
        ...


class LiveUser(Protocol):
    """The user's side of B live dialogues; it hears the agent. Deterministic given the dialogues."""

    def begin(self, dialogues: Sequence[Segment]) -> torch.Tensor:
        """Start; gives the user's codes `(B, user_codebooks)` of the first frame."""
        ...

    def hear(self, actions: torch.Tensor) -> torch.Tensor:
        """The agent's `(B, 1 + agent_codebooks)` of this frame; gives the user's codes of the next one."""
        ...

    def sides(self) -> list[tuple[np.ndarray, Segment]]:
        """What each user said: audio `(N,)` since the beginning, and the dialogue's segment with words and events."""
        ...


def draw_scripts(
    bank: Mapping[str, Sequence[BankUtterance]], count: int, seed: int, seconds: float = 30.0
) -> list[Script]:
    """Scripts of dialogues of about `seconds`, drawn from a seed: turns, pausing and long ones, and interruptions.

    Every script opens with a turn. An interruption is twice as likely as any other kind that the bank has.
    """
    scripts = []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        moves: list[Move] = []
        length = 0.0
        while length < seconds:
            kinds = ["turn"] if not moves else [k for k in ("turn", "pausing", "long", "interruption") if bank.get(k)]
            weights = np.array([2.0 if kind == "interruption" else 1.0 for kind in kinds])
            kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
            utterance = bank[kind][int(rng.integers(len(bank[kind])))]
            moves.append(
                Move(
                    utterance,
                    gap=float(rng.uniform(0.3, 0.8)),
                    patience=float(rng.uniform(2.5, 4.0)),
                    barge_after=float(rng.uniform(1.0, 2.5)) if kind == "interruption" else None,
                    yields=bool(kind != "interruption" and rng.random() < 0.5),
                )
            )
            length += utterance.seconds
        scripts.append(Script(script_id(seed, index), tuple(moves)))
    return scripts


def script_id(seed: int, index: int) -> str:
    """The name of a script that `draw_scripts` draws, and of its dialogue."""
    return f"live-{seed}-{index:04d}"


def dialogue_segments(ids: Sequence[str], seconds: float) -> list[Segment]:
    """The dialogues of scripts as segments: ids and a length; there is no recording of them."""
    return [Segment(name, "turn_taking", Path(f"{name}.live"), 1, 0.0, seconds) for name in ids]


class _Speaker:
    """One user's mouth and mind."""

    def __init__(self, script: Script, codec: Codec, silent_frames: int) -> None:
        self.script = script
        self._samples, self._rate = codec.frame_samples, codec.sample_rate
        self._seconds = codec.frame_samples / codec.sample_rate
        self._next = 0
        self._left: np.ndarray | None = None  # of what is being said
        self._quiet_frames = silent_frames
        self._now = 0.0
        self._ended: float | None = None
        self._over = self._agent_on = self._agent_off = self._answer = 0.0
        self.spoken: list[tuple[float, int]] = []  # begin of each move said, in order
        self.ends: list[float] = []
        self.barge_ins: list[int] = []  # which of them begin while the agent speaks
        self.yields: list[float] = []

    def speak(self) -> np.ndarray:
        """The next frame of audio."""
        out = np.zeros(self._samples, dtype=np.float32)
        if self._left is not None:
            part = self._left[: self._samples]
            out[: len(part)] = part
            self._left = self._left[self._samples :]
            if not len(self._left):
                self._stop(self._now + len(part) / self._rate)
        self._now += self._seconds
        return out

    def hear(self, speaking: bool) -> None:
        """Whether the agent was speaking at the end of the frame; decides what is said next."""
        self._agent_on = self._agent_on + self._seconds if speaking else 0.0
        self._agent_off = 0.0 if speaking else self._agent_off + self._seconds
        if self._left is not None:
            self._over = self._over + self._seconds if speaking else 0.0
            if self._move.yields and self._over >= YIELD_AFTER_SECONDS:
                self._give_up()
            return
        self._answer += self._seconds * speaking
        if self._next < len(self.script.moves) and self._wants_to_speak():
            self._begin()

    @property
    def _move(self) -> Move:
        return self.script.moves[self._next - 1 if self._left is not None else self._next]

    def _wants_to_speak(self) -> bool:
        if self._ended is None:
            self._quiet_frames -= 1
            return self._quiet_frames <= 0
        move = self._move
        waited = self._now - self._ended
        if move.barge_after is not None and self._agent_on >= move.barge_after:
            return True
        if self._answer >= HEARD_SECONDS:
            return self._agent_off >= move.gap if move.barge_after is None else self._agent_off >= move.gap + 0.5
        return waited >= move.patience and self._agent_off > 0

    def _begin(self) -> None:
        move = self._move
        if self._agent_on > 0:
            self.barge_ins.append(self._next)
        self.spoken.append((self._now, self._next))
        self._left = move.utterance.audio
        self._next += 1
        self._over = 0.0

    def _give_up(self) -> None:
        assert self._left is not None
        fade = min(samples_in(_FADE_SECONDS, self._rate), len(self._left))
        self._left = self._left[:fade] * np.linspace(1.0, 0.0, fade, dtype=np.float32)
        self.yields.append(self._now)
        if not fade:
            self._stop(self._now)

    def _stop(self, time: float) -> None:
        self._left = None
        self._ended = time
        self._answer = 0.0
        self.ends.append(time)

    def segment(self, dialogue: Segment, lead_in: float) -> Segment:
        """The dialogue with what was said and when, in seconds from the end of the lead-in."""
        transcript = []
        ends = [*self.ends, self._now]

        def shown(time: float) -> float:
            return min(time - lead_in, dialogue.end)  # the user speaks a frame more than is played

        for (start, index), end in zip(self.spoken, ends, strict=False):
            for word, first, last in self.script.moves[index].utterance.words:
                if start + first < end:
                    transcript.append((word, (start + first - lead_in, start + last - lead_in), "user"))
        events: dict[str, Any] = {
            "barge_ins": [
                [shown(start), shown(end)]
                for (start, index), end in zip(self.spoken, ends, strict=False)
                if index in self.barge_ins
            ],
            "yields": [shown(time) for time in self.yields],
        }
        if self.ends:
            events["user_turn_end"] = shown(self.ends[0])
        return Segment(dialogue.id, dialogue.axis, dialogue.recording, 1, 0.0, dialogue.end, events, tuple(transcript))


class ScriptedUser:
    """Users that follow scripts (see the module).

    Args:
        scripts: by id, what each dialogue's user says.
        codec: of the agent's model.
        stream: the same codec frame by frame; it is this user's alone.
        detector: Silero, with which the agent is heard.
        lead_in: seconds of silence before the first words.

    Raises:
        InputError: a lead-in of less than a frame.
    """

    def __init__(
        self,
        scripts: Sequence[Script],
        codec: Codec,
        stream: CodecStream,
        detector: SpeechDetector,
        lead_in: float = 1.0,
    ) -> None:
        self._scripts = {script.id: script for script in scripts}
        self._codec, self._stream = codec, stream
        self._ear = Ear(detector, codec.sample_rate)
        self._silent_frames = frames_in(lead_in, codec.frame_rate)
        if self._silent_frames < 1:
            raise InputError(f"lead_in must be at least a frame, {1 / codec.frame_rate:g} s, found {lead_in!r}")

    def begin(self, dialogues: Sequence[Segment]) -> torch.Tensor:
        """See `LiveUser.begin`."""
        self._dialogues = list(dialogues)
        self._speakers = [_Speaker(self._scripts[d.id], self._codec, self._silent_frames) for d in dialogues]
        self._audio: list[np.ndarray] = []
        self._stream.begin(len(dialogues))
        self._ear.begin(len(dialogues))
        return self._speak()

    def hear(self, actions: torch.Tensor) -> torch.Tensor:
        """See `LiveUser.hear`."""
        codes = actions[:, 1:]
        missing = (codes >= self._codec.audio_cardinality).any(dim=1)
        if bool(missing.all()):  # the first frames of a delayed model: nothing was said yet
            heard = np.zeros((len(codes), self._codec.frame_samples), dtype=np.float32)
        else:
            audio = self._stream.decode(codes.clamp(0, self._codec.audio_cardinality - 1))
            heard = torch.where(missing[:, None], torch.zeros_like(audio), audio).float().cpu().numpy()
        for speaker, speaking in zip(self._speakers, self._ear.hear(heard), strict=True):
            speaker.hear(bool(speaking))
        return self._speak()

    def _speak(self) -> torch.Tensor:
        frame = np.stack([speaker.speak() for speaker in self._speakers])
        self._audio.append(frame)
        return self._stream.encode(torch.from_numpy(frame))

    def sides(self) -> list[tuple[np.ndarray, Segment]]:
        """See `LiveUser.sides`."""
        audio = np.concatenate(self._audio, axis=1)
        lead_in = self._silent_frames / self._codec.frame_rate
        segments = [s.segment(d, lead_in) for s, d in zip(self._speakers, self._dialogues, strict=True)]
        return list(zip(audio, segments, strict=True))
