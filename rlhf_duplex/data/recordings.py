"""A two-speaker recording of a corpus: where its sides are, who speaks, and whether its files are whole."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import soundfile

from envs.audio import audio_info
from envs.errors import InputError


class Side(NamedTuple):
    """One speaker of a recording: an audio file, a channel of it, and who it is (unique in the corpus)."""

    path: Path
    channel: int
    speaker: str


@dataclass(frozen=True)
class Recording:
    """Two people talking, on one clock.

    Attributes:
        id: unique in its corpus, and the same on every machine.
        sides: both speakers, on two channels of one file or in two mono files.
        sidecars: files that its transcript, and speech times if the corpus has any, are in; empty without them.
        seconds: how long the corpus says that it lasts, or None.
    """

    id: str
    sides: tuple[Side, Side]
    sidecars: tuple[Path, ...] = ()
    seconds: float | None = None

    @property
    def is_split(self) -> bool:
        """Whether each speaker has a file."""
        return self.sides[0].path != self.sides[1].path

    @property
    def audio_paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(side.path for side in self.sides))


class Problem(NamedTuple):
    """Something of a corpus that cannot be used, or not wholly: which, and why."""

    recording: str
    message: str


class Unread(Problem):
    """A file of a format that is not read: often a video beside a corpus' recordings, so that it is only mentioned."""


def check_recording(recording: Recording, tolerance: float) -> float:
    """Seconds of a recording whose headers are as they should be.

    Raises:
        InputError: a file is missing, unreadable, truncated, lacks a channel, or lasts more than `tolerance` seconds
            longer or shorter than the other or than the corpus says.
    """
    durations = []
    for path in recording.audio_paths:
        _, channels, duration = _info(path)
        if recording.is_split and channels != 1:
            raise InputError(f"{path} has {channels} channels, 1 is needed: each speaker has a file in this corpus")
        if not recording.is_split and channels < 2:
            raise InputError(f"{path} has 1 channel, 2 are needed (one a speaker)")
        _check_whole(path)
        if duration <= 0:
            raise InputError(f"{path} holds no audio")
        durations.append(duration)
    shortest, longest = min(durations), max(durations)
    if longest - shortest > tolerance:
        share = 1e6 * (longest - shortest) / longest
        raise InputError(
            f"{recording.audio_paths[0].name} lasts {durations[0]:.2f} s and {recording.audio_paths[1].name} "
            f"{durations[1]:.2f} s ({share:.0f} ppm apart): their clocks drift or one is truncated; bring them onto "
            "one clock, or raise --length-tolerance"
        )
    if recording.seconds is not None and shortest < recording.seconds - tolerance:
        raise InputError(
            f"{recording.audio_paths[0]} lasts {shortest:.2f} s, {recording.seconds:.2f} s according to its corpus: "
            "it is truncated, or not the file that is meant"
        )
    return shortest


def _info(path: Path) -> tuple[int, int, float]:
    try:
        return audio_info(path)
    except InputError:
        if path.is_file() and b"embedded-shorten" in path.open("rb").read(1024):
            raise InputError(
                f"{path} is compressed with shorten, which libsndfile does not read: "
                "convert it first, for example with `sph2pipe -f wav in.sph out.wav`"
            ) from None
        raise


def _check_whole(path: Path) -> None:
    """A file that ends before its own header says.

    libsndfile reads such files in silence up to where they end; a FLAC it finds out about only when it decodes it.
    """
    info = soundfile.info(str(path), verbose=True)
    if info.format == "NIST":
        header = re.search(rb"sample_count -i (\d+)", path.open("rb").read(1024))
        promised = int(header.group(1)) if header else info.frames
        if info.frames < promised:
            raise InputError(f"{path} is truncated: {info.frames} of {promised} samples a channel are there")
    chunk = re.search(r"^data : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    # A writer that could not go back to fill in the size leaves 0 or the largest number there is.
    if chunk and int(chunk.group(2)) < int(chunk.group(1)) < 0xFFFFFF00:
        raise InputError(f"{path} is truncated: {chunk.group(2)} of {chunk.group(1)} bytes of audio are there")
    if "lacks an end-of-stream bit" in info.extra_info:
        raise InputError(f"{path} is truncated: its Ogg stream does not end")


_SAMPLED_BLOCKS, _BLOCK_BYTES = 16, 4096
# Keys of a line that name a file: of manifests, lists of recordings and pairs.
_NAMING = ("recording", "agent_recording", "path", "shard")


def named_files(listing: Path) -> tuple[Path, ...]:
    """The files that lines of a `.jsonl` name and that are there: recordings, words beside them, shards of pairs."""
    found: dict[str, None] = {}
    for line in listing.read_text(encoding="utf-8-sig", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:  # an empty line, or what the command that reads it will name
            continue
        for key in _NAMING if isinstance(row, dict) else ():
            if isinstance(row.get(key), str):
                path = os.path.join(listing.parent, row[key])
                found[path] = None
                if key == "path":
                    found[os.path.splitext(path)[0] + ".json"] = None
    return tuple(Path(path) for path in found if os.path.isfile(path))  # a text is too long for a Path


def files_fingerprint(paths: tuple[Path, ...], times: bool = True) -> str:
    """What tells files from other ones: their sizes, times of change, and some of their content.

    Reading all of a corpus anew to find out that it was done already would cost hours.

    Args:
        paths: of the files.
        times: whether a file that was written anew counts as another: not where data may have been copied since.

    Raises:
        InputError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                changed = f":{status.st_mtime_ns}" if times else ""
                digest.update(f"{path.name}:{status.st_size}{changed};".encode(errors="surrogateescape"))
                step = max(_BLOCK_BYTES, status.st_size // _SAMPLED_BLOCKS)
                for position in range(0, status.st_size, step):
                    file.seek(position)
                    digest.update(file.read(_BLOCK_BYTES))
                file.seek(max(0, status.st_size - _BLOCK_BYTES))
                digest.update(file.read(_BLOCK_BYTES))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from error
    return digest.hexdigest()
