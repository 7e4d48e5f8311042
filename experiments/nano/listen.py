"""Silero on batches of 8 kHz audio: the same decisions as its own `get_speech_timestamps`, many dialogues at once."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 8000
BLOCK = 256  # samples of one decision, 32 ms


@functools.cache
def _model():
    from silero_vad import load_silero_vad

    return load_silero_vad()


@torch.no_grad()
def probabilities(audio: Tensor) -> np.ndarray:
    """Speech probability of every 32 ms block. audio: [B, N] at 8 kHz. Returns float32 [B, N // 256]."""
    model = _model()
    model.reset_states()
    blocks = audio[:, : audio.shape[1] // BLOCK * BLOCK].split(BLOCK, dim=1)
    return torch.cat([model(block, SAMPLE_RATE) for block in blocks], dim=1).numpy()


def intervals(
    probability: np.ndarray, threshold: float = 0.5, shortest: float = 0.25, gap: float = 0.1, pad: float = 0.03
) -> list[tuple[float, float]]:
    """Speech [start, end] in seconds from one dialogue's block probabilities, with Silero's hysteresis and defaults."""
    step = BLOCK / SAMPLE_RATE
    found: list[list[float]] = []
    start = quiet_since = None
    for index, p in enumerate([*probability, 0.0]):
        at = index * step
        if p >= threshold:
            quiet_since = None
            start = at if start is None else start
        elif start is not None and (p < threshold - 0.15 or index == len(probability)):
            quiet_since = at if quiet_since is None else quiet_since
            if at - quiet_since >= gap or index == len(probability):
                if quiet_since - start > shortest:
                    found.append([start, quiet_since])
                start = quiet_since = None
    end = len(probability) * step
    return [(max(0.0, s - pad), min(end, e + pad)) for s, e in found]


def detect(audio: Tensor) -> list[list[tuple[float, float]]]:
    """Speech intervals of each row of audio [B, N]."""
    return [intervals(row) for row in probabilities(audio)]
