from pathlib import Path

import numpy as np
import pytest

from envs import EnergyDetector, Episode, InputError, Interval, Segment, Word, recorded_episode


def an_episode(folder, **changes):
    """A segment from 10 to 16 s of its recording, after 2 s that are not scored."""
    segment = Segment(
        "s0",
        "backchannel",
        folder / "dialogue.flac",
        1,
        10.0,
        16.0,
        {"true_backchannels": [[12.0, 12.5]], "user_turn_end": 15.0, "interruption": [13.0, 14.0], "pauses": []},
        (("yes", [12.0, 12.4], "agent"),),
    )
    rng = np.random.default_rng(0)
    values = {
        "user_audio": rng.uniform(-0.5, 0.5, 64000).astype(np.float32),
        "agent_audio": rng.uniform(-0.5, 0.5, 63360).astype(np.float32),
        "sample_rate": 8000,
        "user_speech": [Interval(1.0, 4.0), Interval(5.0, 7.0)],
        "agent_speech": [Interval(0.5, 1.5), Interval(1.8, 2.6), Interval(4.1, 4.5)],
        "duration": 8.0,
        "scored_from": 2.0,
        "text": "Über das, ja",
        "text_tokens": np.arange(100),
        "audio_tokens": np.full((16, 100), -1),
        "log_probs": rng.normal(size=100).astype(np.float32),
        "policy_version": 3,
        "words": (Word("Über", 0.5, 0.8), Word("das,", 0.88, 1.2), Word("ja", 4.1, 4.2)),
    }
    return Episode(segment, **(values | changes))


def test_events_in_episode_time(tmp_path):
    episode = an_episode(tmp_path)
    # The segment's 10 s are the episode's 2 s: 8 s less.
    assert episode.event_time("user_turn_end") == 7.0
    assert episode.event_intervals("true_backchannels") == [Interval(4.0, 4.5)]
    assert episode.event_intervals("interruption") == [Interval(5.0, 6.0)]
    assert episode.event_intervals("pauses") == []
    assert episode.event_time("nothing") is None
    assert episode.event_intervals("nothing") is None


def test_the_scored_window_leaves_out_what_precedes_the_segment(tmp_path):
    episode = an_episode(tmp_path)
    assert episode.scored_user_speech == [Interval(2.0, 4.0), Interval(5.0, 7.0)]
    assert episode.scored_agent_speech == [Interval(2.0, 2.6), Interval(4.1, 4.5)]
    # 2 s at 12.5 frames a second: the first 25 frames are not scored.
    mask = episode.frame_mask(12.5)
    assert (mask.sum(), mask[24], mask[25]) == (75, False, True)


@pytest.mark.parametrize("tokens", [True, False])
def test_an_episode_comes_back_as_it_was_saved(tmp_path, tokens):
    nothing = {} if tokens else {"text_tokens": None, "audio_tokens": None, "log_probs": None}
    episode = an_episode(tmp_path, **nothing)
    episode.save(tmp_path / "episodes" / "e0")
    episode.save(tmp_path / "episodes" / "e0")  # again over itself
    loaded = Episode.load(tmp_path / "episodes" / "e0")
    assert [p.name for p in (tmp_path / "episodes").iterdir()] == ["e0"]
    assert loaded.segment == episode.segment
    for name in (
        "sample_rate",
        "user_speech",
        "agent_speech",
        "duration",
        "scored_from",
        "text",
        "words",
        "policy_version",
    ):
        assert getattr(loaded, name) == getattr(episode, name), name
    for name in ("user_audio", "agent_audio"):
        np.testing.assert_allclose(getattr(loaded, name), getattr(episode, name), atol=1 / 32768)
    for name in ("text_tokens", "audio_tokens", "log_probs"):
        before, after = getattr(episode, name), getattr(loaded, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["episode.json", "tokens.safetensors", "audio.flac"])
def test_a_damaged_episode_is_named(tmp_path, name):
    an_episode(tmp_path).save(tmp_path / "e0")
    (tmp_path / "e0" / name).write_bytes(b"damaged")
    with pytest.raises(InputError, match="e0 is not a whole episode"):
        Episode.load(tmp_path / "e0")
    (tmp_path / "e0" / name).unlink()
    with pytest.raises(InputError, match="e0 is not a whole episode"):
        Episode.load(tmp_path / "e0")


def test_the_recording_as_an_episode(write_dialogue):
    segment = Segment("s", "turn_taking", Path(write_dialogue()), 0, 2.0, 6.0, {}, (("hi", [3, 4], "agent"),))
    episode = recorded_episode(segment, EnergyDetector())
    assert (episode.duration, episode.scored_from, episode.text) == (4.0, 0.0, "hi")
    assert len(episode.user_audio) == len(episode.agent_audio) == 64000
    assert not np.array_equal(episode.user_audio, episode.agent_audio)
