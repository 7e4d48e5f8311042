"""Readers of corpora on disk: each finds recordings, their transcripts, and speech times where the corpus has them.

A new layout is one class here and its name in `rlhf_duplex.data.curate_options.FORMATS`.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from envs.audio import AUDIO_SUFFIXES
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval
from rlhf_duplex.data.conversation import read_alignments, without_overlap
from rlhf_duplex.data.recordings import Problem, Recording, Side

Transcript = tuple[list[Word], list[Word]]


class Corpus(Protocol):
    """A layout of files."""

    def matches(self, path: Path, files: list[Path]) -> bool:
        """Whether the corpus at `path` (with `files` under it, sorted) has this layout."""
        ...

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        """What there is, in an order that does not change, and what cannot be used."""
        ...

    def words(self, recording: Recording) -> Transcript:
        """What each side of a recording that has sidecars says, in order of time; empty where they hold none.

        An entry is a word, or a stretch of words where a corpus times no smaller ones.

        Raises:
            InputError: it is malformed.
        """
        ...

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        """The corpus' own speech times of both sides, of a recording that has sidecars; None where they hold none.

        Raises:
            InputError: they are malformed.
        """
        ...


def corpus_files(path: Path) -> list[Path]:
    """All files under a folder, or beside a file, sorted; hidden ones are left out.

    Raises:
        InputError: there is nothing at that path.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"corpus {path} does not exist: give a folder of recordings or a .jsonl that lists them")
    found: list[Path] = []
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to where it came from
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def find_corpus(path: Path, layout: str = "auto") -> tuple[str, list[Recording], list[Problem]]:
    """The recordings of a corpus.

    Args:
        path: a .jsonl or a folder.
        layout: one of `rlhf_duplex.data.curate_options.FORMATS`; `auto` takes the first that its files look like.

    Returns:
        The name of the layout, the recordings in order of their ids, and what cannot be used.

    Raises:
        InputError: nothing there, no recording of that layout, or two recordings of one name.
    """
    files = corpus_files(path)
    if layout == "auto":
        layout = next((name for name, corpus in CORPORA.items() if corpus.matches(path, files)), "")
        if not layout:
            raise InputError(
                f"{path} holds no recordings: give a moshi-finetune .jsonl, or a folder with stereo files "
                f"({', '.join(AUDIO_SUFFIXES[:6])}, ...), Seamless Interaction, Fisher or Candor"
            )
    found: dict[str, Recording] = {}
    problems: list[Problem] = []
    for item in CORPORA[layout].recordings(path, files):
        if isinstance(item, Problem):
            problems.append(item)
        elif any(not _is_text(path) for path in item.audio_paths + item.sidecars):
            shown = item.id.encode(errors="replace").decode()
            problems.append(Problem(shown, "its name, or a file's, is not UTF-8: rename it"))
        elif item.id in found:
            raise InputError(f"two recordings of {path} are called '{item.id}': rename one, or curate them apart")
        else:
            found[item.id] = item
    if not found:
        first = f"; the first thing that is wrong: {problems[0].recording}: {problems[0].message}" if problems else ""
        raise InputError(f"{path} holds no recording in the layout of {layout}{first}")
    return layout, [found[name] for name in sorted(found)], problems


def _is_text(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:  # bytes that are no text, which a manifest cannot name
        return False


def _identity(file: Path, root: Path) -> str:
    """Name of a recording: its path in the corpus without suffix."""
    base = root if root.is_dir() else root.parent
    return Path(os.path.relpath(file, base)).with_suffix("").as_posix()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def _times(start: Any, end: Any, where: str) -> tuple[float, float]:
    try:
        begun, ended = float(start), float(end)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {start!r} and {end!r} are not two times in seconds") from error
    if not (math.isfinite(begun) and math.isfinite(ended) and 0 <= begun <= ended):
        raise InputError(f"{where}: 0 <= start <= end is needed, found {start!r} and {end!r}")
    return begun, ended


def _words_apart(first: list[Word], second: list[Word]) -> Transcript:
    return without_overlap(first)[0], without_overlap(second)[0]


def _by_time(first: list[Word], second: list[Word]) -> Transcript:
    """Stretches of words, whose ends are what a person heard: they may overlap."""
    return sorted(first, key=lambda w: w.start), sorted(second, key=lambda w: w.start)


class _Stereo:
    """A folder of two-channel files, each a recording; a moshi-finetune sidecar is read where there is one."""

    _any_json_is_a_sidecar = False

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(file.suffix.lower() in AUDIO_SUFFIXES for file in files)

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        for file in files:
            if file.suffix.lower() in AUDIO_SUFFIXES:
                yield _one_file(file, _identity(file, path), _sidecar(file))

    def words(self, recording: Recording) -> Transcript:
        # moshi-finetune: left, side 0, is the main speaker; everybody else is on the right.
        (path,) = recording.sidecars
        if not self._any_json_is_a_sidecar:
            record = _read_json(path)
            if not isinstance(record, dict) or "alignments" not in record:
                return [], []
        return _words_apart(*read_alignments(path))

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        return None


def _one_file(
    file: Path,
    identity: str,
    sidecars: tuple[Path, ...] = (),
    speakers: tuple[str, str] | None = None,
    seconds: float | None = None,
) -> Recording:
    names = speakers or (f"{identity}#0", f"{identity}#1")
    return Recording(identity, (Side(file, 0, names[0]), Side(file, 1, names[1])), sidecars, seconds)


def _sidecar(file: Path) -> tuple[Path, ...]:
    """The .json of the same name."""
    path = file.with_suffix(".json")
    return (path,) if path.is_file() else ()


class _MoshiFinetune(_Stereo):
    """JSON Lines of `{"path", "duration"}`; left is the agent, right the user; words in a sidecar `.json`."""

    _any_json_is_a_sidecar = True

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(_lists_recordings(file) for file in files if file.suffix == ".jsonl")

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        lists = [path] if path.is_file() else [f for f in files if f.suffix == ".jsonl" and _lists_recordings(f)]
        seen = set()
        for listing in lists:
            for number, line in enumerate(listing.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    file = listing.parent / row["path"]
                    seconds = None if row.get("duration") is None else _times(0, row["duration"], "`duration`")[1]
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    message = (
                        str(error) if isinstance(error, InputError) else f'not {{"path", "duration"}}: {line[:60]}'
                    )
                    yield Problem(f"{listing.name}:{number}", message)
                    continue
                if file not in seen:
                    seen.add(file)
                    yield _one_file(file, _identity(file, path), _sidecar(file), None, seconds)


def _lists_recordings(path: Path) -> bool:
    """Whether the first line is one of moshi-finetune's."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and isinstance(row.get("path"), str)


_PARTICIPANT = re.compile(r"^(V\w+?)_(S\w+?)_(I\w+?)_(P\w+)$")


class _Seamless:
    """Seamless Interaction: a mono file a participant, paired by vendor, session and interaction, each with a .json."""

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(_PARTICIPANT.match(f.stem) and f.suffix.lower() in AUDIO_SUFFIXES for f in files)

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        pairs: dict[str, list[tuple[str, Path]]] = {}
        for file in files:
            named = _PARTICIPANT.match(file.stem)
            if named and file.suffix.lower() in AUDIO_SUFFIXES:
                pairs.setdefault("_".join(named.groups()[:3]), []).append((named.group(4), file))
        for identity, members in sorted(pairs.items()):
            members.sort()
            if len(members) != 2:
                names = ", ".join(file.name for _, file in members)
                yield Problem(identity, f"2 participants are needed, found {len(members)}: {names}")
                continue
            first, second = (Side(file, 0, person) for person, file in members)
            sidecars = [side.path.with_suffix(".json") for side in (first, second)]
            there = tuple(sidecar for sidecar in sidecars if sidecar.is_file())
            if len(there) == 1:
                missing = next(sidecar for sidecar in sidecars if sidecar not in there)
                yield Problem(identity, f"used without transcript and speech times: {missing.name} is missing")
            yield Recording(identity, (first, second), there if len(there) == 2 else ())

    def words(self, recording: Recording) -> Transcript:
        sides: Transcript = ([], [])
        for side, path in zip(sides, recording.sidecars, strict=False):
            for phrase in _listed(path, "metadata:transcript") or []:
                for row in phrase.get("words") or []:
                    if not isinstance(row, dict) or not isinstance(row.get("word"), str):
                        raise InputError(f"{path}: {row!r} is no word with its times")
                    # WhisperX, which made them, gives numerals no times.
                    if "start" in row and "end" in row:
                        side.append(Word(row["word"], *_times(row["start"], row["end"], str(path))))
        return _words_apart(*sides)

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        sides = []
        for path in recording.sidecars:
            rows = _listed(path, "metadata:vad")
            if rows is None:
                return None
            sides.append(sorted(Interval(*_times(row.get("start"), row.get("end"), str(path))) for row in rows))
        return (sides[0], sides[1]) if any(sides) else None


def _listed(path: Path, key: str) -> list[dict[str, Any]] | None:
    """A list of objects in a sidecar; None where it has no such key."""
    record = _read_json(path)
    if isinstance(record, dict) and key not in record:
        return None
    rows = record[key] if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no list `{key}` of objects with start and end")
    return rows


_FISHER = re.compile(r"^fe_03_\d{5}$")
_FISHER_LINE = re.compile(r"^\s*(\S+)\s+(\S+)\s+([AB])(?:-?\w*)?:\s*(.*)$")


class _Fisher(_Stereo):
    """Fisher: 8 kHz two-channel `.sph`, channel 0 speaker A; `fe_03_NNNNN.txt` anywhere; PINs from `*calldata.tbl`.

    A transcript's line is an utterance; it travels as one "word" with its times, since no finer ones are known.
    """

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(_FISHER.match(f.stem) or f.suffix.lower() == ".sph" for f in files)

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        texts = {f.stem: f for f in files if f.suffix == ".txt" and _FISHER.match(f.stem)}
        speakers = _fisher_speakers([f for f in files if f.name.endswith("calldata.tbl")])
        for file in files:
            if file.suffix.lower() == ".sph" or (_FISHER.match(file.stem) and file.suffix.lower() in AUDIO_SUFFIXES):
                text = texts.get(file.stem)
                yield _one_file(file, file.stem, (text,) if text else (), speakers.get(file.stem))

    def words(self, recording: Recording) -> Transcript:
        (path,) = recording.sidecars
        sides: Transcript = ([], [])
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            parts = _FISHER_LINE.match(line)
            if parts is None:
                raise InputError(f"{path}:{number}: not `start end A: words`: {line[:60]!r}")
            start, end, speaker, text = parts.groups()
            sides["AB".index(speaker)].append(Word(text.strip(), *_times(start, end, f"{path}:{number}")))
        return _by_time(*sides)


def _fisher_speakers(tables: list[Path]) -> dict[str, tuple[str, str]]:
    """PINs of speakers A and B by the name of their call."""
    found = {}
    for table in tables:
        with table.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                call, first, second = row.get("CALL_ID") or "", row.get("APIN"), row.get("BPIN")
                if first and second:
                    found[f"fe_03_{call.strip().zfill(5)}"] = (first.strip(), second.strip())
    return found


class _Candor:
    """Candor: a folder a conversation, whose `metadata.json` lists `speakers` with `channel` L or R.

    The audio is one file with both channels (the release's `processed/ID.mp3`), or a track a speaker named after its
    `user_id`; the words, as utterances, are in `transcription/transcript_audiophile.csv` (or backbiter, cliffhanger).
    """

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(f.name == "metadata.json" and _candor_speakers(f) for f in files)

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        folders: dict[Path, list[Path]] = {f.parent: [] for f in files if f.name == "metadata.json"}
        for file in files:
            home = next((parent for parent in file.parents if parent in folders), None)
            if home is not None:
                folders[home].append(file)
        for folder, own in sorted(folders.items()):
            identity = _identity(folder / "x", path).removesuffix("/x") if folder != path else folder.name
            users = _candor_speakers(folder / "metadata.json")
            if users is None:
                yield Problem(identity, f"{folder / 'metadata.json'} does not name two speakers with channels L and R")
                continue
            audio = [f for f in own if f.suffix.lower() in AUDIO_SUFFIXES]
            tracks = [[f for f in audio if f.stem == user or user in f.stem.split("_")] for user in users]
            names = ("transcript_audiophile.csv", "transcript_backbiter.csv", "transcript_cliffhanger.csv")
            texts = [f for name in names for f in own if f.name == name][:1]
            if all(len(track) == 1 for track in tracks):
                sides = (Side(tracks[0][0], 0, users[0]), Side(tracks[1][0], 0, users[1]))
                yield Recording(identity, sides, tuple(texts))
            elif len(audio) == 1:
                yield _one_file(audio[0], identity, tuple(texts), users)
            else:
                yield Problem(
                    identity,
                    f"one stereo file, or one track a speaker named {users[0]} and {users[1]}, is needed; found "
                    f"{len(audio)} audio files (video must be converted first, e.g. `ffmpeg -i X.mp4 X.wav`)",
                )

    def words(self, recording: Recording) -> Transcript:
        (path,) = recording.sidecars
        sides: Transcript = ([], [])
        speakers = {side.speaker: said for side, said in zip(recording.sides, sides, strict=True)}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), 2):
                    if row.get("speaker") not in speakers or row.get("utterance") is None:
                        raise InputError(
                            f"{path}:{number}: `speaker` and `utterance` of a speaker of metadata.json needed"
                        )
                    times = _times(row.get("start"), row.get("stop"), f"{path}:{number}")
                    speakers[row["speaker"]].append(Word(row["utterance"], *times))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a table of utterances ({error})") from error
        return _by_time(*sides)

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        return None


def _candor_speakers(path: Path) -> tuple[str, str] | None:
    """The ids of the speakers on channels L and R."""
    try:
        record = _read_json(path)
    except InputError:
        return None
    rows = record.get("speakers") if isinstance(record, dict) else None
    if not isinstance(rows, list):
        return None
    by_channel = {row.get("channel"): row.get("user_id") for row in rows if isinstance(row, dict)}
    left, right = by_channel.get("L"), by_channel.get("R")
    return (str(left), str(right)) if left and right and len(rows) == 2 else None


# The first that matches is taken, so the more particular ones come first.
CORPORA: dict[str, Corpus] = {
    "moshi-finetune": _MoshiFinetune(),
    "seamless": _Seamless(),
    "fisher": _Fisher(),
    "candor": _Candor(),
    "stereo": _Stereo(),
}
