"""A spoken dialogue that corpora of every layout are made of here."""

from typing import NamedTuple

import numpy as np
import pytest
import soundfile


class Spoken(NamedTuple):
    """Two-channel audio `(N, 2)`, its rate, its words `[text, start, end]` of the user, and where the user is.

    The user speaks from 0.5 to 7.44 s with a pause from 3.32 to 4.13 s; the agent is silent.
    """

    audio: np.ndarray
    rate: int
    words: list
    user: int = 1


@pytest.fixture(scope="session")
def spoken(nano_segments):
    (segment,) = (s for s in nano_segments if s.id == "heldout-0000")
    audio, rate = soundfile.read(str(segment.recording), dtype="float32")
    words = [[text, *times] for text, times, who in segment.transcript if who == "user"]
    return Spoken(audio, rate, words)
