"""Candor."""

import csv
from collections.abc import Iterator
from pathlib import Path

from envs.audio import AUDIO_SUFFIXES
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval
from rlhf_duplex.data.corpora.layout import (
    Transcript,
    by_time,
    identity_of,
    one_file,
    read_json,
    times_of,
)
from rlhf_duplex.data.recordings import Problem, Recording, Side


class Candor:
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
            identity = identity_of(folder / "x", path).removesuffix("/x") if folder != path else folder.name
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
                yield one_file(audio[0], identity, tuple(texts), users)
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
                    times = times_of(row.get("start"), row.get("stop"), f"{path}:{number}")
                    speakers[row["speaker"]].append(Word(row["utterance"], *times))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a table of utterances ({error})") from error
        return by_time(*sides)

    def speech(self, recording: Recording) -> tuple[list[Interval], list[Interval]] | None:
        return None


def _candor_speakers(path: Path) -> tuple[str, str] | None:
    """The ids of the speakers on channels L and R."""
    try:
        record = read_json(path)
    except InputError:
        return None
    rows = record.get("speakers") if isinstance(record, dict) else None
    if not isinstance(rows, list):
        return None
    by_channel = {row.get("channel"): row.get("user_id") for row in rows if isinstance(row, dict)}
    left, right = by_channel.get("L"), by_channel.get("R")
    return (str(left), str(right)) if left and right and len(rows) == 2 else None
