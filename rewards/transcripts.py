"""What was said in an episode, by either side: from the text stream, from the corpus, or by speech recognition.

All of them are `Transcriber`s: episodes in, words with times out. A word here may be a stretch of words where nothing
finer is known.
"""

import functools
import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from envs.audio import resample
from envs.episode import Episode, Word
from envs.errors import InputError
from envs.frames import samples_in
from envs.segments import Segment
from envs.speech import Interval
from envs.utterances import MAX_PAUSE_SECONDS, clip_intervals, utterances

SIDES = ("user", "agent")
_MARGIN_SECONDS = 0.1
_LONGEST_SECONDS = 29.0  # Whisper hears 30 s at a time, and refuses more
_KEPT = 8192


class Transcriber(Protocol):
    """What one side says."""

    def words(self, episodes: Sequence[Episode]) -> list[list[Word] | None]:
        """The words of each episode in time order, in episode time; None where nobody knows them."""
        ...

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Look, before a model is loaded, whether episodes of these segments can be transcribed.

        Raises:
            InputError: they cannot.
        """
        ...


class InnerMonologue:
    """The agent's text stream: its own words, at no cost."""

    def words(self, episodes: Sequence[Episode]) -> list[list[Word] | None]:
        return [self._words(episode) for episode in episodes]

    def prepare(self, segments: Sequence[Segment]) -> None:
        pass

    def _words(self, episode: Episode) -> list[Word]:
        if episode.words or not episode.text:
            return list(episode.words)
        start = episode.scored_agent_speech[0].start if episode.scored_agent_speech else episode.scored_from
        return [Word(episode.text, start, episode.duration)]  # an episode from elsewhere, without times


class CorpusWords:
    """The user's words as the segment's `transcript` has them."""

    def words(self, episodes: Sequence[Episode]) -> list[list[Word] | None]:
        return [self._words(episode) for episode in episodes]

    def prepare(self, segments: Sequence[Segment]) -> None:
        without = [segment for segment in segments if not _has_user(segment)]
        if without:
            raise InputError(
                f"{len(without)} of {len(segments)} segments have no transcript of the user (the first is "
                f"'{without[0].id}'): add `transcript` to the manifest, or recognise the user's speech "
                "(`user: asr, asr: {model: ...}`)"
            )

    def _words(self, episode: Episode) -> list[Word] | None:
        if not _has_user(episode.segment):
            return None
        words = [
            Word(str(text), episode.at(float(start)), episode.at(float(end)))
            for text, (start, end), speaker in episode.segment.transcript
            if speaker == "user"
        ]
        return sorted((word for word in words if self._heard(word, episode)), key=lambda word: word.start)

    def _heard(self, word: Word, episode: Episode) -> bool:
        """Within the segment, or in as much of the context before it as was played."""
        if word.start >= episode.scored_from - 1e-6:
            return word.start < episode.duration
        return any(Interval(word.start, word.end).overlap(spoken) > 0 for spoken in episode.user_speech)


def _has_user(segment: Segment) -> bool:
    return any(speaker == "user" for *_, speaker in segment.transcript)


@dataclass
class SpeechRecogniser:
    """Speech recognition on what was heard, through transformers' `automatic-speech-recognition` pipeline.

    Speech is cut into utterances by the episode's speech intervals, and each is recognised by itself: what is silent
    is never transcribed (Whisper invents words in silence), and turns have times whatever the model gives. The user's
    side is recognised once a segment and kept; the context before it, which differs from update to update, apart.

    Attributes:
        side: `user` or `agent` (its *decoded audio*, what a listener hears).
        model: hub id or local folder of any model that the pipeline takes; weights must be safetensors.
        device: its own, so that it need not share the policy's; dtype: of its weights, by torch's name.
        batch_size: utterances at a time, of like length together.
        timestamps: times of words rather than of utterances, where the model has them (CTC, Whisper).
        generate: further arguments of generation, such as `{language: english}` for Whisper.

    Raises:
        InputError: a side or value that cannot be.
    """

    side: str
    model: str
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16
    timestamps: bool = False
    generate: dict[str, Any] = field(default_factory=dict)
    _kept: "OrderedDict[tuple, list[Word]]" = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if self.side not in SIDES or not isinstance(self.model, str) or not self.model:
            raise InputError(f"speech recognition needs a side (user or agent) and a model, found {self.model!r}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"asr: batch_size must be a whole number of at least 1, found {self.batch_size!r}")

    def prepare(self, segments: Sequence[Segment]) -> None:
        load_recogniser(self.model, self.device, self.dtype)

    def words(self, episodes: Sequence[Episode]) -> list[list[Word] | None]:
        parts = [part for episode in episodes for part in self._parts(episode)]
        missing = {part.key: part for part in parts if part.key is not None and part.key not in self._kept}
        fresh = [part for part in parts if part.key is None] + list(missing.values())
        found = dict(zip(map(id, fresh), self._recognise(fresh), strict=True))
        for part in fresh:
            if part.key is not None:
                self._kept[part.key] = found[id(part)]
        rows: list[list[Word] | None] = []
        remaining = iter(parts)
        for episode in episodes:
            words: list[Word] = []
            for _ in self._parts(episode):
                part = next(remaining)
                heard = found[id(part)] if part.key is None else self._kept[part.key]
                words += [Word(word.text, word.start + part.start, word.end + part.start) for word in heard]
            rows.append(words)
        for key in {part.key for part in parts if part.key is not None}:
            self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return rows

    def _parts(self, episode: Episode) -> list["_Part"]:
        if self.side == "agent":
            return [_Part(None, episode, 0.0, episode.duration, self.side)]
        start = episode.scored_from
        spans = [(0.0, start)] * (start > 0) + [(start, episode.duration)]
        return [_Part(_heard(episode, *span), episode, *span, self.side) for span in spans]

    def _recognise(self, parts: Sequence["_Part"]) -> list[list[Word]]:
        """The words of each part, with times from the part's beginning."""
        clips = [(row, spoken) for row, part in enumerate(parts) for spoken in part.utterances()]
        words: list[list[Word]] = [[] for _ in parts]
        if not clips:
            return words
        recogniser = load_recogniser(self.model, self.device, self.dtype)
        rate = int(recogniser.feature_extractor.sampling_rate)
        order = sorted(range(len(clips)), key=lambda i: -clips[i][1].duration)
        audio = [{"raw": parts[clips[i][0]].cut(clips[i][1], rate), "sampling_rate": rate} for i in order]
        options: dict[str, Any] = {"generate_kwargs": dict(self.generate)} if self.generate else {}
        if self.timestamps:
            options["return_timestamps"] = "word"
        try:
            heard = recogniser(audio, batch_size=self.batch_size, **options)
        except (ValueError, TypeError) as error:
            raise InputError(f"asr: model '{self.model}' cannot be used so ({' '.join(str(error).split())})") from error
        results = dict(zip(order, heard, strict=True))
        for index, (row, spoken) in enumerate(clips):
            words[row] += _timed(results[index], spoken, parts[row].start)
        return words


def _heard(episode: Episode, start: float, end: float) -> tuple[bytes, int]:
    """What the user said there, as a key: a live user says something else in every episode of a dialogue."""
    rate = episode.sample_rate
    part = np.ascontiguousarray(episode.user_audio[samples_in(start, rate) : samples_in(end, rate)])
    return hashlib.blake2b(part.tobytes(), digest_size=16).digest(), rate


@dataclass(frozen=True)
class _Part:
    """A stretch of an episode that is recognised, and kept under `key` where it has one."""

    key: tuple | None
    episode: Episode
    start: float
    end: float
    side: str

    def utterances(self) -> list[Interval]:
        speech = self.episode.user_speech if self.side == "user" else self.episode.agent_speech
        within = utterances(clip_intervals(speech, self.start, self.end), MAX_PAUSE_SECONDS)
        pieces = []
        for spoken in within:
            count = math.ceil(spoken.duration / _LONGEST_SECONDS)
            edges = [spoken.start + spoken.duration * n / count for n in range(count)] + [spoken.end]
            pieces += [Interval(*pair) for pair in itertools.pairwise(edges)]
        return pieces

    def cut(self, spoken: Interval, rate: int) -> Any:
        """The audio of an utterance `(N,)` with a little before and after it, at `rate`."""
        audio = self.episode.user_audio if self.side == "user" else self.episode.agent_audio
        first = max(self.start, spoken.start - _MARGIN_SECONDS)
        last = min(self.end, spoken.end + _MARGIN_SECONDS)
        source = self.episode.sample_rate
        return resample(audio[samples_in(first, source) : samples_in(last, source)], source, rate)


def _timed(result: Mapping[str, Any], spoken: Interval, origin: float) -> list[Word]:
    """What the pipeline gave for an utterance, as words with times from `origin`."""
    text = " ".join(str(result.get("text", "")).split())
    chunks = result.get("chunks")
    if not chunks:
        return [Word(text, spoken.start - origin, spoken.end - origin)] if text else []
    base = max(0.0, spoken.start - origin - _MARGIN_SECONDS)
    words = []
    for chunk in chunks:
        start, end = chunk["timestamp"]  # the end may be None where the model was cut off
        start = 0.0 if start is None else float(start)
        end = spoken.duration if end is None else float(end)
        if chunk["text"].strip():
            words.append(Word(chunk["text"].strip(), base + start, base + max(start, end)))
    return words


@functools.lru_cache(maxsize=4)
def load_recogniser(model: str, device: str, dtype: str) -> Any:
    """A pipeline, loaded once in a process.

    Raises:
        InputError: no such model, no safetensors in it, or it is not one for speech recognition.
    """
    import torch
    from transformers import pipeline

    try:
        return pipeline(
            "automatic-speech-recognition",
            model=model,
            device=torch.device(device),
            dtype=getattr(torch, dtype),
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise InputError(
            f"asr: model '{model}' cannot be loaded on {device} ({' '.join(str(error).split())[:300]}): "
            "give a hub id or a local folder of a speech recognition model in safetensors"
        ) from error


def make_transcriber(side: str, source: str, asr: Mapping[str, Any] | None) -> Transcriber:
    """The transcriber of a side by its name in the configuration.

    Args:
        side: `user` or `agent`.
        source: `corpus` (user), `inner_monologue` (agent), or `asr`.
        asr: options of `SpeechRecogniser`, of which `model` is needed.

    Raises:
        InputError: a source that the side does not have, or options that cannot be.
    """
    if (side, source) == ("user", "corpus"):
        return CorpusWords()
    if (side, source) == ("agent", "inner_monologue"):
        return InnerMonologue()
    if source != "asr":
        own = "corpus" if side == "user" else "inner_monologue"
        raise InputError(f"`{side}: {source}` is not known: choose {own} or asr")
    if not isinstance(asr, Mapping) or not asr.get("model"):
        raise InputError(f"`{side}: asr` needs a model: give `asr: {{model: <hub id or folder>}}`")
    known = set(SpeechRecogniser.__dataclass_fields__) - {"side", "_kept"}
    unknown = sorted(set(asr) - known)
    if unknown:
        raise InputError(f"asr: unknown option `{unknown[0]}`: the options are {', '.join(sorted(known))}")
    return SpeechRecogniser(side, **asr)
