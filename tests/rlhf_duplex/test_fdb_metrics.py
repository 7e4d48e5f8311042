"""Every metric of Full-Duplex-Bench v1 and v1.5 by hand, the official scripts' faults included."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from envs.audio import resample
from envs.episode import Word
from envs.speech import Interval
from rlhf_duplex.evaluation.full_duplex_bench.metrics import (
    UnendedWord,
    backchannel,
    backchannel_divergence,
    official_mean,
    official_speech,
    pause_handling,
    takeover,
    turn_taking,
    user_interruption,
    words_within,
)
from rlhf_duplex.evaluation.full_duplex_bench.overlap import overlap_metrics, overlaps, response_gaps


def words(*times):
    return [Word("word", start, end) for start, end in times]


def test_takeover():
    assert takeover([]) == 0
    assert takeover(words((1.0, 1.3), (1.4, 1.6), (1.7, 1.9))) == 0  # 0.9 s, 3 words
    assert takeover(words((1.0, 1.2), (1.2, 1.4), (1.4, 1.6), (1.6, 1.9))) == 1  # 0.9 s, but 4 words
    assert takeover(words((1.0, 2.0))) == 1  # one word, but 1 s
    assert takeover(words((1.0, 1.2), (5.0, 5.2))) == 1  # the span counts, not the sum
    assert pause_handling(words((1.0, 1.3))) == {"takeover_rate": 0.0}


def test_latency_of_turn_taking():
    said = words((3.36, 3.9), (4.46, 5.0))
    assert turn_taking(said, 2.01) == {"takeover_rate": 1.0, "latency": pytest.approx(1.35)}
    assert turn_taking(said, 4.0) == {"takeover_rate": 1.0, "latency": 0.0}  # begun before the end: not below 0
    assert turn_taking(words((3.0, 3.5)), 2.0) == {"takeover_rate": 0.0}  # no turn, no latency


def test_interruption_counts_what_is_said_after_it():
    said = words((1.0, 1.5), (1.5, 3.2), (6.0, 6.4), (6.5, 7.5))
    # Ends at 5.0: the first two words do not count; 6.0 - 5.0 = 1 s.
    assert user_interruption(said, 5.0) == {"takeover_rate": 1.0, "latency": pytest.approx(1.0)}
    assert user_interruption(said, 7.0) == {"takeover_rate": 0.0}


def test_words_of_an_interval_as_the_official_script_counts_them():
    interval = Interval(2.0, 3.0)
    inside, before, after = (2.2, 2.5), (1.0, 1.9), (3.1, 3.3)
    across_start, across_end, around, at_end, at_start = (1.8, 2.1), (2.9, 3.2), (1.0, 4.0), (3.0, 3.3), (1.5, 2.0)
    for times in (inside, across_start, across_end, around, at_end):
        assert words_within(words(times), interval), times
    for times in (before, after, at_start):
        assert not words_within(words(times), interval), times
    assert words_within(words((2.5, 2.5)), interval)  # of no length, but with an end
    # Of a word without an end, begin and end are one: it is skipped unless it begins at the end or later.
    assert not words_within([UnendedWord("so", 2.5, 2.5)], interval)
    assert words_within([UnendedWord("so", 3.0, 3.0)], interval)


SECONDS = 10.0


def test_backchannel_by_hand():
    short = [Interval(1.0, 1.6), Interval(4.0, 4.5)]
    # Each under 1 s with at most 2 words: no takeover; 2 of them in 10 s.
    assert backchannel(short, words((1.1, 1.4), (4.1, 4.4)), SECONDS, None) == {"takeover_rate": 0.0, "frequency": 0.2}
    # 3 words within 0.6 s: a takeover. 4 words are one whatever the length; 1 s is one whatever the words.
    assert backchannel(short[:1], words(*[(1.1, 1.2)] * 3), SECONDS, None)["takeover_rate"] == 1.0
    assert backchannel([Interval(1.0, 1.5)], words(*[(1.1, 1.2)] * 4), SECONDS, None)["takeover_rate"] == 1.0
    assert backchannel([Interval(1.0, 2.0)], [], SECONDS, None)["takeover_rate"] == 1.0
    assert backchannel([], [], SECONDS, [0.5, 0.5]) == {"takeover_rate": 0.0, "frequency": 0.0, "jsd": 1.0}


def test_fault_1_the_last_short_interval_decides():
    speech = [Interval(1.0, 3.5), Interval(6.0, 6.4)]  # a takeover of 2.5 s, then "mm-hm"
    corrected, official = (backchannel(speech, [], SECONDS, None, compatible) for compatible in (False, True))
    assert (corrected["takeover_rate"], official["takeover_rate"]) == (1.0, 0.0)
    assert corrected["frequency"] == official["frequency"] == 0.2
    # The other way round both see it.
    assert backchannel(speech[::-1], [], SECONDS, None, True)["takeover_rate"] == 1.0


def test_fault_2_audio_is_taken_for_16_khz(spoken):
    audio = resample(spoken.audio[: 10 * spoken.rate, spoken.user], spoken.rate, 24000)
    corrected, official = (official_speech(audio, 24000, compatible=c) for c in (False, True))
    # 0.5 to 3.32 s and 4.13 to 7.44 s really; taken for 16 kHz everything lies 1.5 times later.
    assert corrected[0].start == pytest.approx(0.5, abs=0.11)
    assert corrected[-1].end == pytest.approx(7.44, abs=0.11)
    assert official[0].start == pytest.approx(0.75, abs=0.16)
    assert official[-1].end == pytest.approx(11.16, abs=0.25)
    at_16 = resample(audio, 24000, 16000)
    assert official_speech(at_16, 16000, compatible=True) == official_speech(at_16, 16000) == corrected


def test_speech_ends_with_the_audio_at_the_latest(spoken):
    audio = resample(spoken.audio[: 10 * spoken.rate, spoken.user], spoken.rate, 16000)[: int(6.97 * 16000)]
    assert official_speech(audio, 16000)[-1].end == pytest.approx(6.97)  # as Silero says it; rounded, it would be 7.0


def test_fault_3_nothing_is_looked_at_after_a_long_interval():
    speech = [Interval(1.0, 1.5), Interval(2.0, 5.5), Interval(7.0, 7.4)]
    corrected, official = (backchannel(speech, [], SECONDS, None, compatible) for compatible in (False, True))
    assert corrected == {"takeover_rate": 1.0, "frequency": 0.2}
    assert official == {"takeover_rate": 1.0, "frequency": 0.1}


def test_fault_4_a_mean_of_nothing():
    assert math.isnan(official_mean({}))
    assert official_mean({"a": 1.0, "b": 2.0}) == 1.5


def test_divergence_by_hand():
    # 0.8 s are bins 0.0, 0.2, 0.4, 0.6 and one more; an interval from 0.2 to 0.5 counts in the second and third.
    counts = np.array([0, 1, 1, 0, 0]) + 1e-10
    human = [0.2, 0.2, 0.2, 0.2, 0.2]
    expected = jensenshannon(counts / counts.sum(), human)
    assert backchannel_divergence([Interval(0.2, 0.5)], 0.85, human) == pytest.approx(expected)
    # By the formula: m = (0.1, 0.35, 0.35, 0.1, 0.1); KL(p|m) = 2 * 0.5 ln(0.5 / 0.35); KL(q|m) = 3 * 0.2 ln 2
    # + 2 * 0.2 ln(0.2 / 0.35); the distance is the root of half their sum.
    by_hand = math.sqrt((math.log(0.5 / 0.35) + 0.6 * math.log(2) + 0.4 * math.log(0.2 / 0.35)) / 2)
    assert expected == pytest.approx(by_hand, abs=1e-5)
    # Three human bins over five: 0.1, 0.3, 0.6 become 0.1, 0.2, 0.3, 0.45, 0.6, normalised by the distance.
    resampled = jensenshannon(counts / counts.sum(), [0.1, 0.2, 0.3, 0.45, 0.6])
    assert backchannel_divergence([Interval(0.2, 0.5)], 0.85, [0.1, 0.3, 0.6]) == pytest.approx(resampled)
    assert backchannel_divergence([], 0.85, human) == 1.0
    # The one human share lies between the bins that the curve is read at: nothing to compare with, so no value.
    empty = [0.0, 1.0, *[0.0] * 19]
    assert math.isnan(backchannel_divergence([Interval(0.2, 0.5)], 0.85, empty))
    assert "jsd" not in backchannel([Interval(0.2, 0.5)], [], 0.85, empty)


def test_overlap_metrics_by_hand():
    user = [Interval(0.0, 2.0), Interval(2.5, 4.0), Interval(8.0, 9.0)]  # 0.5 s apart: one stretch of 0 to 4
    agent = [Interval(3.0, 5.0), Interval(5.4, 6.0), Interval(9.5, 10.0)]  # 0.4 s apart: one stretch of 3 to 6
    # Overlap 3 to 4: 1 s. Responses: 4 -> 9.5 is taken by 9 -> 9.5, which ends later.
    assert overlap_metrics(user, agent) == {"stop_latency": pytest.approx(1.0), "response_latency": pytest.approx(0.5)}
    assert overlap_metrics(user, []) == {}
    assert overlap_metrics([], agent) == {}


def test_overlaps_and_gaps():
    user, agent = [Interval(0, 4), Interval(6, 7)], [Interval(1, 2), Interval(3, 6.5), Interval(8, 9)]
    assert overlaps(user, agent) == [Interval(1, 2), Interval(3, 4), Interval(6, 6.5)]
    assert response_gaps(user, agent) == [Interval(7, 8)]  # 4 -> 8 leads to the same beginning


def test_users_and_agents_gaps_are_not_the_same():
    # A silence of 0.55 s is within a stretch of the user's (0.6 s), and parts two of the agent's (0.5 s).
    parted, whole = [Interval(0.0, 1.0), Interval(1.55, 3.0)], [Interval(0.0, 3.0)]
    assert overlap_metrics(parted, whole) == {"stop_latency": pytest.approx(3.0)}
    assert overlap_metrics(whole, parted) == {"stop_latency": pytest.approx((1.0 + 1.45) / 2)}


def test_three_seconds_are_not_yet_long():
    assert backchannel([Interval(1.0, 4.0)], [], 10.0, None) == {"takeover_rate": 1.0, "frequency": 0.1}
