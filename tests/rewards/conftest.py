import numpy as np
import pytest

from envs import Episode, Interval, Segment


@pytest.fixture
def episode(tmp_path):
    """A function that gives an episode by its timeline alone: 20 s, of which the first 2 s are not scored.

    Events are in episode time here and shifted into the recording, in which the segment starts at 100 s.
    """

    def make(axis, agent=(), user=(), duration=20.0, **events):
        def shifted(value):
            return [shifted(v) for v in value] if isinstance(value, list) else value + 98.0

        segment = Segment(
            "s7", axis, tmp_path / "d.wav", 1, 100.0, 118.0, {name: shifted(v) for name, v in events.items()}
        )
        silence = np.zeros(1, dtype=np.float32)
        speech = [[Interval(*pair) for pair in side] for side in (user, agent)]
        return Episode(segment, silence, silence, 8000, *speech, duration, scored_from=2.0)

    return make
