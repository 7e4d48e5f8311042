"""Logged conversations: what is read, and everything that can be wrong with a corpus."""

import json

import numpy as np
import pytest
import soundfile

from envs.episode import Word
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import Interval
from rlhf_duplex.data.conversation import (
    Conversation,
    Entry,
    check_words,
    read_conversation,
    read_corpus,
    recorded_seconds,
    write_conversation,
)
from rlhf_duplex.data.converse import _longer

RATE = 8000
NOISE = np.random.default_rng(0).normal(0, 0.1, (2, 10 * RATE)).astype(np.float32)
AGENT = [Word("hello", 1.0, 1.4), Word("there", 1.4, 1.9)]
USER = [Word("well", 3.0, 3.5), Word("hi", 3.6, 4.0)]


@pytest.fixture
def entry(tmp_path):
    return write_conversation(tmp_path / "a.wav", NOISE[0], NOISE[1], RATE, AGENT, USER)


def read(entry):
    return read_conversation(entry, RATE)


def test_what_is_written_is_read(entry):
    log = read(entry)
    assert log.agent_words == tuple(AGENT)
    assert log.user_words == tuple(USER)
    np.testing.assert_allclose(log.agent_audio, NOISE[0], atol=1e-4)  # left is the agent
    np.testing.assert_allclose(log.user_audio, NOISE[1], atol=1e-4)
    assert json.loads(entry.path.with_suffix(".json").read_text())["alignments"][0] == [
        "hello",
        [1.0, 1.4],
        "SPEAKER_MAIN",
    ]


def test_a_corpus_is_a_list_or_a_folder(tmp_path, entry):
    assert [e.path for e in read_corpus(tmp_path)] == [entry.path]
    (tmp_path / "data.jsonl").write_text('{"path": "a.wav", "duration": 10.0}\n\n')
    for other in ('{"id": "s", "axis": "turn_taking", "recording": "a.wav"}', '{"id": "p", "shard": "s"}'):
        (tmp_path / "other.jsonl").write_text(other + "\n")  # made of these recordings, and no list of them
        for corpus in (tmp_path, tmp_path / "data.jsonl"):
            assert read_corpus(corpus) == [Entry("a", entry.path, 10.0)]
    assert recorded_seconds(Entry("a", entry.path)) == pytest.approx(10.0)
    assert recorded_seconds(Entry("b", tmp_path / "b.wav")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "is empty: give at least one line"),
        ("{", r"data.jsonl:1: "),
        ('{"file": "a.wav"}', r'data.jsonl:1: a line must be such as \{"path"'),
        ('{"path": "a.wav", "duration": "ten"}', "data.jsonl:1: `duration` must be seconds, found 'ten'"),
        ('{"path": "a.wav"}\n{"path": "a.flac"}', "data.jsonl:2: id 'a' was already used on line 1"),
    ],
)
def test_a_wrong_list_is_named(tmp_path, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_corpus(tmp_path / "data.jsonl")


def test_two_recordings_of_one_name(tmp_path):
    for name in ("x.wav", "x.flac"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has x.flac and x.wav of one name: rename one"):
        read_corpus(tmp_path)


def test_a_corpus_that_is_none(tmp_path):
    with pytest.raises(InputError, match="is empty: give a folder of stereo recordings"):
        read_corpus(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_corpus(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds 2 lists \(a.jsonl, b.jsonl\)"):
        read_corpus(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_corpus(tmp_path / "a.jsonl")


def test_truncated_audio(tmp_path, entry):
    whole = entry.path.read_bytes()
    entry.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"lasts 5.00 s, 10.00 s are announced: is it truncated"):
        read(entry)
    # Not announced: the words tell.
    late = write_conversation(tmp_path / "late.wav", NOISE[0], NOISE[1], RATE, [Word("late", 9.0, 9.5)], USER)
    late.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"'late' ends at 9.50 s, the recording at 5.00 s: is the audio truncated"):
        read(Entry("late", late.path))
    flac = write_conversation(tmp_path / "b.flac", NOISE[0], NOISE[1], RATE, AGENT, USER)
    data = flac.path.read_bytes()
    flac.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        read(flac)
    flac.path.write_bytes(data[:20])
    with pytest.raises(InputError, match="cannot be read as audio"):
        read(flac)


def test_one_channel(entry):
    soundfile.write(str(entry.path), NOISE[0], RATE)
    with pytest.raises(InputError, match=r"has 1 channel\(s\), 2 are needed"):
        read(entry)


def test_no_recording_no_transcript(tmp_path, entry):
    entry.path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"transcript .*a.json does not exist"):
        read(entry)
    with pytest.raises(InputError, match="does not exist"):
        read(Entry("none", tmp_path / "none.wav"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'must be {"alignments"'),
        ('{"alignments": {}}', 'must be {"alignments"'),
        ('{"alignments": [["a", [0, 1], "SPEAKER_MAIN"], ["b", [1], "X"]]}', r"alignments\[1\]: must be"),
        ('{"alignments": [["a", [NaN, 1], "X"]]}', r"alignments\[0\]: must be"),
        ('{"alignments": [[7, [0, 1], "X"]]}', r"alignments\[0\]: must be"),
        ('{"alignments": [["a", [2, 1], "X"]]}', r"alignments\[0\]: 'a' ends at 1.0 s, before it starts at 2.0 s"),
        ('{"alignments": [["a", [9, 11], "X"]]}', r"'a' ends at 11.00 s, the recording at 10.00 s"),
    ],
)
def test_a_malformed_transcript_is_named(entry, text, message):
    entry.path.with_suffix(".json").write_text(text)
    with pytest.raises(InputError, match=message):
        read(entry)


def test_nobody_need_say_a_word(entry):
    entry.path.with_suffix(".json").write_text('{"alignments": []}')
    log = read(entry)
    assert (log.agent_words, log.user_words) == ((), ())


def test_overlapping_words_are_clipped_and_counted(entry):
    rows = [
        ["b", [1.5, 2.0], "SPEAKER_MAIN"],
        ["a", [1.0, 1.8], "SPEAKER_MAIN"],
        ["other", [1.2, 1.9], "SPEAKER_USER"],  # the other speaker may overlap
    ]
    entry.path.with_suffix(".json").write_text(json.dumps({"alignments": rows}))
    log = read(entry)
    assert log.agent_words == (Word("a", 1.0, 1.5), Word("b", 1.5, 2.0))
    assert log.user_words == (Word("other", 1.2, 1.9),)
    assert log.clipped == 1


def words_at(*starts):
    return tuple(Word("w", start, start + 0.2) for start in starts)


def long_log(agent, user=()):
    silence = np.zeros(90 * 100, np.float32)
    return Conversation("x", "x.wav", silence, silence, 100, agent, user)


def test_words_must_fit_the_speech():
    speech = [Interval(start, start + 3.0) for start in (0.0, 20.0, 40.0, 60.0, 80.0)]
    starts = [20.0 * turn + 0.4 * n for turn in range(5) for n in range(7)]
    check_words(long_log(words_at(*starts)), speech, [])
    # A clock that runs 10 % fast: right at first, eight seconds off at the end.
    drifting = long_log(words_at(*(1.1 * s for s in starts if 1.1 * s < 89)))
    with pytest.raises(
        InputError, match=r"only \d+% of the agent's words between 30 and 60 s lie in the agent's speech"
    ):
        check_words(drifting, speech, [])
    # Channels that were swapped: the words are the other side's.
    with pytest.raises(InputError, match=r"of the user's words between 0 and 30 s.*channels swapped"):
        check_words(long_log((), words_at(*starts)), speech, [Interval(10.0, 13.0)])
    # No word at all: as it should be of an agent that says nothing, and only of that.
    check_words(long_log(()), [], speech)
    with pytest.raises(InputError, match=r"x.json holds no word, and 15.0 s of speech are on the agent's channel"):
        check_words(long_log(()), speech, [])
    # Too few words to say.
    check_words(long_log(words_at(10.0, 11.0, 12.0)), speech, [])


def test_a_user_with_a_file_of_its_own_is_lengthened_with_silence(tmp_path):
    rate = 8000
    said = np.linspace(-0.5, 0.5, 4 * rate, dtype=np.float32)
    for name in ("user", "agent"):
        soundfile.write(str(tmp_path / f"{name}.wav"), said, rate)
    segment = Segment("s", "turn_taking", tmp_path / "user.wav", 0, 1.0, 4.0, agent_recording=tmp_path / "agent.wav")
    longer = _longer(segment, 2.0, tmp_path / "longer.flac")
    assert (longer.agent_recording, longer.user_channel, longer.duration) == (None, 1, 5.0)
    audio = longer.user_audio(rate)
    assert np.allclose(audio[: 3 * rate], said[rate:], atol=1e-3)
    assert not audio[3 * rate :].any()
