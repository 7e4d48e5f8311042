from envs import Interval, inter_pausal_units, utterances
from envs.utterances import clip_intervals, merge_intervals


def test_a_silence_of_exactly_one_second_is_still_a_pause():
    # 2.1 -> 3.1 is 1.0 s (with a rounding error in floats): one utterance. 1.001 s ends it.
    assert len(utterances([Interval(0, 2.1), Interval(3.1, 4)])) == 1
    assert len(utterances([Interval(0, 2.1), Interval(3.101, 4)])) == 2


def test_utterances_have_units_and_pauses_in_time_order():
    first, second = utterances([Interval(5, 6), Interval(0, 1), Interval(1.5, 2)])
    assert (first.start, first.end, first.duration) == (0, 2, 2)
    assert first.pauses == (Interval(1, 1.5),)
    assert second.units == (Interval(5, 6),)
    assert second.pauses == ()
    assert utterances([]) == []


def test_units_join_over_silences_shorter_than_the_minimum():
    # 0.2 s of silence is the minimum itself and parts two units; 0.199 s is shorter and does not.
    assert inter_pausal_units([Interval(0, 1), Interval(1.2, 2)]) == [Interval(0, 1), Interval(1.2, 2)]
    assert inter_pausal_units([Interval(0, 1), Interval(1.199, 2)]) == [Interval(0, 2)]


def test_merging_keeps_the_longest_end_and_joins_at_exactly_the_gap():
    assert merge_intervals([Interval(0, 3), Interval(1, 2)], 0.0) == [Interval(0, 3)]
    assert merge_intervals([Interval(0, 1), Interval(1.5, 2)], 0.5) == [Interval(0, 2)]
    assert merge_intervals([], 0.5) == []


def test_clipping_drops_what_lies_outside_or_only_touches():
    found = clip_intervals([Interval(0, 1), Interval(1, 3), Interval(3.5, 6), Interval(5, 6)], 1.0, 5.0)
    assert found == [Interval(1, 3), Interval(3.5, 5)]
