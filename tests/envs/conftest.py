"""Synthetic audio and recordings that the tests of the environment share."""

import json

import numpy as np
import pytest
import soundfile
from scipy.signal import lfilter


def make_voice(seconds: float, sample_rate: int, pitch: float = 120.0, level: float = 0.3) -> np.ndarray:
    """A voiced sound `(N,)`: pulses at a gliding pitch through moving formants, in syllables of a quarter second."""
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    glide = pitch * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * times))
    phase = np.cumsum(glide) / sample_rate
    sound = (np.diff(np.floor(phase), prepend=0.0) > 0).astype(np.float64)
    block = max(1, round(0.25 * sample_rate))
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (300, 870, 2240)]
    out = np.zeros_like(sound)
    for index in range(0, len(sound), block):
        part = sound[index : index + block]
        for frequency in vowels[(index // block) % len(vowels)]:
            if frequency < sample_rate / 2:
                radius = np.exp(-np.pi * 90 / sample_rate)
                poles = [1, -2 * radius * np.cos(2 * np.pi * frequency / sample_rate), radius**2]
                part = lfilter([1 - radius], poles, part)
        out[index : index + block] = part
    out *= 0.55 + 0.45 * np.sin(2 * np.pi * 4.0 * times - np.pi / 2)
    peak = np.abs(out).max() if len(out) else 0.0
    return (level * out / peak if peak > 0 else out).astype(np.float32)


@pytest.fixture(scope="session")
def voice():
    return make_voice


@pytest.fixture
def write_dialogue(tmp_path):
    """A function that writes a two-channel 16 kHz recording of noise and gives its path."""

    def write(name="dialogue.flac", seconds=10.0, channels=2, sample_rate=16000):
        noise = np.random.default_rng(0).normal(0, 0.01, (round(seconds * sample_rate), channels))
        soundfile.write(str(tmp_path / name), noise, sample_rate)
        return tmp_path / name

    return write


@pytest.fixture
def row():
    """A function that gives a right manifest row, changed by keyword arguments."""

    def make(**changes):
        right = {
            "id": "s0",
            "axis": "turn_taking",
            "recording": "dialogue.flac",
            "user_channel": 1,
            "start": 1.0,
            "end": 9.0,
            "events": {"user_turn_end": 5.0},
        }
        return right | changes

    return make


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes a manifest of rows (or of raw lines) and gives its path."""

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / "segments.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
