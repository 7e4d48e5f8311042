"""A folder of two-channel files, and the list of such files that moshi-finetune trains on."""

import json
from collections.abc import Iterator
from pathlib import Path

from envs.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES
from envs.errors import InputError
from envs.speech import Interval
from rlhf_duplex.data.conversation import read_alignments
from rlhf_duplex.data.corpora.layout import (
    Transcript,
    identity_of,
    one_file,
    read_json,
    sidecar_of,
    times_of,
    unread,
    words_apart,
)
from rlhf_duplex.data.recordings import Problem, Recording


class Stereo:
    """A folder of two-channel files, each a recording; a moshi-finetune sidecar is read where there is one."""

    _any_json_is_a_sidecar = False

    def matches(self, path: Path, files: list[Path]) -> bool:
        return any(file.suffix.lower() in (*AUDIO_SUFFIXES, *UNREAD_SUFFIXES) for file in files)

    def recordings(self, path: Path, files: list[Path]) -> Iterator[Recording | Problem]:
        for file in files:
            if file.suffix.lower() in AUDIO_SUFFIXES:
                yield one_file(file, identity_of(file, path), sidecar_of(file))
        yield from unread(files, path)

    def words(self, recording: Recording) -> Transcript:
        # moshi-finetune: left, side 0, is the main speaker; everybody else is on the right.
        (path,) = recording.sidecars
        if not self._any_json_is_a_sidecar:
            record = read_json(path)
            if not isinstance(record, dict) or "alignments" not in record:
                return [], []
        return words_apart(*read_alignments(path))

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        return None


class MoshiFinetune(Stereo):
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
                    seconds = None if row.get("duration") is None else times_of(0, row["duration"], "`duration`")[1]
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    message = (
                        str(error) if isinstance(error, InputError) else f'not {{"path", "duration"}}: {line[:60]}'
                    )
                    yield Problem(f"{listing.name}:{number}", message)
                    continue
                if file not in seen:
                    seen.add(file)
                    yield one_file(file, identity_of(file, path), sidecar_of(file), None, seconds)


def _lists_recordings(path: Path) -> bool:
    """Whether the first line is one of moshi-finetune's."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and isinstance(row.get("path"), str)
