"""Fisher."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from envs.audio import AUDIO_SUFFIXES
from envs.episode import Word
from envs.errors import InputError
from rlhf_duplex.data.corpora.layout import (
    Transcript,
    by_time,
    one_file,
    times_of,
    unread,
)
from rlhf_duplex.data.corpora.stereo import Stereo
from rlhf_duplex.data.recordings import Problem, Recording

_FISHER = re.compile(r"^fe_03_\d{5}$")
_FISHER_LINE = re.compile(r"^\s*(\S+)\s+(\S+)\s+([AB])(?:-?\w*)?:\s*(.*)$")


class Fisher(Stereo):
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
                yield one_file(file, file.stem, (text,) if text else (), speakers.get(file.stem))
        yield from unread((file for file in files if _FISHER.match(file.stem)), path)

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
            sides["AB".index(speaker)].append(Word(text.strip(), *times_of(start, end, f"{path}:{number}")))
        return by_time(*sides)


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
