import subprocess
import sys

import numpy as np
import pytest
import torch

from envs import EnergyDetector, InputError, Interval, SileroDetector, make_detector
from envs.speech import pad_batch


@pytest.fixture(scope="module")
def silero():
    return SileroDetector()


@pytest.fixture(scope="module")
def stock():
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)
    return load_silero_vad()


def clips_at(voice, rate):
    """Speech amid silence, long speech, noise, less than a window, one sample, nothing: all of different lengths."""
    quiet = np.zeros(rate // 2, dtype=np.float32)
    noise = np.random.default_rng(1).normal(0, 0.02, int(1.23 * rate)).astype(np.float32)
    return [
        np.concatenate([quiet, voice(1.7, rate), quiet, quiet, voice(1.1, rate, pitch=100.0), quiet]),
        voice(3.0 + 0.0137, rate),
        noise,
        voice(0.01, rate),
        np.ones(1, dtype=np.float32) * 0.1,
        np.zeros(0, dtype=np.float32),
    ]


@pytest.mark.parametrize("rate", [8000, 16000])
def test_batched_silero_equals_the_stock_package_one_by_one(stock, voice, rate):
    from silero_vad import get_speech_timestamps

    silero = SileroDetector(sample_rate=rate)
    clips = clips_at(voice, rate)
    window = 512 if rate == 16000 else 256
    batch, lengths = pad_batch(clips)
    probabilities = silero.probabilities(batch)
    found = silero.detect(clips, rate)
    assert found[0], "Silero must hear speech in the first clip, or this test compares nothing"
    assert found[1]
    for clip, row, length, intervals in zip(clips, probabilities, lengths, found, strict=True):
        if length == 0:
            assert intervals == []
            continue
        count = -(-length // window)
        padded = torch.zeros(count * window)
        padded[:length] = torch.as_tensor(clip)
        stock.reset_states()
        one_by_one = torch.tensor([stock(part, rate).item() for part in padded.split(window)])
        # Both are rounded: ours lies nearer to what the network gives in float64.
        torch.testing.assert_close(row[:count], one_by_one, atol=5e-5, rtol=0)
        stamps = get_speech_timestamps(
            torch.as_tensor(clip), stock, sampling_rate=rate, threshold=0.5, min_speech_duration_ms=200
        )
        assert intervals == [Interval(s["start"] / rate, s["end"] / rate) for s in stamps]


def test_silero_does_not_depend_on_the_batch_or_its_order(silero, voice):
    clips = clips_at(voice, 16000)
    together = silero.detect(clips, 16000)
    assert together == [silero.detect([clip], 16000)[0] for clip in clips]
    assert together[::-1] == silero.detect(clips[::-1], 16000)


@pytest.mark.parametrize(("rate", "network"), [(24000, 16000), (8000, 16000), (24000, 8000)])
def test_silero_resamples_other_rates_instead_of_misreading_them(voice, rate, network):
    silence = np.zeros(rate, dtype=np.float32)
    clip = np.concatenate([silence, voice(2.0, rate), silence])
    (intervals,) = SileroDetector(sample_rate=network).detect([clip], rate)
    # Speech from 1 to 3 s of the clip; read as 16 kHz it would end at 4.5 s.
    assert 0.9 < intervals[0].start < 1.5
    assert 2.8 < intervals[-1].end < 3.2


def test_silero_of_no_clips_and_of_empty_clips(silero):
    assert silero.detect([], 16000) == []
    assert silero.detect([np.zeros(0, dtype=np.float32)] * 2, 16000) == [[], []]


def test_importing_envs_does_not_load_silero_or_limit_threads():
    code = "import sys, envs; sys.exit('silero_vad' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def tone(rate, *spans, seconds=4.0, level=0.2):
    times = np.arange(round(seconds * rate)) / rate
    on = np.zeros_like(times, dtype=bool)
    for start, end in spans:
        on |= (times >= start) & (times < end)
    return (level * np.sin(2 * np.pi * 220 * times) * on).astype(np.float32)


def test_energy_detector_finds_known_times():
    # Two tones 0.6 s apart; the energy window is 40 ms wide, so an edge may move by as much.
    clip = tone(16000, (0.5, 1.5), (2.1, 3.0)) + np.random.default_rng(0).normal(0, 1e-4, 64000).astype(np.float32)
    (found,) = EnergyDetector().detect([clip], 16000)
    assert np.allclose(found, [(0.5, 1.5), (2.1, 3.0)], atol=0.041)


def test_energy_detector_joins_short_silences_and_drops_short_speech():
    # 60 ms of silence is below `min_silence_seconds` 0.1; a tone of 0.1 s is below `min_speech_seconds` 0.2.
    (found,) = EnergyDetector().detect([tone(8000, (0.5, 1.0), (1.06, 1.6), (3.0, 3.1))], 8000)
    assert len(found) == 1
    assert np.allclose(found[0], (0.5, 1.6), atol=0.041)


def test_energy_detector_on_silence_on_speech_throughout_and_on_nothing():
    silence, loud, nothing = np.zeros(16000, dtype=np.float32), tone(16000, (0, 1), seconds=1), np.zeros(0)
    found = EnergyDetector().detect([silence, loud, nothing], 16000)
    assert found[0] == []
    assert np.allclose(found[1], [(0.0, 1.0)], atol=0.041)
    assert found[2] == []


def test_make_detector_says_what_is_wrong():
    assert isinstance(make_detector("energy", above_floor_db=6.0), EnergyDetector)
    with pytest.raises(InputError, match="unknown speech detector 'webrtc': choose one of silero, energy"):
        make_detector("webrtc")
    with pytest.raises(InputError, match=r"speech detector 'energy': .*treshold"):
        make_detector("energy", treshold=0.5)


def test_interval_overlap():
    assert Interval(0, 2).overlap(Interval(1.5, 3)) == 0.5
    assert Interval(0, 1).overlap(Interval(1, 2)) == 0.0
    assert Interval(0.5, 2.0).duration == 1.5
