"""Seamless Interaction."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envs.audio import AUDIO_SUFFIXES
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval
from rlhf_duplex.data.corpora.layout import Transcript, read_json, times_of, unread, words_apart
from rlhf_duplex.data.recordings import Problem, Recording, Side

_PARTICIPANT = re.compile(r"^(V\w+?)_(S\w+?)_(I\w+?)_(P\w+)$")


class Seamless:
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
        yield from unread((file for file in files if _PARTICIPANT.match(file.stem)), path)

    def words(self, recording: Recording) -> Transcript:
        sides: Transcript = ([], [])
        for side, path in zip(sides, recording.sidecars, strict=False):
            for phrase in _listed(path, "metadata:transcript") or []:
                for row in phrase.get("words") or []:
                    if not isinstance(row, dict) or not isinstance(row.get("word"), str):
                        raise InputError(f"{path}: {row!r} is no word with its times")
                    # WhisperX, which made them, gives numerals no times.
                    if "start" in row and "end" in row:
                        side.append(Word(row["word"], *times_of(row["start"], row["end"], str(path))))
        return words_apart(*sides)

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        sides = []
        for path in recording.sidecars:
            rows = _listed(path, "metadata:vad")
            if rows is None:
                return None
            sides.append(sorted(Interval(*times_of(row.get("start"), row.get("end"), str(path))) for row in rows))
        return (sides[0], sides[1]) if any(sides) else None


def _listed(path: Path, key: str) -> list[dict[str, Any]] | None:
    """A list of objects in a sidecar; None where it has no such key."""
    record = read_json(path)
    if isinstance(record, dict) and key not in record:
        return None
    rows = record[key] if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no list `{key}` of objects with start and end")
    return rows
