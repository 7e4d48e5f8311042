"""Each criterion at its edge, on intervals whose figures are worked out beside them."""

import numpy as np
import pytest

from envs import Interval
from rewards.backchannel import match_in_time_order
from rlhf_duplex.data.criteria import find_candidates
from rlhf_duplex.data.curate_options import Criteria

E = 0.01  # a hundredth of a second beyond an edge


def found(user, agent, **criteria):
    """Axis -> candidates, and axis -> reasons of the rest."""
    spans = [[Interval(*pair) for pair in side] for side in (user, agent)]
    candidates, rejected = find_candidates(*spans, Criteria(**criteria))
    by_axis = {}
    for candidate in candidates:
        by_axis.setdefault(candidate.axis, []).append(candidate)
    return by_axis, {axis: dict(reasons) for axis, reasons in rejected.items()}


def reason(axis, user, agent, **criteria):
    candidates, rejected = found(user, agent, **criteria)
    assert axis not in candidates
    return list(rejected[axis])


def test_pause_handling():
    # 0-2 and 2.5-4: one utterance of exactly 4.0 s with a pause of 0.5 s.
    candidates, _ = found([(0, 2), (2.5, 4)], [(4.0, 9), (-3, 0)])
    (one,) = candidates["pause_handling"]
    assert (one.start, one.end, one.events) == (0, 4, {"pauses": [[2, 2.5]]})


@pytest.mark.parametrize(
    ("user", "agent", "why"),
    [
        ([(0, 2), (2.5, 4 - E)], [], "user's utterance shorter than 4 s"),
        ([(0, 4)], [], "no pause of 0.35 s within the user's utterance"),
        ([(0, 2), (2 + 0.35 - E, 5)], [], "no pause of 0.35 s within the user's utterance"),
        ([(0, 2), (2.5, 4)], [(2.1, 2.4)], "agent not silent throughout"),
        ([(0, 2), (2.5, 4)], [(3.9, 9)], "agent not silent throughout"),
        ([(0, 2), (2.5, 4)], [(-3, E)], "agent not silent throughout"),
    ],
)
def test_no_pause_handling(user, agent, why):
    assert reason("pause_handling", user, agent) == [why]


def test_a_pause_of_a_second_is_within_the_utterance_and_a_longer_one_ends_it():
    candidates, _ = found([(0, 2), (3.0, 4.5)], [])
    assert candidates["pause_handling"][0].events == {"pauses": [[2, 3]]}
    candidates, rejected = found([(0, 2), (3 + E, 4.5)], [])
    assert candidates == {}
    assert rejected["pause_handling"] == {"user's utterance shorter than 4 s": 2}
    # The edge is an option as all are.
    assert "pause_handling" in found([(0, 2), (3 + E, 4.5)], [], max_pause=1.1)[0]


def test_a_silence_below_the_units_is_no_pause():
    # 0.15 s is below `min_silence`; 0.2 s parts two units.
    assert reason("pause_handling", [(0, 2), (2.15, 5)], [], pause_min_silence=0.1) == [
        "no pause of 0.1 s within the user's utterance"
    ]
    assert "pause_handling" in found([(0, 2), (2.2, 5)], [], pause_min_silence=0.1)[0]


def test_turn_taking():
    # Both of exactly 5 s, a gap of exactly 0.4 s.
    candidates, _ = found([(1, 6)], [(6.4, 11.4)])
    (one,) = candidates["turn_taking"]
    assert (one.start, one.end, one.events) == (1, 11.4, {"user_turn_end": 6})
    # A backchannel of the agent meanwhile, and a smooth change of turn with an overlap of 0.2 s.
    candidates, _ = found([(1, 6)], [(3, 3.5), (5.8, 11)])
    assert len(candidates["turn_taking"]) == 1


@pytest.mark.parametrize(
    ("user", "agent", "why"),
    [
        ([(1, 6)], [(6.4 + E, 12)], "gap longer than 0.4 s"),
        ([(1, 6 - E)], [(6.2, 12)], "user's utterance shorter than 5 s"),
        ([(1, 6)], [(6.4, 11.4 - E)], "agent's utterance shorter than 5 s"),
        ([(1, 6)], [(5.8 - E, 12)], "agent begins more than 0.2 s before the user ends"),
        ([(1, 6)], [], "user goes on, or nobody does"),
        ([(1, 6)], [(5.0, 7.2), (8.3, 14)], "agent begins more than 0.2 s before the user ends"),
    ],
)
def test_no_turn_taking(user, agent, why):
    assert reason("turn_taking", user, agent) == [why]


def test_no_turn_taking_where_the_user_speaks_first():
    # 6 to 7.1 is longer than a pause: a new utterance of the user, and the agent's comes after that.
    reasons = reason("turn_taking", [(1, 6), (7.1, 7.3)], [(7.4, 14)])
    assert reasons == ["user goes on, or nobody does", "user's utterance shorter than 5 s"]


def test_the_recorded_agents_own_backchannels_are_all_true_ones():
    agent = [Interval(1, 1.3), Interval(1.6, 1.9), Interval(3.5, 3.9)]  # "yeah ... yeah" is one utterance, two units
    candidates, _ = found([(0, 5)], [tuple(unit) for unit in agent])
    (one,) = candidates["backchannel"]
    true = [Interval(*pair) for pair in one.events["true_backchannels"]]
    assert match_in_time_order(agent, true, 1.0) == true == agent


def test_backchannel():
    # The user's 5.0 s, one backchannel of exactly 1.0 s, and another.
    candidates, _ = found([(0, 5)], [(1, 2), (3.5, 3.9)])
    (one,) = candidates["backchannel"]
    assert (one.start, one.end, one.events) == (0, 5, {"true_backchannels": [[1, 2], [3.5, 3.9]]})
    # A short one over the edge does no harm, and is not one of the true ones.
    candidates, _ = found([(0, 5)], [(1, 2), (4.8, 5.4)])
    assert candidates["backchannel"][0].events == {"true_backchannels": [[1, 2]]}


@pytest.mark.parametrize(
    ("user", "agent", "why"),
    [
        ([(0, 5 - E)], [(1, 2)], "user's utterance shorter than 5 s"),
        ([(0, 5)], [(1, 2 + E)], "agent says more than 1 s at once"),
        ([(0, 5)], [(1, 1.5), (2.5, 3)], "agent says more than 1 s at once"),  # a pause of 1.0 s: one utterance
        ([(0, 5)], [(1, 1.5), (4.9, 9)], "agent says more than 1 s at once"),
        ([(0, 5)], [], "agent silent throughout"),
        ([(0, 5)], [(5.0, 5.5)], "agent silent throughout"),
        ([(0, 5)], [(4.8, 5.4)], "agent speaks only over the utterance's edge"),
    ],
)
def test_no_backchannel(user, agent, why):
    assert reason("backchannel", user, agent) == [why]


# X 0-3, Y 3.2-6.2, X 6.19-9.19 (begins within Y), Y 10-13: all of exactly 3 s. The user's two are more than 1 s apart.
INTERRUPTION = ([(0, 3), (6.19, 9.19)], [(3.2, 6.2), (10, 13)])


def test_user_interruption():
    candidates, _ = found(*INTERRUPTION)
    (one,) = candidates["user_interruption"]
    assert (one.start, one.end, one.events) == (0, 13, {"interruption": [6.19, 9.19]})


@pytest.mark.parametrize(
    ("user", "agent", "why"),
    [
        ([(E, 3), (6.19, 9.19)], INTERRUPTION[1], "first utterance shorter than 3 s"),
        ([(0, 3), (6.19, 9.19)], [(3.2 + E, 6.2), (10, 13)], "second utterance shorter than 3 s"),
        ([(0, 3), (6.19, 9.19 - E)], INTERRUPTION[1], "third utterance shorter than 3 s"),
        ([(0, 3), (6.19, 9.19)], [(3.2, 6.2), (10, 13 - E)], "fourth utterance shorter than 3 s"),
        ([(6.19, 9.19)], INTERRUPTION[1], "agent's interrupted utterance answers nothing of the user's"),
        ([(0, 3), (6.19, 9.19)], [(3.2, 6.2)], "agent does not answer the interruption"),
        ([(0, 3), (6.19, 9.19), (10.2, 11)], [(3.2, 6.2), (10.5, 14)], "agent does not answer the interruption"),
        # What the agent says next is over before the interruption is.
        ([(0, 4), (8, 20)], [(4.2, 9), (11, 15), (21, 25)], "agent does not answer the interruption"),
    ],
)
def test_no_user_interruption(user, agent, why):
    assert why in reason("user_interruption", user, agent)


def test_an_utterance_after_the_agents_end_is_no_interruption_and_not_counted_as_one():
    candidates, rejected = found([(0, 3), (6.2, 9.2)], [(3.2, 6.2), (10, 13)])
    assert "user_interruption" not in candidates
    assert rejected["user_interruption"] == {}


def test_events_lie_in_their_segments_with_any_thresholds():
    for user, agent in (([(0, 6)], [(5.85, 5.95)]), ([(0, 4), (8, 20)], [(4.2, 9), (11, 15)]), INTERRUPTION):
        candidates, _ = found(user, agent, turn_min=0.05, interruption_min=0.05)
        for candidate in (c for own in candidates.values() for c in own):
            for moment in np.concatenate([np.ravel(value) for value in candidate.events.values()]):
                assert candidate.start <= moment <= candidate.end, candidate


def test_the_other_direction_is_another_dialogue():
    user, agent = INTERRUPTION
    candidates, _ = found(agent, user)
    assert "user_interruption" not in candidates


def test_nobody_speaks():
    assert found([], []) == (
        {},
        {axis: {} for axis in ("pause_handling", "turn_taking", "backchannel", "user_interruption")},
    )


def test_segments_of_any_length_or_not():
    long = [(0, 2), (2.5, 121)]
    assert reason("pause_handling", long, []) == ["segment longer than 120 s"]
    assert "pause_handling" in found(long, [], max_seconds=0)[0]
    assert "pause_handling" in found([(0, 2), (2.5, 120)], [])[0]


def test_a_backchannel_over_the_users_beginning_is_none_of_the_true_ones():
    candidates, _ = found([(0, 5)], [(-0.4, 0.3), (2, 3)])
    assert candidates["backchannel"][0].events == {"true_backchannels": [[2, 3]]}


def test_who_begins_at_the_same_moment_does_not_interrupt():
    candidates, rejected = found([(0, 3), (4.5, 7.5)], [(4.5, 7.5), (8, 11)])
    assert "user_interruption" not in candidates
    assert rejected["user_interruption"] == {}


def test_the_answer_to_an_interruption_may_begin_before_its_end():
    candidates, _ = found([(0, 3), (6.19, 9.19)], [(3.2, 6.2), (9.0, 12)])
    (one,) = candidates["user_interruption"]
    assert (one.start, one.end, one.events) == (0, 12, {"interruption": [6.19, 9.19]})


def test_a_backchannel_up_to_the_users_end_is_no_beginning():
    assert "turn_taking" in found([(1, 6)], [(5.0, 5.7), (7.3, 7.4)], turn_max_gap=2.0, turn_min=0.1)[0]
