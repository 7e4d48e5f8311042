"""Fluency by hand."""

from pathlib import Path

import numpy as np
import pytest

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import Interval
from rewards import Fluency

SEGMENT = Segment("live", "turn_taking", Path("live"), 1, 0.0, 19.0)
SILENCE = np.zeros(1, dtype=np.float32)


def episode(user, agent, lead_in=1.0):
    sides = [[Interval(*pair) for pair in side] for side in (user, agent)]
    return Episode(SEGMENT, SILENCE, SILENCE, 8000, *sides, 20.0, lead_in)


def test_seconds_lost_a_turn():
    # Turns 2-5 (answered after 0.5 s) and 9-12 (never answered: 8 s until the end); 1 s of overlap from 9 to 10.
    (score,) = Fluency().score([episode([(2, 5), (9, 12)], [(5.5, 10)])])
    assert score.value == pytest.approx(-(0.5 + 8.0 + 1.0) / 2)
    assert score.details["offsets"] == pytest.approx([0.5])
    assert score.details["waits"] == pytest.approx([0.5, 8.0])
    assert score.details["stops"] == pytest.approx([1.0])
    assert score.details["overlap"] == pytest.approx(1.0)


def test_what_pays():
    axis = Fluency()
    user = [(2, 5), (9, 12)]

    def value(agent):
        return axis.score([episode(user, agent)])[0].value

    quick, slow = value([(5.3, 8), (12.3, 15)]), value([(6.5, 8), (13.5, 15)])
    silent, talking = value([]), value([(1, 20)])
    assert quick > slow > silent
    assert quick > talking
    assert value([(3, 3.5), (5.3, 8), (10, 10.6), (12.3, 15)]) == quick  # backchannels are free


def test_bounds_and_no_user():
    assert Fluency(worst=3.0).score([episode([(2, 5)], [])])[0].value == -3.0
    assert Fluency().score([episode([], [(1, 5)])]) == [None]
    with pytest.raises(InputError, match="worst"):
        Fluency(worst=-1.0)
