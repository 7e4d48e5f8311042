"""Who has the floor, by hand."""

import pytest

from envs.floor import analyse_floor
from envs.speech import Interval


def spans(*pairs):
    return [Interval(*pair) for pair in pairs]


def test_gap_overlap_and_an_unanswered_turn():
    # 0-3 answered after 0.5 s; 6-9 answered 0.4 s before its end; 12-14 never, and the dialogue goes on to 20.
    user = spans((0, 3), (6, 9), (12, 14))
    agent = spans((3.5, 5.5), (8.6, 11))
    floor = analyse_floor(user, agent, 0, 20)
    assert floor.turns == 3
    assert floor.offsets == pytest.approx([0.5, -0.4])
    assert floor.waits == pytest.approx([0.5, 0.0, 6.0])
    assert floor.barge_ins == 1
    assert floor.overlap == pytest.approx(0.4)
    assert floor.seconds_lost == pytest.approx((0.5 + 6.0 + 0.4) / 3)
    metrics = floor.metrics()
    assert metrics["answer_rate"] == pytest.approx(2 / 3)
    assert metrics["gap"] == pytest.approx(0.5)  # the overlap is no gap
    assert metrics["floor_transfer_offset"] == pytest.approx(0.05)
    assert metrics["overlap"] == pytest.approx(0.4 / 8)
    assert metrics["barge_in_rate"] == pytest.approx(1 / 3)
    assert "yield_rate" not in metrics  # nobody interrupted the agent


def test_yields():
    # The agent speaks 4-9 and is interrupted at 6: silent 3 s later. At 14 it stops after 0.5 s, and answers at 17.
    user = spans((0, 3), (6, 10), (14, 16.5))
    agent = spans((4, 9), (11, 14.5), (17, 19))
    floor = analyse_floor(user, agent, 0, 20)
    assert floor.stops == pytest.approx([3.0, 0.5])
    assert floor.metrics()["yield_rate"] == 0.5
    assert floor.metrics()["stop_seconds"] == pytest.approx(1.75)
    assert floor.barge_ins == 0  # what was already going on is no barge-in
    assert floor.offsets == pytest.approx([1.0, 1.0, 0.5])
    assert floor.overlap == pytest.approx(3.5)


def test_an_agent_that_never_stops_has_not_answered():
    floor = analyse_floor(spans((2, 5)), spans((0, 10)), 0, 10)
    assert floor.offsets == []
    assert floor.stops == pytest.approx([3.0])
    assert floor.waits == pytest.approx([5.0])


def test_backchannels_take_nothing():
    user, agent = spans((0, 6)), spans((2, 2.5), (4, 4.4), (6.3, 8))
    floor = analyse_floor(user, agent, 0, 10)
    # 2-2.5 and 4-4.4 lie 1.5 s apart: two short utterances of the agent.
    assert floor.backchannels == 2
    assert (floor.barge_ins, floor.overlap) == (0, 0.0)
    assert floor.offsets == pytest.approx([0.3])
    assert floor.metrics()["backchannels_per_minute"] == pytest.approx(20.0)


def test_a_dialogue_that_breaks_off_and_one_without_a_user():
    assert analyse_floor(spans((0, 3), (7, 9.5)), spans((4, 6)), 0, 10).turns == 1  # half a second is no time to answer
    nothing = analyse_floor([], spans((1, 4)), 0, 10)
    assert nothing.seconds_lost is None
    assert nothing.metrics() == {}


def test_what_precedes_the_window_is_not_looked_at():
    floor = analyse_floor(spans((0, 1), (3, 6)), spans((0, 2.5), (6.5, 8)), 2, 10)
    assert floor.turns == 1
    assert floor.stops == []
    assert floor.offsets == pytest.approx([0.5])


def test_an_agent_that_yields_at_once_and_answers_at_once():
    # It stops 0.4 s after the user began, and answers 0.1 s after the user's end: two utterances, though the silence
    # between them is less than a second.
    floor = analyse_floor(spans((0, 2), (5, 6.2)), spans((2.3, 5.4), (6.3, 9)), 0, 12)
    assert floor.stops == pytest.approx([0.4])
    assert floor.offsets == pytest.approx([0.3, 0.1])
    talks_on = analyse_floor(spans((0, 2), (5, 6.2)), spans((2.3, 6.2), (7.3, 9)), 0, 12)
    assert floor.seconds_lost < talks_on.seconds_lost


def test_a_backchannel_just_before_the_answer_is_no_barge_in():
    floor = analyse_floor(spans((2, 6)), spans((5.0, 5.4), (6.2, 9)), 0, 12)
    assert (floor.barge_ins, floor.backchannels, floor.overlap) == (0, 1, 0.0)
    assert floor.offsets == pytest.approx([0.2])


def test_a_turn_that_the_dialogue_breaks_off_in_counts_where_it_is_talked_over():
    # 1-3 is answered after 0.5 s; 10-19.5 could not be, but the agent talks over it for 3 s.
    floor = analyse_floor(spans((1, 3), (10, 19.5)), spans((3.5, 6), (11, 14)), 0, 20)
    assert (floor.user_turns, floor.turns) == (2, 1)
    assert floor.metrics()["answer_rate"] == 1.0
    assert floor.metrics()["barge_in_rate"] == 0.5
    assert floor.seconds_lost == pytest.approx(0.5 + 3 / 2)
    alone = analyse_floor(spans((10, 19.5)), spans((11, 19)), 0, 20)
    assert alone.seconds_lost == pytest.approx(8.0)
    assert "answer_rate" not in alone.metrics()
    assert analyse_floor(spans((1, 1.5)), spans((3, 6)), 0, 20).seconds_lost is None  # the user has no turn
