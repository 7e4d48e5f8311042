"""The agent's words, counted by hand."""

import numpy as np
import pytest

from envs.episode import Episode
from envs.segments import Segment
from rewards.repetition import repeated_share, words_of
from rlhf_duplex.evaluation.words import spoken_vocabulary, word_metrics


def _segment(*words: tuple[str, str]) -> Segment:
    transcript = tuple((word, (0.0, 1.0), speaker) for word, speaker in words)
    return Segment("s", "turn_taking", "a.wav", 1, 0.0, 2.0, {"user_turn_end": 1.0}, transcript)


def _episode(text: str) -> Episode:
    silence = np.zeros(16000, np.float32)
    return Episode(
        segment=_segment(), user_audio=silence, agent_audio=silence, sample_rate=8000, user_speech=(), agent_speech=(),
        duration=2.0, scored_from=0.0, text=text,
    )  # fmt: skip


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("It's a MM-hm, well ... 3!") == ["it's", "a", "mm-hm", "well", "3"]


def test_the_vocabulary_is_what_agents_say() -> None:
    words, pairs = spoken_vocabulary([_segment(("Call", "agent"), ("me", "user"), ("them.", "agent"))])
    assert words == {"call", "them"}
    assert pairs == {("call", "them")}


def test_repeated_ngrams_are_counted_by_hand() -> None:
    # abcd bcda cdab dabc abcd: one of five occurred before.
    assert repeated_share(list("abcdabcd"), 4) == pytest.approx(1 / 5)
    assert repeated_share(list("abc"), 4) is None


def test_word_metrics_by_hand() -> None:
    vocabulary, pairs = frozenset({"call", "them", "now"}), frozenset({("call", "them"), ("them", "now")})
    found = word_metrics(_episode("Call them xyz now."), vocabulary, pairs)
    assert found == {"known": 3 / 4, "known_pairs": 1 / 3, "repeated_4grams": 0.0}


def test_silence_has_no_word_metrics() -> None:
    assert word_metrics(_episode(""), frozenset({"a"}), frozenset()) == {}
