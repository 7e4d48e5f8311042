"""Overlap and repetition on timelines worked by hand."""

from dataclasses import replace

import pytest

from envs import InputError, Word
from rewards import Overlap, Repetition, make_axis


def test_overlap_counts_takeovers_within_the_scored_window(episode):
    # Scored from 2 s. Agent 1-4 counts as 2-4; user 3-8: 1 s at once. 7-7.8 is short (free); 9.5-12 meets 10-11: 1 s.
    one = episode("pause_handling", agent=[(1, 4), (7, 7.8), (9.5, 12)], user=[(3, 8), (10, 11)])
    score = Overlap().score_episode(one)
    assert score.value == pytest.approx(-2.0)
    assert score.details["overlaps"] == [[3, 4], [10, 11]]
    assert Overlap(free_seconds=0.0).score_episode(one).value == pytest.approx(-2.8)
    assert str(Overlap().score_episode(episode("turn_taking")).value) == "0.0"  # not -0.0
    with pytest.raises(InputError, match="`free_seconds` must be a number of at least 0"):
        make_axis("overlap", free_seconds=-1)


def test_repetition_counts_ngrams_that_were_said_before(episode):
    def said(text, start=3.0):
        words = tuple(Word(word, start + n, start + n) for n, word in enumerate(text.split()))
        return replace(episode("turn_taking"), text=text, words=words)

    # a b c d a b c d: of five 4-grams (abcd bcda cdab dabc abcd) one was said before.
    score = Repetition().score_episode(said("a b c d A, b c d."))
    assert score.value == pytest.approx(-1 / 5)
    assert score.details == {"repeated": ["a b c d"], "words": 8}
    assert Repetition(n=1).score_episode(said("no no no yes")).value == pytest.approx(-2 / 4)
    assert Repetition().score_episode(said("a b c")).value == 0.0
    # What is said before the scored window (2 s) does not count: five words at 0, 1, 2... leave three.
    assert Repetition(n=1).score_episode(said("no no no yes no", start=0.0)).details["words"] == 3
    with pytest.raises(InputError, match="`n` must be a whole number"):
        make_axis("repetition", n=0)
