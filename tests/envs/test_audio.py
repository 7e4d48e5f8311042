import librosa
import numpy as np
import pytest
import soundfile

from envs import InputError
from envs.audio import audio_info, read_audio, resample, write_audio


def test_a_channel_and_a_window_of_it(tmp_path):
    left, right = np.full(16000, 0.25), np.linspace(0, 0.5, 16000)
    soundfile.write(str(tmp_path / "a.wav"), np.stack([left, right], 1), 16000)
    assert audio_info(tmp_path / "a.wav") == (16000, 2, 1.0)
    audio = read_audio(tmp_path / "a.wav", 1, 16000, 0.25, 0.75)
    assert audio.dtype == np.float32
    np.testing.assert_allclose(audio, right[4000:12000], atol=1 / 32768)
    # At half the rate there are half as many samples.
    assert read_audio(tmp_path / "a.wav", 0, 8000).shape == (8000,)


def test_an_end_rounded_past_the_last_sample_is_accepted(write_dialogue):
    assert len(read_audio(write_dialogue(seconds=2.0), 0, 16000, 1.0, 2.0004)) == 16000


def test_what_cannot_be_read_says_why(tmp_path, write_dialogue):
    (tmp_path / "corrupt.flac").write_bytes(b"this is no audio")
    (tmp_path / "empty.wav").touch()
    bad = np.zeros((16000, 2), dtype=np.float32)
    bad[100, 1] = np.nan
    soundfile.write(str(tmp_path / "nan.wav"), bad, 16000, subtype="FLOAT")
    stereo = write_dialogue(seconds=2.0)
    mono = write_dialogue("mono.flac", channels=1)
    cases = [
        ("does not exist", tmp_path / "missing.wav", 0, 0.0, None),
        ("cannot be read as audio .* corrupt or empty", tmp_path / "corrupt.flac", 0, 0.0, None),
        ("cannot be read as audio .* corrupt or empty", tmp_path / "empty.wav", 0, 0.0, None),
        ("has 1 channel.*, 2 are needed", mono, 0, 0.0, None),
        ("channel 2 of .* is out of range: the file has channels 0 to 1", stereo, 2, 0.0, None),
        ("1.000-3.000 s lies outside .*, which lasts 2.000 s", stereo, 0, 1.0, 3.0),
        ("1.500-1.000 s lies outside", stereo, 0, 1.5, 1.0),
        ("NaN or infinite samples on channel 1", tmp_path / "nan.wav", 1, 0.0, None),
    ]
    for message, path, channel, start, end in cases:
        with pytest.raises(InputError, match=message):
            read_audio(path, channel, 16000, start, end)
    assert len(read_audio(tmp_path / "nan.wav", 0, 16000)) == 16000  # the other channel is whole


def test_writing_is_whole_or_not_at_all_and_clips(tmp_path):
    write_audio(tmp_path / "new" / "a.flac", np.array([0.5, 2.0, -2.0], dtype=np.float32), 8000)
    audio, rate = soundfile.read(str(tmp_path / "new" / "a.flac"))
    assert rate == 8000
    np.testing.assert_allclose(audio, [0.5, 1.0, -1.0], atol=1e-4)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.flac"]


def test_resampling_keeps_a_tone():
    tone = np.sin(2 * np.pi * 440 * np.arange(24000) / 24000).astype(np.float32)
    lower = resample(tone, 24000, 8000)
    expected = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(lower[200:-200], expected[200:-200], atol=1e-2)
    assert resample(tone, 24000, 24000) is tone


@pytest.mark.parametrize(("shape", "source", "target"), [((7,), 8000, 24000), ((2, 3, 99), 44100, 16000), ((0,), 8, 4)])
def test_resampling_is_that_of_librosa(shape, source, target):
    audio = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = librosa.resample(audio, orig_sr=source, target_sr=target, res_type="soxr_hq")
    np.testing.assert_array_equal(resample(audio, source, target), expected)


def noise(rate, seconds):
    return np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), 2))


def test_a_truncated_mp3_says_how_much_is_there(tmp_path, write_mp3):
    # libsndfile announces all of it, and reads it in silence up to where it ends.
    path = write_mp3(tmp_path / "cut.mp3", noise(16000, 40.0), 16000, share=0.4)
    assert audio_info(path)[2] == pytest.approx(40, abs=0.01)
    assert len(read_audio(path, 0, 16000, 2.0, 8.0)) == 6 * 16000
    for start, end in [(0.0, None), (5.0, 30.0), (30.0, 35.0)]:
        with pytest.raises(
            InputError, match=r"cut.mp3 is truncated: 1\d.\d of 40.0 s are there: get it again, or conv"
        ):
            read_audio(path, 0, 16000, start, end)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_an_mp3_whose_header_promises_a_frame_too_much_is_whole(tmp_path, write_mp3, rate):
    path = write_mp3(tmp_path / "a.mp3", noise(rate, 10.0), rate, tag=False, mode="CONSTANT")
    promised = audio_info(path)[2]
    assert 10.0 <= len(read_audio(path, 0, rate)) / rate <= promised < 10.2
    assert len(read_audio(path, 0, rate, 0.0, 10.0)) == 10 * rate


@pytest.mark.parametrize("front", [b"", b"ID3\x04\x00\x00\x00\x00\x08\x00" + b"\xff\xfb" * 512])
def test_an_mp3_of_unknown_length_is_refused(tmp_path, write_mp3, front):
    def with_front(tag, mode):
        path = write_mp3(tmp_path / "a.mp3", audio, 24000, tag=tag, mode=mode)
        path.write_bytes(front + path.read_bytes())
        return path

    audio = noise(24000, 20.0) * np.repeat([1.0, 0.001, 0.3, 0.0], 5 * 24000)[:, None]
    for mode in ("VARIABLE", "AVERAGE", "CONSTANT"):
        assert audio_info(with_front(True, mode))[2] == pytest.approx(20.0, abs=1e-3)
    for mode in ("VARIABLE", "AVERAGE", "CONSTANT"):
        path = with_front(False, mode)
        seconds = soundfile.info(str(path)).duration
        if mode == "CONSTANT":
            assert audio_info(path)[2] == pytest.approx(20.0, abs=0.15)
            continue
        assert abs(seconds - 20.0) > 0.15  # what libsndfile makes of it
        with pytest.raises(InputError, match=r"a.mp3 is an mp3 that does not say .* a guess: convert it to FLAC"):
            audio_info(path)


def id3(content, version=4, footer=False):
    size = bytes(len(content) >> shift & 127 for shift in (21, 14, 7, 0))
    head = bytes([version, 0, 16 if footer else 0]) + size
    return b"ID3" + head + content + (b"3DI" + head if footer else b"")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("size", [300, 2000, 20000])
def test_a_constant_mp3_behind_a_tag_is_read_exactly(tmp_path, write_mp3, rate, size):
    path = write_mp3(tmp_path / "a.mp3", noise(rate, 20.0), rate, tag=False, mode="CONSTANT")
    seconds, whole, data = audio_info(path)[2], read_audio(path, 0, rate), path.read_bytes()
    part = read_audio(path, 0, rate, 7.0, 9.0)
    for front in (id3(bytes(size)), id3(b"x" * 99, 3) + id3(bytes(size), footer=True)):
        path.write_bytes(front + data)
        assert soundfile.info(str(path)).duration > seconds + 0.01  # which takes the tag for sound
        assert audio_info(path)[2] == pytest.approx(seconds, abs=2e-3)
        assert len(read_audio(path, 0, rate)) == pytest.approx(len(whole), abs=2e-3 * rate)
        np.testing.assert_allclose(read_audio(path, 0, rate, 7.0, 9.0), part, atol=1e-4)
        path.write_bytes(front + data[: len(data) // 2])  # what is left seems whole, but its length is right
        assert audio_info(path)[2] == pytest.approx(seconds / 2, abs=0.1)
