"""Reading and writing audio: one channel of a recording, checked, at the sample rate that is asked for."""

import math
from pathlib import Path

import numpy as np
import soundfile

from envs.errors import InputError
from envs.files import replacing
from envs.frames import samples_in
from envs.mp3 import seconds_too_long

# Of the formats that libsndfile reads, the endings by which a folder is searched for recordings.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".au", ".w64", ".caf")
# Those of recordings in formats that it does not read.
UNREAD_SUFFIXES = (".m4a", ".mp4", ".webm", ".aac", ".wma", ".amr", ".mkv", ".mov")

# Seconds by which a header may promise too much: of an mp3 that does not say how long it is, libsndfile takes the bytes
# for audio, and so counts the decoder's delay (0.06 s at 44.1 kHz) and a tag at its end in.
_PROMISED = 0.25


def conversion(path: Path) -> str:
    """What to do about a recording that libsndfile does not read."""
    return f"libsndfile does not read {path.suffix}: ffmpeg -i {path.name} {path.stem}.flac"


def audio_info(path: Path) -> tuple[int, int, float]:
    """Sample rate (Hz), number of channels and duration (s) of an audio file.

    Raises:
        InputError: there is no such file, libsndfile cannot read it, or it only guesses how long it is.
    """
    if not path.is_file():
        raise InputError(f"recording {path} does not exist: check the manifest's `recording` paths")
    if path.suffix.lower() in UNREAD_SUFFIXES:
        raise InputError(f"recording {path} cannot be read as audio: {conversion(path)}")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless .raw file
        raise InputError(f"recording {path} cannot be read as audio ({error}): is it corrupt or empty?") from error
    too_long = seconds_too_long(path) if info.format == "MP3" else 0.0
    if too_long is None:
        raise InputError(
            f"recording {path} is an mp3 that does not say how long it is (no Xing header): its length is a guess: "
            f"convert it to FLAC (ffmpeg -i {path.name} {path.stem}.flac)"
        )
    return info.samplerate, info.channels, info.frames / info.samplerate - too_long


def check_length(path: Path, there: float, promised: float) -> None:
    """Hold what was read of a recording, in seconds from its beginning, against what its header says.

    libsndfile reads a truncated mp3 in silence up to where it ends.

    Raises:
        InputError: it is truncated.
    """
    if there < promised - _PROMISED:
        raise InputError(
            f"recording {path} is truncated: {there:.1f} of {promised:.1f} s are there: get it again, or convert what "
            "is there"
        )


def read_audio(
    path: Path,
    channel: int,
    sample_rate: int,
    start: float = 0.0,
    end: float | None = None,
    channels: int = 2,
) -> np.ndarray:
    """One channel of a recording between two moments, mono float32 `(N,)` at `sample_rate`.

    Args:
        path: any format that libsndfile reads, at any sample rate.
        channel: index of the channel, from 0.
        sample_rate: Hz of the result; resampled with soxr where the file has another.
        start, end: seconds in the recording; `end=None` reads to the end.
        channels: how many channels the file must at least have (2 for a dialogue).

    Raises:
        InputError: missing, corrupt, truncated, empty or non-finite audio, too few channels, a channel or a time out of
            range.
    """
    rate, found, duration = audio_info(path)
    if found < channels:
        raise InputError(
            f"recording {path} has {found} channel(s), {channels} are needed (one a speaker): "
            "give a file with the two speakers on separate channels"
        )
    if not 0 <= channel < found:
        raise InputError(f"channel {channel} of {path} is out of range: the file has channels 0 to {found - 1}")
    end = duration if end is None else end
    # A manifest rounds times to milliseconds, so the end may lie a hair beyond the last sample.
    if not (0 <= start < end <= duration + 0.05):
        raise InputError(f"{start:.3f}-{end:.3f} s lies outside {path}, which lasts {duration:.3f} s")
    try:
        data, _ = soundfile.read(
            str(path),
            start=samples_in(start, rate),
            frames=samples_in(end - start, rate),
            dtype="float32",
            always_2d=True,
        )
    except soundfile.LibsndfileError as error:
        raise InputError(f"recording {path} cannot be read at {start:.3f} s ({error}): is it truncated?") from error
    if start + len(data) / rate < min(end, duration) - _PROMISED:
        # Nothing at all: the end lies before `start`, and reading from the beginning is what tells where.
        there = start + len(data) / rate if len(data) else _seconds_there(path)
        check_length(path, there, duration)
    audio = np.ascontiguousarray(data[:, channel])
    if audio.size == 0:
        raise InputError(f"recording {path} holds no audio between {start:.3f} and {end:.3f} s: is it truncated?")
    if not np.isfinite(audio).all():
        raise InputError(f"recording {path} holds NaN or infinite samples on channel {channel}: repair or remove it")
    return resample(audio, rate, sample_rate)


def _seconds_there(path: Path) -> float:
    """Seconds that can be decoded of a recording, whatever its header says."""
    with soundfile.SoundFile(str(path)) as file:
        samples = 0
        while found := len(file.read(file.samplerate * 30, dtype="float32")):
            samples += found
        return samples / file.samplerate


def resample(audio: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """`(..., N)` float32 audio at another rate (soxr, high quality): `(..., ceil(N * target_rate / source_rate))`."""
    if source_rate == target_rate or not audio.size:
        return audio
    import soxr

    wanted = math.ceil(audio.shape[-1] * (target_rate / source_rate))
    rows = [soxr.resample(row, source_rate, target_rate, quality="HQ") for row in audio.reshape(-1, audio.shape[-1])]
    found = np.stack(rows)[:, :wanted]
    found = np.pad(found, ((0, 0), (0, wanted - found.shape[1])))
    return found.reshape(*audio.shape[:-1], wanted).astype(np.float32, copy=False)


def write_audio(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write `(N,)` or `(N, channels)` audio, all or nothing.

    16-bit FLAC: lossless for everything that came from 16-bit audio, and half the size of WAV.
    """
    with replacing(path) as temporary:
        soundfile.write(str(temporary), np.clip(audio, -1.0, 1.0), sample_rate, format=path.suffix[1:])
