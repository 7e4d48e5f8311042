"""Logged conversations in the layout of moshi-finetune: stereo audio, left agent and right user, words beside it.

A corpus is a JSON Lines file of `{"path": ..., "duration": ...}` (paths relative to it; logs of replayed users have
`source`, too, the user's recording), or a folder: with one such file in it, or simply with stereo files. Beside
`x.wav` lies `x.json`::

    {"alignments": [["hello", [0.52, 0.81], "SPEAKER_MAIN"], ...]}

`SPEAKER_MAIN` is the agent, any other speaker the user. Times are seconds.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.audio import AUDIO_SUFFIXES, audio_info, read_audio, write_audio
from envs.episode import Word
from envs.errors import InputError
from envs.files import read_json_lines, write_text
from envs.speech import Interval

AGENT_CHANNEL, USER_CHANNEL = 0, 1
AGENT_LABEL, USER_LABEL = "SPEAKER_MAIN", "SPEAKER_USER"
LENGTH_TOLERANCE = 0.5  # seconds by which announced and real lengths may differ
SPEECH_MARGIN = 0.5  # seconds beside detected speech that still count as it, when words are held against the audio
LEAST_FIT = 0.5  # share of a speaker's words that must lie in their speech, in every third of the dialogue
LEAST_WORDS = 6  # in a third, for its share to mean anything


@dataclass(frozen=True)
class Entry:
    """A line of a corpus.

    Attributes:
        id: the path without its suffix.
        path: where the audio is.
        duration: how long it is said to be, seconds, or None.
        source: recording that the user in it was replayed from, where that is so: logs of one are of one user.
    """

    id: str
    path: Path
    duration: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One logged dialogue, read.

    Attributes:
        id: of its corpus entry.
        path: of the audio file.
        agent_audio, user_audio: `(N,)` float32 at `sample_rate`.
        sample_rate: Hz.
        agent_words, user_words: in time order; no word runs into the next of the same speaker.
        clipped: words whose end was taken back because the next word began before it.
    """

    id: str
    path: Path
    agent_audio: np.ndarray
    user_audio: np.ndarray
    sample_rate: int
    agent_words: tuple[Word, ...]
    user_words: tuple[Word, ...]
    clipped: int = 0

    @property
    def duration(self) -> float:
        return len(self.agent_audio) / self.sample_rate


def read_corpus(path: Path) -> list[Entry]:
    """What a corpus holds; no audio is opened.

    Raises:
        InputError: there is nothing of that name, it is empty, or a line is wrong (with its number).
    """
    path = Path(path)
    if path.is_dir():
        lists = [found for found in sorted(path.glob("*.jsonl")) if _is_list(found)]
        if len(lists) > 1:
            names = ", ".join(p.name for p in lists)
            raise InputError(f"corpus {path} holds {len(lists)} lists ({names}): name the one to read")
        if not lists:
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
            if not found:
                raise InputError(f"corpus {path} is empty: give a folder of stereo recordings or a JSON Lines list")
            entries = [Entry(p.relative_to(path).with_suffix("").as_posix(), p) for p in found]
            paths: dict[str, Path] = {}
            for entry in entries:
                other = paths.setdefault(entry.id, entry.path)
                if other != entry.path:
                    raise InputError(f"corpus {path} has {other.name} and {entry.path.name} of one name: rename one")
            return entries
        path = lists[0]
    hint = "give a folder or a JSON Lines list of recordings"
    return read_json_lines(path, "corpus", hint, lambda row: _parse_entry(row, path.parent))


def _parse_entry(row: Any, folder: Path) -> Entry:
    if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
        raise InputError('a line must be such as {"path": "a.wav", "duration": 12.3}')
    duration = row.get("duration")
    if duration is not None and not _seconds(duration):
        raise InputError(f"`duration` must be seconds, found {duration!r}")
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise InputError(f"`source` must be a recording's path, found {source!r}")
    return Entry(Path(row["path"]).with_suffix("").as_posix(), folder / row["path"], duration, source)


def _is_list(path: Path) -> bool:
    """Whether a file lists recordings, or at least is no JSON Lines of another kind (a manifest, pairs)."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError):
        return True  # and is then told what is wrong with it
    return not isinstance(row, dict) or not row or "path" in row


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def recorded_seconds(entry: Entry) -> float:
    """How long an entry's recording is said to last, by the list or its own header; 0 where neither can be read."""
    try:
        return entry.duration or audio_info(entry.path)[2]
    except InputError:
        return 0.0


def read_conversation(entry: Entry, sample_rate: int) -> Conversation:
    """Audio and words of an entry, checked against each other's length.

    Raises:
        InputError: audio that is missing, truncated, of one channel or not of the announced length; a sidecar that is
            missing, malformed or with words beyond the end of the audio.
    """
    _, _, duration = audio_info(entry.path)
    if entry.duration is not None and abs(entry.duration - duration) > LENGTH_TOLERANCE:
        raise InputError(
            f"recording {entry.path} lasts {duration:.2f} s, {entry.duration:.2f} s are announced: is it truncated?"
        )
    agent, user = (read_audio(entry.path, channel, sample_rate) for channel in (AGENT_CHANNEL, USER_CHANNEL))
    agent_words, user_words, clipped = read_words(entry.path.with_suffix(".json"), duration)
    return Conversation(entry.id, entry.path, agent, user, sample_rate, agent_words, user_words, clipped)


def read_words(path: Path, duration: float) -> tuple[tuple[Word, ...], tuple[Word, ...], int]:
    """Words of agent and user from a sidecar, and how many ends were clipped to the next word's start.

    Raises:
        InputError: see `read_conversation`.
    """
    if not path.is_file():
        raise InputError(f"transcript {path} does not exist: a recording needs its words with times beside it")
    sides = read_alignments(path)
    for word in sides[0] + sides[1]:
        if word.end > duration + LENGTH_TOLERANCE:
            raise InputError(
                f"transcript {path}: '{word.text}' ends at {word.end:.2f} s, the recording at "
                f"{duration:.2f} s: is the audio truncated, or the transcript another's?"
            )
    (agent, agent_clipped), (user, user_clipped) = map(without_overlap, sides)
    return tuple(agent), tuple(user), agent_clipped + user_clipped


def read_alignments(path: Path) -> tuple[list[Word], list[Word]]:
    """Words of the agent, and of everybody else, in a sidecar's order and as long as it says.

    Raises:
        InputError: the file cannot be read or is malformed.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"transcript {path} is not valid JSON ({error})") from error
    rows = record.get("alignments") if isinstance(record, dict) else None
    if not isinstance(rows, list):
        raise InputError(f'transcript {path} must be {{"alignments": [[word, [start, end], speaker], ...]}}')
    sides: tuple[list[Word], list[Word]] = ([], [])
    for index, row in enumerate(rows):
        word, speaker = _parse_word(row, f"transcript {path}, alignments[{index}]")
        if word.text:
            sides[speaker != AGENT_LABEL].append(word)
    return sides


def _parse_word(row: Any, place: str) -> tuple[Word, str]:
    shape = isinstance(row, list) and len(row) == 3 and isinstance(row[1], list) and len(row[1]) == 2
    if not shape or not isinstance(row[0], str) or not isinstance(row[2], str) or not all(map(_seconds, row[1])):
        raise InputError(f'{place}: must be ["word", [start, end], "SPEAKER"] in seconds, found {row!r}')
    start, end = map(float, row[1])
    if end < start:
        raise InputError(f"{place}: '{row[0]}' ends at {end} s, before it starts at {start} s")
    return Word(row[0].strip(), start, end), row[2]


def without_overlap(words: Iterable[Word]) -> tuple[list[Word], int]:
    """One speaker's words in order of time, each ended where the next begins, and how many had to be.

    Aligners let neighbours overlap by some hundredths; which of them the voice is then in, nobody knows.
    """
    ordered = sorted(words, key=lambda word: (word.start, word.end, word.text))
    clipped = 0
    for index, following in enumerate(ordered[1:]):
        if ordered[index].end > following.start + 1e-6:
            ordered[index] = ordered[index]._replace(end=following.start)
            clipped += 1
    return ordered, clipped


def check_words(conversation: Conversation, agent: Sequence[Interval], user: Sequence[Interval]) -> None:
    """Hold both speakers' words against their detected speech.

    In every third of the dialogue at least half of a speaker's words (where there are six or more) must lie in or
    within half a second of their speech. Channels that were swapped, a clock that drifts and another file's transcript
    all fail. A log without any word is one of an agent that says nothing: speech of the agent is at odds with it.

    Raises:
        InputError: they do not fit.
    """
    if agent and not conversation.agent_words and not conversation.user_words:
        said = sum(i.end - i.start for i in agent)
        raise InputError(
            f"transcript {Path(conversation.path).with_suffix('.json')} holds no word, and {said:.1f} s of speech are "
            "on the agent's channel (the left one): transcribe it, or is the channel right?"
        )
    sides = (("agent", conversation.agent_words, agent), ("user", conversation.user_words, user))
    for name, words, speech in sides:
        for third in range(3):
            begin, end = (conversation.duration * (third + step) / 3 for step in (0, 1))
            middles = [(w.start + w.end) / 2 for w in words if begin <= w.start < end]
            if len(middles) < LEAST_WORDS:
                continue
            fits = [any(i.start - SPEECH_MARGIN <= m <= i.end + SPEECH_MARGIN for i in speech) for m in middles]
            share = sum(fits) / len(fits)
            if share < LEAST_FIT:
                raise InputError(
                    f"recording {conversation.path}: only {share:.0%} of the {name}'s words between {begin:.0f} and "
                    f"{end:.0f} s lie in the {name}'s speech: are channels swapped (left must be the agent), does a "
                    "clock drift, or is the transcript another's?"
                )


def write_conversation(
    path: Path,
    agent_audio: np.ndarray,
    user_audio: np.ndarray,
    sample_rate: int,
    agent_words: Sequence[Word],
    user_words: Sequence[Word],
) -> Entry:
    """Write a dialogue in this layout: `path` (stereo) and the `.json` beside it."""
    length = max(len(agent_audio), len(user_audio))
    stereo = np.zeros((length, 2), dtype=np.float32)
    stereo[: len(agent_audio), AGENT_CHANNEL] = agent_audio
    stereo[: len(user_audio), USER_CHANNEL] = user_audio
    said = [(word, AGENT_LABEL) for word in agent_words] + [(word, USER_LABEL) for word in user_words]
    said.sort(key=lambda entry: entry[0].start)
    rows = [[word.text, [round(word.start, 3), round(word.end, 3)], label] for word, label in said]
    write_audio(path, stereo, sample_rate)
    write_text(path.with_suffix(".json"), json.dumps({"alignments": rows}, ensure_ascii=False) + "\n")
    return Entry(path.with_suffix("").name, path, length / sample_rate)
