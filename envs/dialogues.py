"""The mechanics that the single and the vector environment share: what the user says, and how a dialogue is finished.

Shapes: `B` dialogues, `T` frames (of the longest), `N` samples.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from envs.codec import Codec
from envs.cores import map_on_cores
from envs.episode import Episode, Word
from envs.errors import InputError
from envs.frames import frame_at, frames_in, samples_in
from envs.segments import Segment
from envs.speech import Interval, SpeechDetector
from envs.utterances import clip_intervals

DECODE_BATCH = 16

# Recording, user channel, start, end, frames of context: what makes one user's side another's equal.
UserKey = tuple[str, int, float, float, int]


class RewardFunction(Protocol):
    """What an environment scores finished episodes with; `rewards.RewardFunction` is one."""

    def __call__(self, episodes: Sequence[Episode]) -> Sequence[Mapping[str, Any]]:
        """For each episode, by axis, a score with a `value`, or None where the axis does not apply."""
        ...

    def total(self, scores: Mapping[str, Any]) -> float:
        """The weighted sum of one episode's scores."""
        ...


@dataclass(frozen=True)
class UserSide:
    """The user's part of a dialogue, ready to be replayed.

    Attributes:
        segment: what is played.
        audio: `(N,)` float32: lead-in silence, context, segment; a whole number of frames.
        codes: `(user_codebooks, T)` on the codec's device.
        speech: speech intervals in episode time.
        scored_from: seconds of lead-in and context.
    """

    segment: Segment
    audio: np.ndarray
    codes: torch.Tensor
    speech: list[Interval]
    scored_from: float

    @property
    def frames(self) -> int:
        return self.codes.shape[-1]


class CodeStore(Protocol):
    """Keeps codes of users' audio beyond a run; `rlhf_duplex.data.codes.CodeCache` is one."""

    def encode(self, codec: Codec, audio: np.ndarray) -> torch.Tensor:
        """Codes `(user_codebooks, T)` of audio `(N,)`, from the store or, where it does not have them, encoded."""
        ...


@dataclass
class UserSides:
    """Makes and keeps the user's side of segments: read, resampled, detected and encoded once, not once an episode.

    Attributes:
        codec, detector: of the environment.
        lead_in: seconds of silence before everything (3 s for Moshi in arXiv 2606.11167).
        capacity: bytes of audio to keep; those unused for longest go first.
        store: keeps the codes of segments without context on disk. Context is drawn anew for every group and never
            comes back, so that its codes are not worth keeping.
    """

    codec: Codec
    detector: SpeechDetector
    lead_in: float = 3.0
    capacity: int = 2**30
    store: CodeStore | None = None
    _kept: "OrderedDict[UserKey, UserSide]" = field(default_factory=OrderedDict)

    def get(self, requests: Sequence[tuple[Segment, float]]) -> list[UserSide]:
        """The user's side for each (segment, seconds of context before it)."""
        keys = [self._key(segment, context) for segment, context in requests]
        missing = {key: segment for key, (segment, _) in zip(keys, requests, strict=True) if key not in self._kept}
        audio = {key: padded_user_audio(segment, self.codec, self.lead_in, key[-1]) for key, segment in missing.items()}
        speech = self.detector.detect(list(audio.values()), self.codec.sample_rate) if audio else []
        # One by one: the codes of a segment must not depend on what else is encoded at the same time.
        encoded = map_on_cores(self._encode, [(audio[key], key[-1] == 0) for key in missing], self.codec.device)
        for (key, segment), intervals, codes in zip(missing.items(), speech, encoded, strict=True):
            lead_in = frames_in(self.lead_in, self.codec.frame_rate)
            before = (lead_in + key[-1]) / self.codec.frame_rate
            self._kept[key] = UserSide(segment, audio[key], codes, intervals, before)
        found = []
        for key, (segment, _) in zip(keys, requests, strict=True):
            self._kept.move_to_end(key)
            found.append(replace(self._kept[key], segment=segment))
        self._forget(set(keys))
        return found

    def _forget(self, current: "set[UserKey]") -> None:
        """Drop what is too much, and context: the next batch of its group asks for it again, or nobody does."""
        for key in [key for key in self._kept if key[-1] and key not in current]:
            del self._kept[key]
        size = sum(side.audio.nbytes for side in self._kept.values())
        while size > self.capacity:
            size -= self._kept.popitem(last=False)[1].audio.nbytes

    def _encode(self, request: tuple[np.ndarray, bool]) -> torch.Tensor:
        """Codes `(user_codebooks, T)` of audio `(N,)`, and whether the store may keep them."""
        audio, keep = request
        if self.store is not None and keep:
            return self.store.encode(self.codec, audio)
        return self.codec.encode(torch.from_numpy(audio)[None])[0]

    def _key(self, segment: Segment, context: float) -> UserKey:
        # Context in whole frames, so that the scored window begins at a frame's edge.
        frames = frame_at(min(max(context, 0.0), segment.start), self.codec.frame_rate)
        return str(segment.recording), segment.user_channel, segment.start, segment.end, frames


def padded_user_audio(segment: Segment, codec: Codec, lead_in: float, context_frames: int = 0) -> np.ndarray:
    """The user's audio as an episode plays it, `(N,)`: lead-in silence, context, segment; a whole number of frames."""
    start = max(0.0, segment.start - context_frames / codec.frame_rate)
    heard = segment.user_audio(codec.sample_rate, start)
    frames = frames_in((segment.duration + context_frames / codec.frame_rate), codec.frame_rate)
    silent = frames_in(lead_in, codec.frame_rate) * codec.frame_samples
    audio = np.zeros(silent + frames * codec.frame_samples, dtype=np.float32)
    heard = heard[: len(audio) - silent]
    audio[silent : silent + len(heard)] = heard
    return audio


def finish_dialogues(
    users: Sequence[UserSide],
    actions: torch.Tensor,
    frames: Sequence[int],
    codec: Codec,
    detector: SpeechDetector,
    timing: dict[str, float] | None = None,
) -> list[Episode]:
    """Episodes from what the agent did: its audio decoded and its speech detected, all dialogues at once.

    Args:
        users: the user's side of each dialogue.
        actions: `(B, T, 1 + agent_codebooks)` text tokens and audio codes as they were heard.
        frames: how many frames of each dialogue were played.
        codec, detector: of the environment.
        timing: where the seconds that `decode` and `detect` took are added.
    """
    started = time.perf_counter()
    text, codes = actions[..., 0], actions[..., 1:].transpose(1, 2)
    silent = (codes >= codec.audio_cardinality).any(dim=1)  # (B, T): no audio yet
    audio = _decode(codes, silent, frames, codec)
    clips = [row[: count * codec.frame_samples] for row, count in zip(audio, frames, strict=True)]
    decoded = time.perf_counter()
    speech = detector.detect(clips, codec.sample_rate)
    if timing is not None:
        detected = time.perf_counter()
        timing["decode"] = timing.get("decode", 0.0) + decoded - started
        timing["detect"] = timing.get("detect", 0.0) + detected - decoded
    tokens = text.cpu().tolist()
    episodes = []
    for user, clip, intervals, row, count in zip(users, clips, speech, tokens, frames, strict=True):
        seconds = count / codec.frame_rate
        episodes.append(
            Episode(
                segment=user.segment,
                user_audio=user.audio[: samples_in(seconds, codec.sample_rate)],
                agent_audio=clip,
                sample_rate=codec.sample_rate,
                user_speech=clip_intervals(user.speech, 0.0, seconds),
                agent_speech=intervals,
                duration=seconds,
                scored_from=user.scored_from,
                text=codec.decode_text(row[:count]),
                words=tuple(
                    Word(word, first / codec.frame_rate, last / codec.frame_rate)
                    for word, first, last in codec.decode_words(row[:count])
                ),
            )
        )
    return episodes


def _decode(codes: torch.Tensor, silent: torch.Tensor, frames: Sequence[int], codec: Codec) -> np.ndarray:
    """Agent audio `(B, N)`: the frames before the first whole one are silence, the rest is decoded."""
    batch, _, longest = codes.shape
    firsts = silent.long().cumprod(dim=1).sum(dim=1).tolist()  # leading frames without audio
    audio = np.zeros((batch, longest * codec.frame_samples), dtype=np.float32)
    # Dialogues of like beginning and length together, each part only as far as its longest goes.
    order = sorted(range(batch), key=lambda row: (firsts[row], frames[row]))
    parts = [list(rows) for _, rows in itertools.groupby(order, key=lambda row: firsts[row])]
    for rows in (part[i : i + DECODE_BATCH] for part in parts for i in range(0, len(part), DECODE_BATCH)):
        first, last = firsts[rows[0]], max(frames[row] for row in rows)
        if first < last:
            valid = codes[rows, :, first:last].clamp(0, codec.audio_cardinality - 1)
            audio[rows, first * codec.frame_samples : last * codec.frame_samples] = codec.decode(valid).float().cpu()
    return audio


def find_segments(segments: Sequence[Segment], wanted: Sequence[str | Segment]) -> list[Segment]:
    """Segments by id (or as they are).

    Raises:
        InputError: an id that is not there.
    """
    known = {segment.id: segment for segment in segments}
    found = []
    for item in wanted:
        if isinstance(item, Segment):
            found.append(item)
        elif item in known:
            found.append(known[item])
        else:
            raise InputError(
                f"no segment has the id '{item}': there are {len(known)}, such as {next(iter(known), None)}"
            )
    return found
