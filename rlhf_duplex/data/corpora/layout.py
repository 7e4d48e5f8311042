"""What a layout of files has to offer, and what several of them share."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from envs.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES, conversion
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval
from rlhf_duplex.data.conversation import without_overlap
from rlhf_duplex.data.recordings import Problem, Recording, Side, Unread

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


def identity_of(file: Path, root: Path) -> str:
    """Name of a recording: its path in the corpus without suffix."""
    base = root if root.is_dir() else root.parent
    return Path(os.path.relpath(file, base)).with_suffix("").as_posix()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def unread(files: Iterable[Path], root: Path) -> Iterator[Unread]:
    """The files that would be recordings if libsndfile read them; not those of which there is a recording.

    It has the same name, in whatever folder of the corpus: videos often lie apart from their sound.
    """
    files = list(files)
    converted = {file.stem for file in files if file.suffix.lower() in AUDIO_SUFFIXES}
    for file in files:
        if file.suffix.lower() in UNREAD_SUFFIXES and file.stem not in converted:
            yield Unread(identity_of(file, root), conversion(file))


def times_of(start: Any, end: Any, where: str) -> tuple[float, float]:
    try:
        begun, ended = float(start), float(end)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {start!r} and {end!r} are not two times in seconds") from error
    if not (math.isfinite(begun) and math.isfinite(ended) and 0 <= begun <= ended):
        raise InputError(f"{where}: 0 <= start <= end is needed, found {start!r} and {end!r}")
    return begun, ended


def words_apart(first: list[Word], second: list[Word]) -> Transcript:
    return without_overlap(first)[0], without_overlap(second)[0]


def by_time(first: list[Word], second: list[Word]) -> Transcript:
    """Stretches of words, whose ends are what a person heard: they may overlap."""
    return sorted(first, key=lambda w: w.start), sorted(second, key=lambda w: w.start)


def one_file(
    file: Path,
    identity: str,
    sidecars: tuple[Path, ...] = (),
    speakers: tuple[str, str] | None = None,
    seconds: float | None = None,
) -> Recording:
    names = speakers or (f"{identity}#0", f"{identity}#1")
    return Recording(identity, (Side(file, 0, names[0]), Side(file, 1, names[1])), sidecars, seconds)


def sidecar_of(file: Path) -> tuple[Path, ...]:
    """The .json of the same name."""
    path = file.with_suffix(".json")
    return (path,) if path.is_file() else ()
