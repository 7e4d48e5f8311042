"""Speech synthesis: one agent voice and many user voices, all as float32 at 8 kHz.

`hibari-tts` carries one voice in its package. Played at another speed it gives further voices (the whole spectrum
moves, as with a longer or shorter vocal tract). `flite` and `espeak-ng` (Debian packages) give the rest.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import soxr

SAMPLE_RATE = 8000
SPEECH_LEVEL = 0.08  # root mean square of a synthesised piece before any gain
SILENCE_LEVEL = 0.02  # a 10 ms block below this share of the loudest counts as silence when trimming


@dataclass(frozen=True)
class Voice:
    """A way of speaking. shift: pitch and formants relative to the engine's voice; pace: words a second, relative."""

    engine: str
    name: str
    shift: float = 1.0
    pace: float = 1.0


AGENT = Voice("hibari", "heart")
TRAIN_USERS = (
    Voice("hibari", "heart", 0.72, 1.0), Voice("hibari", "heart", 0.76, 1.1), Voice("hibari", "heart", 0.84, 0.95),
    Voice("hibari", "heart", 0.88, 1.1), Voice("hibari", "heart", 1.14, 1.0),
    Voice("flite", "slt"), Voice("flite", "slt", 0.86, 1.1), Voice("flite", "slt", 1.1, 1.0),
    Voice("flite", "rms", 1.0, 1.15), Voice("flite", "rms", 1.12, 1.05), Voice("flite", "rms", 1.22, 1.15),
    Voice("flite", "kal16", 1.0, 1.0), Voice("flite", "kal16", 1.2, 1.0),
    Voice("espeak", "en-us+m3"), Voice("espeak", "en-us+f2"), Voice("espeak", "en-gb+m7"), Voice("espeak", "en-gb+f4"),
    Voice("espeak", "en-us+klatt2"), Voice("espeak", "en-gb-scotland+m1"),
)  # fmt: skip
HELD_OUT_USERS = (
    Voice("hibari", "heart", 0.80, 1.05), Voice("hibari", "heart", 0.92, 1.0),
    Voice("flite", "awb", 1.0, 1.0), Voice("flite", "awb", 1.15, 0.95), Voice("flite", "slt", 0.93, 1.0),
    Voice("espeak", "en-us+f3"), Voice("espeak", "en-us+m5"),
)  # fmt: skip


def check_tools() -> None:
    """Stop with one line when a synthesiser is missing."""
    missing = [tool for tool in ("espeak-ng", "flite") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"nano needs {' and '.join(missing)} for its user voices: apt-get install {' '.join(missing)}")


def say(text: str, voice: Voice, seed: int = 0) -> np.ndarray:
    """Speech of `text` without leading or trailing silence. Returns float32 [N] at `SAMPLE_RATE`."""
    engine = {"hibari": _hibari, "flite": _flite, "espeak": _espeak}[voice.engine]
    # Shifting by r also slows by r: ask the engine for the pace that undoes it.
    audio, rate = engine(text, voice, voice.pace / voice.shift, seed)
    audio = soxr.resample(audio.astype(np.float32), rate * voice.shift, SAMPLE_RATE)
    audio = trim(audio - audio.mean())
    return (audio * (SPEECH_LEVEL / (np.sqrt(np.mean(audio**2)) + 1e-6))).astype(np.float32)


def trim(audio: np.ndarray) -> np.ndarray:
    """Cut silence at both ends (10 ms blocks)."""
    block = SAMPLE_RATE // 100
    count = len(audio) // block
    level = np.sqrt(np.mean(audio[: count * block].reshape(count, block) ** 2, axis=1))
    loud = np.flatnonzero(level > SILENCE_LEVEL * level.max())
    return audio[loud[0] * block : (loud[-1] + 1) * block]


def word_times(text: str, start: float, end: float) -> list[tuple[str, float, float]]:
    """Words with their times, the stretch [start, end] (seconds) shared out by the number of letters."""
    words = text.split()
    weights = np.array([2.0 + len(word.strip(".,?!")) + (2.0 if word[-1] in ".,?!" else 0.0) for word in words])
    edges = start + (end - start) * np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    return [(word.strip(".,?!"), float(s), float(e)) for word, s, e in zip(words, edges, edges[1:], strict=False)]


@functools.cache
def _hibari_model():
    from hibari import Hibari

    return Hibari()


def _hibari(text: str, voice: Voice, speed: float, seed: int) -> tuple[np.ndarray, int]:
    model = _hibari_model()
    return model(text, speed=float(np.clip(speed, 0.5, 2.0)), seed=seed), model.sample_rate


def _flite(text: str, voice: Voice, speed: float, seed: int) -> tuple[np.ndarray, int]:
    stretch = f"duration_stretch={1 / speed:.3f}"
    return _read_wav(["flite", "-voice", voice.name, "--setf", stretch, "-t", text, "-o", "/dev/stdout"])


def _espeak(text: str, voice: Voice, speed: float, seed: int) -> tuple[np.ndarray, int]:
    return _read_wav(["espeak-ng", "-v", voice.name, "-s", str(round(165 * speed)), "--stdout", text])


def _read_wav(command: list[str]) -> tuple[np.ndarray, int]:
    out = subprocess.run(command, check=True, capture_output=True).stdout
    # Written to a pipe, the header's length fields are placeholders: read the samples after the `data` tag ourselves.
    rate = int.from_bytes(out[24:28], "little")
    data = out.index(b"data") + 8
    samples = np.frombuffer(out[data : data + (len(out) - data) // 2 * 2], dtype="<i2")
    return samples.astype(np.float32) / 32768.0, rate
