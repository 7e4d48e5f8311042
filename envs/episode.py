"""An episode: one finished dialogue, with everything that rewards and learners need and no model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from envs.audio import write_audio
from envs.errors import InputError
from envs.files import replacing, write_text
from envs.frames import frame_at
from envs.segments import Segment, parse_segment
from envs.speech import Interval, SpeechDetector
from envs.utterances import clip_intervals


class Word(NamedTuple):
    """Something said, a word or a stretch of words, with its times in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Episode:
    """One finished dialogue. All times are *episode time*: 0 is its first sample, lead-in and context included.

    Attributes:
        segment: what was played.
        user_audio, agent_audio: `(N,)` float32 at `sample_rate`.
        sample_rate: Hz.
        user_speech, agent_speech: speech intervals, sorted.
        duration: seconds.
        scored_from: where the segment, and with it the scored window, begins (lead-in + context).
        text: the agent's words.
        words: the same words with the times at which the text stream has them; empty where they are not known.
        text_tokens: `(T,)` the text token drawn at each frame, or None where no policy spoke.
        audio_tokens: `(n_q, T)` audio codes of agent and user as `LMModel.forward` takes them after the text stream;
            -1 where a code never came to be (the acoustic codes of the last frame).
        log_probs: `(T,)` log-probability of each text token under the distribution that it was drawn from.
        policy_version: number of updates of the policy that acted.
    """

    segment: Segment
    user_audio: np.ndarray
    agent_audio: np.ndarray
    sample_rate: int
    user_speech: list[Interval]
    agent_speech: list[Interval]
    duration: float
    scored_from: float = 0.0
    text: str = ""
    text_tokens: np.ndarray | None = None
    audio_tokens: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    policy_version: int = 0
    words: tuple[Word, ...] = ()

    def at(self, recording_time: float) -> float:
        """Episode time of a moment of the recording."""
        return recording_time - self.segment.start + self.scored_from

    def event_time(self, name: str) -> float | None:
        """Episode time of the event (a moment), or None where the segment does not have it."""
        value = self.segment.events.get(name)
        return None if value is None else self.at(float(value))

    def event_intervals(self, name: str) -> list[Interval] | None:
        """Episode times of the event's intervals (one interval or a list of them), or None where there is none."""
        value = self.segment.events.get(name)
        if value is None:
            return None
        pairs = [value] if value and not isinstance(value[0], list | tuple) else value
        return [Interval(self.at(float(start)), self.at(float(end))) for start, end in pairs]

    @property
    def scored_user_speech(self) -> list[Interval]:
        """User speech within the scored window."""
        return clip_intervals(self.user_speech, self.scored_from, self.duration)

    @property
    def scored_agent_speech(self) -> list[Interval]:
        """Agent speech within the scored window; speech that runs into it counts from its beginning."""
        return clip_intervals(self.agent_speech, self.scored_from, self.duration)

    def frame_mask(self, frame_rate: float) -> np.ndarray:
        """`(T,)` bool: the frames that belong to the segment, not to lead-in or context."""
        count = 0 if self.text_tokens is None else len(self.text_tokens)
        return np.arange(count) >= frame_at(self.scored_from, frame_rate)

    def save(self, folder: Path) -> None:
        """Write `episode.json`, `audio.flac` (left agent, right user) and `tokens.safetensors`, all or nothing."""
        from safetensors.numpy import save_file

        length = max(len(self.user_audio), len(self.agent_audio))
        stereo = np.zeros((length, 2), dtype=np.float32)
        stereo[: len(self.agent_audio), 0] = self.agent_audio
        stereo[: len(self.user_audio), 1] = self.user_audio
        tokens = {
            name: np.ascontiguousarray(value)
            for name in ("text_tokens", "audio_tokens", "log_probs")
            if (value := getattr(self, name)) is not None
        }
        record = {
            # The recordings stay where they are: absolute paths, so that the episode can be moved.
            "segment": self.segment.to_json()
            | {
                key: str(path.resolve())
                for key in ("recording", "agent_recording")
                if (path := getattr(self.segment, key)) is not None
            },
            "user_speech": self.user_speech,
            "agent_speech": self.agent_speech,
            "duration": self.duration,
            "scored_from": self.scored_from,
            "text": self.text,
            "words": self.words,
            "policy_version": self.policy_version,
            "samples": [len(self.user_audio), len(self.agent_audio)],
        }
        with replacing(Path(folder)) as temporary:
            write_audio(temporary / "audio.flac", stereo, self.sample_rate)
            save_file(tokens, str(temporary / "tokens.safetensors"))
            write_text(temporary / "episode.json", json.dumps(record, ensure_ascii=False))

    @classmethod
    def load(cls, folder: Path) -> "Episode":
        """Read what `save` wrote (the audio to 16 bits, everything else exactly).

        Raises:
            InputError: the folder is no episode, or one of its files is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            record = json.loads((folder / "episode.json").read_text(encoding="utf-8"))
            tokens = load_file(str(folder / "tokens.safetensors"))
            audio, sample_rate = soundfile.read(str(folder / "audio.flac"), dtype="float32", always_2d=True)
            segment = parse_segment(record["segment"], Path())
            user_samples, agent_samples = record["samples"]
            return cls(
                segment=segment,
                user_audio=np.ascontiguousarray(audio[:user_samples, 1]),
                agent_audio=np.ascontiguousarray(audio[:agent_samples, 0]),
                sample_rate=sample_rate,
                user_speech=[Interval(*pair) for pair in record["user_speech"]],
                agent_speech=[Interval(*pair) for pair in record["agent_speech"]],
                duration=record["duration"],
                scored_from=record["scored_from"],
                text=record["text"],
                policy_version=record["policy_version"],
                words=tuple(Word(*word) for word in record.get("words", ())),
                **tokens,
            )
        except (
            OSError,
            KeyError,
            ValueError,
            TypeError,
            SafetensorError,
            soundfile.LibsndfileError,
        ) as error:
            raise InputError(f"{folder} is not a whole episode ({type(error).__name__}: {error})") from error


def recorded_episode(segment: Segment, detector: SpeechDetector, sample_rate: int = 16000) -> Episode:
    """The recording itself as an episode: the person whose place the model takes is the agent.

    What the recorded person did is the human mark that a policy's scores are held against, and a check of a corpus.
    """
    user, agent = segment.user_audio(sample_rate), segment.agent_audio(sample_rate)
    user_speech, agent_speech = detector.detect([user, agent], sample_rate)
    words = tuple(
        Word(str(text), float(start) - segment.start, float(end) - segment.start)
        for text, (start, end), speaker in segment.transcript
        if speaker == "agent"
    )
    return Episode(
        segment,
        user,
        agent,
        sample_rate,
        user_speech,
        agent_speech,
        len(user) / sample_rate,
        text=" ".join(word.text for word in words),
        words=words,
    )
