"""The four axes on timelines worked by hand, with the edges of every threshold."""

import pytest

from envs import InputError, Interval
from rewards import Backchannel, PauseHandling, TurnTaking, UserInterruption
from rewards.backchannel import match_in_time_order


def score(axis, episode):
    (result,) = axis.score([episode])
    return result


@pytest.mark.parametrize(
    ("agent", "value", "longest"),
    [
        ([], 0.0, 0.0),
        ([(5.1, 6.1)], 0.0, 1.0),  # exactly 1 s, in spite of the rounding of floats
        ([(5.0, 6.01)], -1.0, 1.01),
        ([(0.0, 3.0)], 0.0, 1.0),  # only the second after 2.0 is scored
        ([(0.0, 3.1)], -1.0, 1.1),
        ([(5.0, 5.5), (5.6, 6.2)], -1.0, 1.2),  # 0.1 s of silence does not part two units
        ([(5.0, 5.5), (5.7, 6.3)], 0.0, 0.6),  # 0.2 s does
    ],
)
def test_pause_handling(episode, agent, value, longest):
    result = score(PauseHandling(), episode("pause_handling", agent))
    assert result.value == value
    assert result.details["takeover"] is (value < 0)
    assert result.details["longest"] == pytest.approx(longest)


def test_pause_handling_threshold_is_an_option(episode):
    assert score(PauseHandling(takeover_seconds=2.0), episode("pause_handling", [(5, 7)])).value == 0.0


@pytest.mark.parametrize(
    ("agent", "value", "takeover", "barge_in"),
    [
        ([(10.2, 12.0)], -0.2, True, False),
        ([(10.0, 12.0)], 0.0, True, False),
        ([], -10.0, False, False),  # 20 s of episode less the turn end at 10 s
        ([(10.2, 11.2)], -10.0, False, False),  # an utterance of exactly 1 s does not take the turn
        ([(10.2, 10.8), (11.8, 12.0)], -0.2, True, False),  # a pause of 1 s is inside the utterance: 1.8 s
        ([(10.2, 10.8), (11.81, 12.0)], -10.0, False, False),  # two short ones
        ([(10.2, 10.8), (14.0, 16.0)], -4.0, True, False),  # the short one first is passed over
        ([(9.5, 12.0)], -0.5, True, True),
        ([(4.0, 7.0)], -6.0, True, True),  # over before the turn end: still what decides
        ([(4.0, 7.0), (10.1, 12.0)], -6.0, True, True),
        ([(4.0, 4.5), (10.1, 12.0)], -0.1, True, False),  # a backchannel is no barge-in
        ([(0.0, 2.5), (10.1, 12.0)], -0.1, True, False),  # only 0.5 s of it lie in the scored window
    ],
)
def test_turn_taking(episode, agent, value, takeover, barge_in):
    result = score(TurnTaking(), episode("turn_taking", agent, user_turn_end=10.0))
    assert result.value == pytest.approx(value)
    assert (result.details["takeover"], result.details["barge_in"]) == (takeover, barge_in)
    assert ("latency" in result.details) is ("response" in result.details) is takeover


def test_a_barge_in_may_cost_more_than_its_distance(episode):
    early, late = (episode("turn_taking", [(start, 12.5)], user_turn_end=10.0) for start in (9.0, 11.0))
    scores = TurnTaking(barge_in_seconds=1.5).score([early, late])
    assert [score.value for score in scores] == pytest.approx([-1.0 - 1.5, -1.0])


def test_prompt_answers_fare_alike(episode):
    starts = (9.9, 10.0, 10.1, 10.4, 10.5)
    axis = TurnTaking(prompt_seconds=0.4, barge_in_seconds=1.0)
    scores = axis.score([episode("turn_taking", [(start, 12.5)], user_turn_end=10.0) for start in starts])
    assert [score.value for score in scores] == pytest.approx([-1.4, -0.4, -0.4, -0.4, -0.5])
    assert scores[2].details["latency"] == pytest.approx(0.1)  # what is measured stays what it is


def test_turn_taking_latency_has_a_sign(episode):
    details = score(TurnTaking(), episode("turn_taking", [(9.5, 12.0)], user_turn_end=10.0)).details
    assert details["latency"] == pytest.approx(-0.5)
    assert details["response"] == [9.5, 12.0]


def test_turn_taking_reads_the_turn_end_off_the_user_speech(episode):
    # 6-8 and 8.5-9 are one utterance, the next one is 3 s later.
    user = [(6, 8), (8.5, 9), (12, 13)]
    assert score(TurnTaking(), episode("turn_taking", [(9.3, 11)], user)).value == pytest.approx(-0.3)
    with pytest.raises(InputError, match="segment 's7' has no event `user_turn_end`"):
        score(TurnTaking(), episode("turn_taking"))


def test_turn_taking_of_an_episode_cut_off_before_the_turn_end(episode):
    assert score(TurnTaking(), episode("turn_taking", [], duration=9.0, user_turn_end=10.0)) is None


TRUE = [[5.0, 5.5], [10.0, 10.4]]


@pytest.mark.parametrize(
    ("true", "agent", "value", "counts"),
    [
        # F1 = 2 TP / (2 TP + FP + FN); counts are (TP, FP, FN).
        (TRUE, [(5.2, 5.6), (10, 10.5)], 1.0, (2, 0, 0)),
        (TRUE, [(5.2, 5.6)], 2 / 3, (1, 0, 1)),
        (TRUE, [(5.2, 5.6), (7.5, 8)], 1 / 2, (1, 1, 1)),
        (TRUE, [(6.0, 6.3), (9.0, 9.3)], 1.0, (2, 0, 0)),  # exactly 1 s away on either side
        (TRUE, [(6.01, 6.3), (8.99, 9.3)], 0.0, (0, 2, 2)),
        (TRUE, [(5.0, 6.0)], 2 / 3, (1, 0, 1)),  # exactly 1 s long: a backchannel
        (TRUE, [(5.0, 6.01)], 0.0, (0, 1, 2)),  # longer: a takeover, however well placed
        (TRUE, [(4.8, 5.0), (5.4, 5.6)], 1 / 2, (1, 1, 1)),  # two by one true backchannel: one to one
        ([], [], 1.0, (0, 0, 0)),
        ([], [(5, 5.3)], 0.0, (0, 1, 0)),
        ([], [(5, 8)], 0.0, (0, 1, 0)),
        (TRUE, [], 0.0, (0, 0, 2)),
    ],
)
def test_backchannel(episode, true, agent, value, counts):
    result = score(Backchannel(), episode("backchannel", agent, true_backchannels=true))
    assert result.value == pytest.approx(value)
    found = tuple(result.details[f"{name}s"] for name in ("true_positive", "false_positive", "false_negative"))
    assert found == counts
    assert result.details["takeover"] is any(end - start > 1.000001 for start, end in agent)


def test_backchannel_without_its_event_is_an_error(episode):
    with pytest.raises(InputError, match="segment 's7' has no event `true_backchannels`"):
        score(Backchannel(), episode("backchannel"))


def test_matching_gives_each_its_own_partner():
    # 5.9 fits both 5.0 and 6.8; taking the earliest leaves 6.8 for 7.0.
    generated = [Interval(5.9, 6.1), Interval(7.0, 7.2)]
    assert match_in_time_order(generated, [Interval(6.8, 7), Interval(5, 5.2)], 1.0) == generated


@pytest.mark.parametrize(
    ("agent", "value", "overlap"),
    [
        ([(3, 9), (12.4, 14)], -0.4, 1.0),  # speaks until 9, is interrupted from 8 to 12
        ([(12.0, 14)], 0.0, 0.0),  # starts at the very end
        ([(3, 20)], -8.0, 4.0),  # runs on through the interruption: no answer, 20 - 12 s are left
        ([(11.9, 13), (15, 16)], -3.0, 0.1),  # started before the end: the next one is the answer
        ([(11.9, 13), (13.1, 16)], -8.0, 0.1),  # 0.1 s of silence does not start anew
        ([], -8.0, 0.0),
        ([(12.5, 12.7)], -0.5, 0.0),  # an answer may be short
    ],
)
def test_user_interruption(episode, agent, value, overlap):
    result = score(UserInterruption(), episode("user_interruption", agent, interruption=[8.0, 12.0]))
    assert result.value == pytest.approx(value)
    assert result.details["overlap_seconds"] == pytest.approx(overlap)
    assert ("latency" in result.details) is (value > -8.0)


@pytest.mark.parametrize(("until", "charge"), [(9.0, 0.0), (10.5, 0.75)])
def test_not_yielding_costs_from_the_second_second_on(episode, until, charge):
    # 2.5 s of overlap are 1.5 s beyond the first, times 0.5; exactly 1 s is free.
    spoken = [(3, until), (12.4, 14)]
    axis = UserInterruption(yield_weight=0.5)
    result = score(axis, episode("user_interruption", spoken, interruption=[8.0, 12.0]))
    assert result.value == pytest.approx(-0.4 - charge)


def test_an_answer_may_have_to_be_more_than_a_backchannel(episode):
    spoken = episode("user_interruption", [(12.1, 12.6), (13.0, 15.0)], interruption=[8.0, 12.0])
    result = score(UserInterruption(answer_seconds=1.0), spoken)
    assert result.value == pytest.approx(-1.0)
    assert result.details["response"] == [12.1, 12.6]  # what is measured stays what the paper says
    assert result.details["answer"] == [13.0, 15.0]
    never = episode("user_interruption", [(12.1, 13.1)], interruption=[8.0, 12.0])
    result = score(UserInterruption(answer_seconds=1.0), never)
    assert result.value == pytest.approx(12.0 - never.duration)
    assert (result.details["answer"], result.details["answer_seconds"]) == (None, 1.0)


def test_user_interruption_reads_the_last_user_utterance(episode):
    user = [(3, 5), (8, 10), (10.5, 12)]
    assert score(UserInterruption(), episode("user_interruption", [(12.5, 14)], user)).value == pytest.approx(-0.5)
    with pytest.raises(InputError, match="segment 's7' has no event `interruption`"):
        score(UserInterruption(), episode("user_interruption"))


def test_user_interruption_of_an_episode_cut_off_before_its_end(episode):
    cut = episode("user_interruption", duration=11.0, interruption=[8.0, 12.0])
    assert score(UserInterruption(), cut) is None


@pytest.mark.parametrize("axis", [PauseHandling, TurnTaking, Backchannel, UserInterruption])
def test_an_axis_scores_only_its_own_segments(episode, axis):
    others = {"pause_handling", "turn_taking", "backchannel", "user_interruption"} - {axis.name}
    assert axis().score([episode(other) for other in sorted(others)]) == [None] * 3


def test_wrong_option_values_are_refused():
    with pytest.raises(InputError, match="'backchannel': option `tolerance` must be a number of at least 0, found -1"):
        Backchannel(tolerance=-1)
    with pytest.raises(InputError, match=r"'pause_handling': option `takeover_seconds` .* found 'long'"):
        PauseHandling(takeover_seconds="long")


def test_the_options_of_the_axes_are_heard(episode):
    # 0.7 s and 0.6 s of speech, 0.6 s apart: one utterance of 1.9 s, or two that take no turn.
    spoken = episode("turn_taking", [(10.2, 10.9), (11.5, 12.1)], user_turn_end=10.0)
    assert [score(TurnTaking(max_pause=p), spoken).value for p in (1.0, 0.5)] == pytest.approx([-0.2, -10.0])
    assert (
        score(TurnTaking(max_pause=0.4), episode("turn_taking", (), [(6, 8), (8.5, 9)])).details["user_turn_end"] == 8
    )
    # Starts 0.5 s apart; 0.8 s long.
    said = episode("backchannel", [(5.5, 6.3)], true_backchannels=[[5.0, 5.4]])
    assert [score(Backchannel(tolerance=t), said).value for t in (0.5, 0.4)] == [1.0, 0.0]
    takeovers = [score(Backchannel(backchannel_seconds=s), said).details["takeover"] for s in (0.8, 0.7)]
    assert takeovers == [False, True]
    # 1 s of overlap is 0.5 s beyond half a second.
    over = episode("user_interruption", [(3, 9.0), (12.4, 14)], interruption=[8.0, 12.0])
    assert score(UserInterruption(yield_weight=0.5, yield_seconds=0.5), over).value == pytest.approx(-0.4 - 0.25)
    user = episode("user_interruption", [], [(3, 5), (8, 10), (10.5, 12)])
    assert score(UserInterruption(max_pause=0.4), user).details["interruption"] == [10.5, 12]
