"""Frames and time: the conversions between seconds, samples and frames, in one place.

A frame is one step of the model (80 ms at 12.5 frames a second for Moshi and Mimi). The frame rate comes from the
codec, never from a constant.
"""

import math


def frames_in(seconds: float, frame_rate: float) -> int:
    """Whole frames that cover `seconds` (rounded up; a rounding error below 1e-6 frames does not add one)."""
    return max(0, math.ceil(seconds * frame_rate - 1e-6))


def frame_at(seconds: float, frame_rate: float) -> int:
    """Index of the frame that holds the moment `seconds`."""
    return max(0, math.floor(seconds * frame_rate + 1e-6))


def samples_in(seconds: float, sample_rate: int) -> int:
    """Samples in `seconds`, to the nearest sample."""
    return round(seconds * sample_rate)
