"""Timing problems at the edges of their definitions."""

import pytest

from envs.speech import Interval
from envs.utterances import Utterance
from rlhf_duplex.data.problems import find_interruptions, find_unresponsive


def said(*spans):
    return [Utterance((Interval(*span),)) for span in spans]


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ((3.0, 4.1), True),
        ((3.0, 4.0), False),  # a second, no more: a backchannel
        ((5.79, 8.0), True),  # the utterance is still running
        ((5.8, 8.0), False),  # it is as good as over: a smooth change of turn
        ((8.1, 9.9), False),  # "mm-hm" is no turn to be interrupted
        ((2.0, 8.0), False),  # both begin at once
        ((1.0, 8.0), False),  # the user spoke into it
    ],
)
def test_interruptions(reply, found):
    user = said((2.0, 6.0), (8.0, 8.4), (10.0, 12.0))
    problems = find_interruptions(user, said(reply))
    assert [(p.kind, p.time, p.user, p.reply) for p in problems] == (
        [("interruption", reply[0], user[0], said(reply)[0])] if found else []
    )


@pytest.mark.parametrize(
    ("agent", "duration", "found"),
    [
        ([], 9.0, True),
        ([], 8.99, False),  # the recording ends before three seconds have passed
        ([(8.99, 9.5)], 20.0, False),  # just in time
        ([(9.0, 9.5)], 20.0, True),  # too late
        ([(5.0, 6.1)], 20.0, False),  # speaks over the turn's end
        ([(5.0, 6.0)], 20.0, True),  # has stopped by then
        ([(6.2, 6.4)], 20.0, False),  # even a backchannel is something
    ],
)
def test_unresponsive(agent, duration, found):
    user = said((2.0, 6.0))
    problems = find_unresponsive(user, said(*agent), duration, 3.0)
    assert [(p.kind, p.time, p.user) for p in problems] == ([("unresponsive", 6.0, user[0])] if found else [])


def test_a_user_who_goes_on_was_not_left_alone():
    assert find_unresponsive(said((2.0, 6.0), (8.9, 9.5)), [], 12.0, 3.0) == []
    assert [p.time for p in find_unresponsive(said((2.0, 6.0), (9.0, 11.0)), [], 20.0, 3.0)] == [6.0, 11.0]


def test_a_short_word_is_no_turn():
    assert find_unresponsive(said((2.0, 3.0)), [], 20.0, 3.0) == []
    assert len(find_unresponsive(said((2.0, 3.01)), [], 20.0, 3.0)) == 1
