import numpy as np
import pytest
import soundfile

from envs import InputError, SileroDetector
from envs.streaming import SpeechStream, stream_speech


@pytest.fixture(scope="module")
def silero():
    return SileroDetector()


def dialogue(voice, rate, seconds=47.3):
    """Two channels of speech amid silence: long and short pauses, and speech at both ends."""
    audio = np.random.default_rng(0).normal(0, 1e-4, (round(seconds * rate), 2)).astype(np.float32)
    spans = [
        [(0.0, 1.3), (2.5, 6.1), (6.4, 9.0), (20.0, 33.7), (34.3, 36.0)],
        [(9.2, 14.0), (16.0, 16.6), (44.0, seconds)],
    ]
    for channel, parts in enumerate(spans):
        for start, end in parts:
            said = voice(end - start, rate, pitch=110.0 + 50 * channel)
            begin = round(start * rate)
            audio[begin : begin + len(said), channel] += said[: len(audio) - begin]
    return audio


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
@pytest.mark.parametrize("block_seconds", [0.37, 30.0])
def test_blocks_give_what_the_whole_gives(tmp_path, silero, voice, rate, block_seconds):
    soundfile.write(str(tmp_path / "a.wav"), dialogue(voice, rate), rate, subtype="FLOAT")
    audio, _ = soundfile.read(str(tmp_path / "a.wav"), dtype="float32")
    whole = silero.detect(list(audio.T), rate)
    streamed, lasts = stream_speech([(tmp_path / "a.wav", [0, 1])], silero, block_seconds)
    assert [len(side) for side in streamed] == [len(side) for side in whole]
    assert min(len(side) for side in whole) >= 3
    for side, expected in zip(streamed, whole, strict=True):
        assert np.allclose(side, expected, atol=1e-6)
    assert lasts == pytest.approx([47.3, 47.3], abs=1e-3)


def test_probabilities_become_intervals_as_they_come(silero, voice):
    # 80 s with silences of more than a second: by the end, nearly everything has been made an interval already.
    audio = np.tile(dialogue(voice, 16000), (4, 1))
    stream = SpeechStream(silero, [16000, 16000])
    waiting = []
    for block in np.split(audio, range(16000, len(audio), 16000)):
        stream.push(list(block.T))
        waiting.append(max(len(piece._waiting) for piece in stream._pieces))
    assert max(waiting) < 2 * 1000  # windows: 64 s, however long the recording
    for side, expected in zip(stream.finish(), silero.detect(list(audio.T), 16000), strict=True):
        assert np.allclose(side, expected, atol=1e-6)


def test_two_files_of_other_rates_and_lengths(tmp_path, silero, voice):
    audio = dialogue(voice, 16000)
    soundfile.write(str(tmp_path / "a.wav"), audio[:, 0], 16000, subtype="FLOAT")
    soundfile.write(str(tmp_path / "b.wav"), dialogue(voice, 24000)[:-12000, 1], 24000, subtype="FLOAT")
    (first, second), lasts = stream_speech([(tmp_path / "a.wav", [0]), (tmp_path / "b.wav", [0])], silero, 5.0)
    (alone,) = silero.detect([audio[:, 0]], 16000)
    assert np.allclose(first, alone, atol=1e-6)
    assert lasts == pytest.approx([47.3, 46.8], abs=1e-3)
    assert second[-1].end == pytest.approx(46.8, abs=1e-3)  # it speaks to its end, and what pads it is no audio


def test_damaged_audio_is_named(tmp_path, silero):
    noise = np.random.default_rng(0).normal(0, 0.1, (48000, 2)).astype(np.float32)
    soundfile.write(str(tmp_path / "cut.flac"), noise, 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut.flac .*(truncated|cannot be read)"):
        stream_speech([(tmp_path / "cut.flac", [0, 1])], silero, 0.5)
    noise[30000, 1] = np.nan
    soundfile.write(str(tmp_path / "nan.wav"), noise, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"nan.wav holds NaN or infinite samples after 1.5 s"):
        stream_speech([(tmp_path / "nan.wav", [0, 1])], silero, 0.5)
    with pytest.raises(InputError, match=r"channel 2 of .* is out of range: the file has 2"):
        stream_speech([(tmp_path / "nan.wav", [0, 2])], silero)


def test_a_truncated_mp3_is_not_heard_again_and_again(tmp_path, silero, voice, write_mp3):
    path = write_mp3(tmp_path / "cut.mp3", dialogue(voice, 16000), 16000, share=0.5)
    # Blocks longer than what is there, and shorter.
    for block_seconds in (1.0, 30.0):
        with pytest.raises(InputError, match=r"cut.mp3 is truncated: 2\d.\d of 47.3 s are there: get it again"):
            stream_speech([(path, [0, 1])], silero, block_seconds)
    whole = write_mp3(tmp_path / "whole.mp3", dialogue(voice, 16000), 16000)
    _, lasts = stream_speech([(whole, [0, 1])], silero, 30.0)
    assert lasts == pytest.approx([47.3, 47.3], abs=0.01)
