import numpy as np
import pytest
import soundfile

from envs import EnergyDetector, InputError, Segment, complete_events

RATE = 16000
TOLERANCE = 0.045
"""The energy detector's window is 40 ms."""


@pytest.fixture
def segment(tmp_path):
    """A function that writes tones as the speech of user (channel 1) and agent, and gives a segment over 1-12 s."""

    def make(axis, user, agent, events=None):
        times = np.arange(13 * RATE) / RATE
        tone = 0.2 * np.sin(2 * np.pi * 220 * times)
        channels = []
        for spans in (agent, user):
            on = sum(((times >= a) & (times < b) for a, b in spans), np.zeros_like(times, dtype=bool))
            channels.append(tone * on)
        soundfile.write(str(tmp_path / "d.wav"), np.stack(channels, 1), RATE)
        return Segment("s", axis, tmp_path / "d.wav", 1, 1.0, 12.0, events or {})

    return make


def completed(segment):
    return complete_events([segment], EnergyDetector())[0].events


def test_pauses_are_the_silences_inside_an_utterance(segment):
    # 0.6 s of silence is a pause, the 3 s before the next utterance are not.
    events = completed(segment("pause_handling", [(2, 4), (4.6, 6), (9, 10)], []))
    assert np.allclose(events["pauses"], [[4.0, 4.6]], atol=TOLERANCE)


def test_the_turn_ends_with_the_first_utterance(segment):
    events = completed(segment("turn_taking", [(2, 4), (4.6, 6), (9, 10)], [(6.2, 8)]))
    assert events["user_turn_end"] == pytest.approx(6.0, abs=TOLERANCE)


def test_true_backchannels_are_short_agent_utterances(segment):
    events = completed(segment("backchannel", [(2, 11)], [(3, 3.5), (6, 8)]))
    assert np.allclose(events["true_backchannels"], [[3.0, 3.5]], atol=TOLERANCE)
    assert completed(segment("backchannel", [(2, 11)], []))["true_backchannels"] == []


def test_the_interruption_starts_while_the_agent_speaks(segment):
    user, agent = [(1.5, 3), (5, 7), (9.5, 11)], [(3.2, 5.4), (7.3, 9)]
    assert np.allclose(completed(segment("user_interruption", user, agent))["interruption"], [5, 7], atol=TOLERANCE)
    # Where none barges in, the last one is taken.
    assert np.allclose(completed(segment("user_interruption", user, []))["interruption"], [9.5, 11], atol=TOLERANCE)


def test_events_that_are_there_stay_and_the_audio_is_not_read(segment):
    given = segment("turn_taking", [(2, 4)], [], {"user_turn_end": 3.0})
    given.recording.unlink()
    assert complete_events([given], EnergyDetector()) == [given]


def test_a_segment_without_user_speech_is_refused(segment):
    with pytest.raises(
        InputError, match=r"segment 's' of .* holds no user speech on channel 1: is `user_channel` right"
    ):
        completed(segment("turn_taking", [], [(2, 4)]))


def test_an_interruption_comes_after_the_users_first_utterance(segment):
    # The user's first utterance begins while the agent ends what came before: the second one barges in.
    user, agent = [(1.5, 3), (5, 7)], [(1.1, 2.0), (3.2, 5.4)]
    assert np.allclose(completed(segment("user_interruption", user, agent))["interruption"], [5, 7], atol=TOLERANCE)


def test_true_backchannels_are_whole_utterances_of_at_most_a_second(segment):
    # 0.4 and 0.5 s with 0.4 s between them are one utterance of 1.3 s; 0.9 s are a backchannel.
    agent = [(3, 3.4), (3.8, 4.3), (6, 6.9), (9, 10.1)]
    assert np.allclose(
        completed(segment("backchannel", [(2, 11)], agent))["true_backchannels"], [[6, 6.9]], atol=TOLERANCE
    )


def test_a_hole_shorter_than_that_between_units_is_neither_a_pause_nor_a_second_backchannel(segment):
    # 0.15 s: the detector hears two stretches, which are one inter-pausal unit.
    user, agent = [(2, 4), (4.15, 6)], [(3, 3.2), (3.35, 3.7)]
    assert completed(segment("pause_handling", user, []))["pauses"] == []
    found = completed(segment("backchannel", [(2, 11)], agent))["true_backchannels"]
    assert np.allclose(found, [[3.0, 3.7]], atol=TOLERANCE)
