"""Speech for rewrites: word times where nobody knows them, level and silence, and nano's voice itself."""

import numpy as np
import pytest

from envs.episode import Word
from envs.errors import InputError
from envs.speech import EnergyDetector, Interval
from rlhf_duplex.data.synthesis import HibariSynthesiser, Speech, fitted, make_synthesiser, share_out


def test_speech_is_shared_out_by_letters():
    # Weights 2 + letters, + 2 before a full stop: ab 4, abcd. 8; 1.2 s of speech in all.
    words = share_out(["ab", "abcd."], [Interval(1.0, 2.2)])
    assert [w.text for w in words] == ["ab", "abcd"]
    assert [(w.start, w.end) for w in words] == [pytest.approx((1.0, 1.4)), pytest.approx((1.4, 2.2))]


def test_a_word_never_begins_in_a_silence():
    # 0.4 s, a silence of a second, 0.8 s: the first word ends where the silence begins, the second begins after it.
    words = share_out(["ab", "abcd."], [Interval(1.0, 1.4), Interval(2.4, 3.2)])
    assert [(w.start, w.end) for w in words] == [pytest.approx((1.0, 1.4)), pytest.approx((2.4, 3.2))]
    # A word may run through one.
    words = share_out(["abcd", "ab"], [Interval(1.0, 1.3), Interval(2.0, 2.7)])
    assert [(w.start, w.end) for w in words] == [pytest.approx((1.0, 2.3)), pytest.approx((2.3, 2.7))]


def test_speech_is_cut_and_levelled(voice_like):
    audio = np.concatenate([np.zeros(4000), voice_like, np.zeros(8000)]).astype(np.float32)
    known = (Word("a", 0.5, 1.0), Word("b", 1.0, 1.5), Word("late", 9.0, 9.5))
    speech = fitted(Speech(audio, 8000, known), "a b", 16000, 0.05, EnergyDetector())
    assert speech.sample_rate == 16000
    assert len(speech.audio) / 16000 == pytest.approx(1.0, abs=0.1)
    assert np.sqrt(np.mean(speech.audio**2)) == pytest.approx(0.05, rel=1e-3)
    assert [w.text for w in speech.words] == ["a", "b"]
    assert speech.words[0].start == pytest.approx(0.0, abs=0.05)
    assert speech.words[1].start == pytest.approx(0.5, abs=0.05)
    with pytest.raises(InputError, match="said nothing for 'a b'"):
        fitted(Speech(np.zeros(8000, np.float32), 8000), "a b", 8000, 0.05, EnergyDetector())


@pytest.fixture
def voice_like():
    """A second of a buzz."""
    return 0.3 * np.sign(np.sin(2 * np.pi * 150 * np.arange(8000) / 8000))


def test_nanos_voice(silero):
    synthesiser = HibariSynthesiser()
    text = "That sounds like a good plan to me."
    first, second = (synthesiser.speak(text) for _ in range(2))
    assert np.array_equal(first.audio, second.audio)
    speech = fitted(first, text, 8000, 0.08, silero)
    assert [w.text for w in speech.words] == text.strip(".").split()
    assert speech.words[-1].end == pytest.approx(len(speech.audio) / 8000, abs=0.01)
    assert 1.0 < len(speech.audio) / 8000 < 5.0
    assert silero.detect([speech.audio], 8000)[0]


def test_which_synthesiser():
    assert isinstance(make_synthesiser("hibari", None, "cpu"), HibariSynthesiser)
    with pytest.raises(InputError, match="'festival' is not known: choose hibari or moshi"):
        make_synthesiser("festival", None, "cpu")
    with pytest.raises(InputError, match="moshi needs a voice"):
        make_synthesiser("moshi", None, "cpu")
