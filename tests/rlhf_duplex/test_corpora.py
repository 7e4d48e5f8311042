"""Corpora in their exact layouts, small and real: found, read, curated; and what is wrong with them said."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from envs import InputError, SileroDetector, read_manifest, recorded_episode
from envs.audio import resample
from rlhf_duplex.data.corpora import CORPORA, find_corpus
from rlhf_duplex.data.curate import curate
from rlhf_duplex.data.curate_options import CurateOptions, VoiceActivity


def at_rate(spoken, rate):
    return resample(spoken.audio.T, spoken.rate, rate).T


def write(path, audio, rate, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), audio, rate, **options)
    return path


def write_bytes(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"what libsndfile does not read")


def write_json(path, value):
    path.write_text(json.dumps(value))


def alignments(spoken):
    return {"alignments": [[text, [start, end], "SPEAKER_OTHER"] for text, start, end in spoken.words]}


def make_moshi_finetune(root, spoken):
    write(root / "audio" / "one.wav", spoken.audio, spoken.rate)
    write_json(root / "audio" / "one.json", alignments(spoken))
    row = {"path": "audio/one.wav", "duration": len(spoken.audio) / spoken.rate}
    (root / "data.jsonl").write_text(json.dumps(row) + "\n")


def make_stereo(root, spoken):
    write(root / "calls" / "one.flac", at_rate(spoken, 48000), 48000)


def make_seamless(root, spoken):
    """As in the release: 48 kHz mono, `metadata:transcript` of phrases with words, `metadata:vad`."""
    folder = root / "improvised" / "dev" / "0000" / "0099"
    audio = at_rate(spoken, 48000)
    # P0001 is whom the recording has as the user, P0002A the other one.
    for person, channel in (("P0001", spoken.user), ("P0002A", 1 - spoken.user)):
        name = folder / f"V00_S0809_I00000582_{person}.wav"
        write(name, audio[:, channel], 48000)
        words = [{"word": t, "start": s, "end": e, "score": 0.9} for t, s, e in spoken.words] if channel else []
        phrases = [{"words": [*words, {"word": "1990"}], "start": 0.5, "end": 8.24, "transcript": "x"}] if words else []
        # Speech times that are not Silero's, so that a test can tell whose were used.
        vad = [{"start": 0.7, "end": 3.3}, {"start": 4.1, "end": 7.5}] if channel else []
        write_json(name.with_suffix(".json"), {"id": name.stem, "metadata:transcript": phrases, "metadata:vad": vad})
    return folder


def make_fisher(root, spoken):
    """NIST SPHERE as the LDC writes it: 1,024 bytes of header, 8-bit mu-law, two channels; a call table with PINs."""
    audio = at_rate(spoken, 8000)
    path = root / "fe_03_p1_sph1" / "audio" / "000" / "fe_03_00001.sph"
    write(path, audio, 8000, format="NIST", subtype="ULAW")
    samples = path.read_bytes()[1024:]
    lines = ["NIST_1A", "   1024", "conversation_id -s11 fe_03_00001", "channel_count -i 2", "sample_rate -i 8000"]
    lines += [f"sample_count -i {len(audio)}", "sample_n_bytes -i 1", "sample_coding -s4 ulaw", "end_head", ""]
    path.write_bytes("\n".join(lines).encode().ljust(1024) + samples)
    text = root / "fe_03_p1_tran" / "data" / "trans" / "000" / "fe_03_00001.txt"
    text.parent.mkdir(parents=True)
    said = (
        "# fe_03_00001.sph\n# Transcribed at the LDC\n\n0.50 3.32 B: i am curious\n4.13 8.24 B: the (( second )) one\n"
    )
    text.write_text(said + "8.10 8.30 A: [laughter] yes\n")
    table = root / "fe_03_p1_tran" / "doc" / "fe_03_p1_calldata.tbl"
    table.parent.mkdir()
    table.write_text(
        "CALL_ID,DATE_TIME,TOPICID,SIG_GRADE,CNV_GRADE,APIN,ASX.DL,BPIN,BSX.DL\n00001,x,ENG01,3,3,2602,f.a,1790,m.o\n"
    )
    return path


def make_candor(root, spoken, one_file=True):
    folder = root / "0020a0c5-1658-4747"
    ids = ("5fa072f4", "5a73899f")  # left, right
    audio = at_rate(spoken, 48000)
    if one_file:
        write(folder / "processed" / f"{folder.name}.mp3", audio, 48000)
    else:
        for channel, person in enumerate(ids):
            write(folder / "processed" / f"{person}.wav", audio[:, channel], 48000)
    speakers = [{"user_id": ids[1], "channel": "R"}, {"user_id": ids[0], "channel": "L"}]
    write_json(folder / "metadata.json", {"id": folder.name, "speakers": speakers})
    table = folder / "transcription" / "transcript_audiophile.csv"
    table.parent.mkdir()
    table.write_text(
        f'turn_id,speaker,start,stop,utterance\n0,{ids[1]},0.5,3.3,"I am, curious"\n1,{ids[1]},4.1,8.2,the rest\n'
    )
    return folder


MAKERS = {
    "moshi-finetune": make_moshi_finetune,
    "stereo": make_stereo,
    "seamless": make_seamless,
    "fisher": make_fisher,
    "candor": make_candor,
    "candor-tracks": lambda root, spoken: make_candor(root, spoken, one_file=False),
}


@pytest.mark.parametrize("layout", MAKERS)
def test_the_pause_is_found_in_every_layout(tmp_path, spoken, layout):
    MAKERS[layout](tmp_path / "corpus", spoken)
    summary = curate(tmp_path / "corpus", tmp_path / "out" / "segments.jsonl", CurateOptions())
    assert (summary.layout, summary.problems, summary.recordings) == (layout.removesuffix("-tracks"), [], 1)
    (segment,) = (s for s in read_manifest(tmp_path / "out" / "segments.jsonl") if s.axis == "pause_handling")
    assert segment.start == pytest.approx(0.7 if layout == "seamless" else 0.5, abs=0.25)
    assert segment.end == pytest.approx(7.44, abs=0.25)
    assert np.allclose(segment.events["pauses"], [[3.32, 4.13]], atol=0.25)
    said = [text for text, _, who in segment.transcript if who == "user"]
    expected = {
        "stereo": [],
        "fisher": ["i am curious", "the (( second )) one"],
        "candor": ["I am, curious", "the rest"],
        "candor-tracks": ["I am, curious", "the rest"],
    }
    assert said == expected.get(layout, [text for text, *_ in spoken.words])
    assert all(0 <= s <= e <= segment.end for _, (s, e), _ in segment.transcript)
    # The environment hears on the user's side what was written there, and on the agent's what the other file holds.
    rate = 16000
    heard = resample(spoken.audio.T, spoken.rate, rate)[:, round(segment.start * rate) : round(segment.end * rate)]
    for audio, true in ((segment.user_audio(rate), heard[1]), (segment.agent_audio(rate), heard[0])):
        size = min(len(audio), len(true))
        if true.std() > 1e-3:
            assert np.corrcoef(audio[:size], true[:size])[0, 1] > 0.9
        else:
            assert audio.std() < 0.02
    episode = recorded_episode(segment, SileroDetector())
    assert episode.user_speech
    assert episode.agent_speech == []


def test_seamless_without_its_own_speech_times(tmp_path, spoken):
    make_seamless(tmp_path / "corpus", spoken)
    options = CurateOptions(voice=VoiceActivity(vad="silero"))
    curate(tmp_path / "corpus", tmp_path / "segments.jsonl", options)
    (segment,) = (s for s in read_manifest(tmp_path / "segments.jsonl") if s.axis == "pause_handling")
    assert segment.start == pytest.approx(0.5, abs=0.1)
    assert segment.recording.name.endswith("P0001.wav")
    assert segment.agent_recording.name.endswith("P0002A.wav")
    assert (segment.user_channel, segment.agent_channel) == (0, 0)


def test_speakers(tmp_path, spoken):
    make_fisher(tmp_path / "fisher", spoken)
    _, (call,), _ = find_corpus(tmp_path / "fisher")
    assert [side.speaker for side in call.sides] == ["2602", "1790"]
    make_candor(tmp_path / "candor", spoken, one_file=False)
    _, (talk,), _ = find_corpus(tmp_path / "candor")
    assert [side.speaker for side in talk.sides] == ["5fa072f4", "5a73899f"]
    assert [side.path.stem for side in talk.sides] == ["5fa072f4", "5a73899f"]


def test_one_user_channel(tmp_path, spoken):
    make_moshi_finetune(tmp_path / "corpus", spoken)
    with pytest.raises(InputError, match="has no segment that meets the criteria"):
        curate(tmp_path / "corpus", tmp_path / "segments.jsonl", CurateOptions(user_channel="0"))
    assert not (tmp_path / "segments.jsonl").exists()
    curate(tmp_path / "corpus", tmp_path / "segments.jsonl", CurateOptions(user_channel="1"))
    assert {s.user_channel for s in read_manifest(tmp_path / "segments.jsonl")} == {1}


def curated(root, **options):
    """Summary and segments of a corpus that is partly wrong."""
    summary = curate(root, root.parent / "out.jsonl", CurateOptions(**options))
    return summary, read_manifest(root.parent / "out.jsonl")


def refused(root, message, **options):
    with pytest.raises(InputError, match=message):
        curate(root, root.parent / "strict.jsonl", CurateOptions(strict=True, **options))
    assert not (root.parent / "strict.jsonl").exists()


def beside(root, spoken):
    """A whole recording beside the wrong one, so that there is something to find."""
    write(root / "whole.wav", spoken.audio, spoken.rate)


def only_problem(root, spoken, recording, message):
    """It is reported and skipped, and fatal where that is asked for."""
    beside(root, spoken)
    summary, segments = curated(root)
    (problem,) = summary.problems
    assert problem.recording == recording
    assert message in problem.message
    assert summary.recordings == 1
    assert {s.recording.stem for s in segments} == {"whole"}
    refused(root, message.replace("(", r"\("))


def test_truncated_wav(tmp_path, spoken):
    path = write(tmp_path / "c" / "cut.wav", spoken.audio, spoken.rate)
    path.write_bytes(path.read_bytes()[:100000])
    only_problem(tmp_path / "c", spoken, "cut", "cut.wav is truncated: 99956 of")


def test_truncated_flac(tmp_path, spoken):
    path = write(tmp_path / "c" / "cut.flac", spoken.audio, spoken.rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    only_problem(tmp_path / "c", spoken, "cut", "cut.flac cannot be read after")


def test_truncated_ogg(tmp_path, spoken):
    path = write(tmp_path / "c" / "cut.ogg", spoken.audio, spoken.rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    only_problem(tmp_path / "c", spoken, "cut", "cut.ogg is truncated")


def test_truncated_mp3(tmp_path, spoken, write_mp3):
    write_mp3(tmp_path / "c" / "cut.mp3", spoken.audio, spoken.rate, share=0.5)
    only_problem(tmp_path / "c", spoken, "cut", "cut.mp3 is truncated: ")


def test_mp3_of_unknown_length(tmp_path, spoken, write_mp3):
    write_mp3(tmp_path / "c" / "vbr.mp3", spoken.audio, spoken.rate, tag=False)
    only_problem(tmp_path / "c", spoken, "vbr", "its length is a guess: convert it to FLAC")


def test_a_name_that_is_no_text(tmp_path, spoken):
    path = write(tmp_path / "c" / "bad.wav", spoken.audio, spoken.rate)
    os.rename(path, os.fsencode(tmp_path / "c") + b"/b\xff.wav")
    write(tmp_path / "c" / "good.wav", spoken.audio, spoken.rate)
    _, recordings, problems = find_corpus(tmp_path / "c")
    assert [recording.id for recording in recordings] == ["good"]
    assert [tuple(problem) for problem in problems] == [("b?", "its name, or a file's, is not UTF-8: rename it")]


def test_formats_that_are_not_read_are_named(tmp_path, spoken):
    beside(tmp_path / "c", spoken)
    for name in ("x.m4a", "sub/y.MP4", "whole.webm", "notes.txt"):
        write_bytes(tmp_path / "c" / name)
    summary, _ = curated(tmp_path / "c")
    assert [tuple(problem) for problem in summary.problems] == [
        ("sub/y", "libsndfile does not read .MP4: ffmpeg -i y.MP4 y.flac"),
        ("x", "libsndfile does not read .m4a: ffmpeg -i x.m4a x.flac"),
    ]  # and not of `whole`, which was converted
    write_bytes(tmp_path / "c" / "video" / "whole.mp4")
    summary, _ = curated(tmp_path / "c", strict=True)  # to which they are nothing wrong
    assert [problem.recording for problem in summary.problems] == ["sub/y", "x"]
    write(tmp_path / "c" / "mono.wav", spoken.audio[:, 0], spoken.rate)
    refused(tmp_path / "c", "mono: .*has 1 channel")
    (tmp_path / "c" / "mono.wav").unlink()
    (tmp_path / "c" / "whole.wav").unlink()
    with pytest.raises(InputError, match=r"the first thing that is wrong: sub/y: libsndfile does not read .MP4"):
        find_corpus(tmp_path / "c")
    folder = make_seamless(tmp_path / "seamless", spoken)
    for person in ("P0001", "P0002A"):
        write_bytes(folder / f"V00_S0809_I00000582_{person}.mp4")  # the videos of the release
    write_bytes(folder / "V00_S0809_I00000583_P0001.m4a")
    _, _, problems = find_corpus(tmp_path / "seamless")
    assert [Path(problem.recording).name for problem in problems] == ["V00_S0809_I00000583_P0001"]


def test_one_channel(tmp_path, spoken):
    write(tmp_path / "c" / "mono.wav", spoken.audio[:, 0], spoken.rate)
    only_problem(tmp_path / "c", spoken, "mono", "has 1 channel, 2 are needed (one a speaker")


def test_no_audio_at_all(tmp_path, spoken):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "noise.wav").write_bytes(b"nothing of the kind")
    only_problem(tmp_path / "c", spoken, "noise", "cannot be read as audio")


def test_fisher_truncated_and_compressed(tmp_path, spoken):
    whole = make_fisher(tmp_path / "c", spoken)
    cut, shortened = whole.with_name("fe_03_00002.sph"), whole.with_name("fe_03_00003.sph")
    cut.write_bytes(whole.read_bytes()[:40000])
    shortened.write_bytes(whole.read_bytes().replace(b"-s4 ulaw", b"-s26 ulaw,embedded-shorten-v2.00"))
    summary, segments = curated(tmp_path / "c")
    messages = {problem.recording: problem.message for problem in summary.problems}
    assert "fe_03_00002.sph is truncated: 19488 of" in messages["fe_03_00002"]  # (40000 - 1024) / 2 channels
    assert "compressed with shorten" in messages["fe_03_00003"]
    assert "sph2pipe" in messages["fe_03_00003"]
    assert {s.recording.name for s in segments} == {"fe_03_00001.sph"}


def test_listed_files_that_are_missing_or_shorter_than_listed(tmp_path, spoken):
    root = tmp_path / "c"
    make_moshi_finetune(root, spoken)
    listing = (root / "data.jsonl").read_text()
    lines = [{"path": "audio/gone.wav", "duration": 3.0}, {"path": "audio/two.wav", "duration": 100.0}]
    write(root / "audio" / "two.wav", spoken.audio, spoken.rate)
    rows = "\n".join(json.dumps(line) for line in lines)
    (root / "data.jsonl").write_text(listing + rows + '\n{"duration": 2}\nno json\n')
    summary, segments = curated(root)
    messages = {problem.recording: problem.message for problem in summary.problems}
    assert "gone.wav does not exist" in messages["audio/gone"]
    assert "100.00 s according to its corpus: it is truncated" in messages["audio/two"]
    assert set(messages) == {"audio/gone", "audio/two", "data.jsonl:4", "data.jsonl:5"}
    assert {s.recording.stem for s in segments} == {"one"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not valid JSON"),
        ('{"words": []}', 'must be {"alignments": '),
        ('{"alignments": [["yes", 1.0, "SPEAKER_MAIN"]]}', r'alignments\[0\]: must be \["word"'),
        ('{"alignments": [["yes", [2.0, 1.0], "SPEAKER_MAIN"]]}', "ends at 1.0 s, before it starts at 2.0 s"),
        ('{"alignments": [["yes", [NaN, 1.0], "SPEAKER_MAIN"]]}', "in seconds, found"),
        ('{"alignments": [["yes", ["a", 1.0], "SPEAKER_MAIN"]]}', "in seconds, found"),
    ],
)
def test_a_malformed_transcript_is_reported_and_done_without(tmp_path, spoken, content, message):
    root = tmp_path / "c"
    make_moshi_finetune(root, spoken)
    (root / "audio" / "one.json").write_text(content)
    summary, segments = curated(root)
    (problem,) = summary.problems
    assert problem.message.startswith("used without its transcript: ")
    assert summary.recordings == 1
    assert all(s.transcript == () for s in segments)
    refused(root, message)


def test_a_missing_sidecar(tmp_path, spoken):
    root = tmp_path / "c"
    make_moshi_finetune(root, spoken)
    (root / "audio" / "one.json").unlink()
    summary, segments = curated(root)
    assert (summary.problems, summary.recordings, summary.transcripts) == ([], 1, 0)
    assert segments
    # With one of two sidecars, what one participant says would look like silence of the other.
    folder = make_seamless(tmp_path / "s", spoken)
    (folder / "V00_S0809_I00000582_P0002A.json").unlink()
    summary, segments = curated(tmp_path / "s")
    assert "V00_S0809_I00000582_P0002A.json is missing" in summary.problems[0].message
    assert segments[0].start == pytest.approx(0.5, abs=0.1)  # Silero's


def test_overlapping_words_end_where_the_next_begins(tmp_path, spoken):
    root = tmp_path / "c"
    make_moshi_finetune(root, spoken)
    rows = [["b", [1.4, 2.0], "SPEAKER_OTHER"], ["a", [1.0, 1.5], "SPEAKER_OTHER"], ["m", [1.2, 1.9], "SPEAKER_MAIN"]]
    write_json(root / "audio" / "one.json", {"alignments": rows})
    _, (recording,), _ = find_corpus(root)
    words = CORPORA["moshi-finetune"].words(recording)
    # SPEAKER_MAIN is on the left, side 0; the two sides may well speak at once.
    assert words == ([("m", 1.2, 1.9)], [("a", 1.0, 1.4), ("b", 1.4, 2.0)])


def test_clocks_that_drift_apart(tmp_path, spoken):
    folder = make_seamless(tmp_path / "c", spoken)
    second = folder / "V00_S0809_I00000582_P0002A.wav"
    audio, rate = soundfile.read(str(second), dtype="float32")
    write(second, np.concatenate([audio, np.zeros(2 * rate)]), rate)
    with pytest.raises(InputError, match=r"P0001.wav lasts .* s and .*P0002A.wav .* ppm apart\): their clocks drift"):
        curate(tmp_path / "c", tmp_path / "out.jsonl", CurateOptions())
    tolerant = CurateOptions(voice=VoiceActivity(length_tolerance=2.5))
    assert curate(tmp_path / "c", tmp_path / "out.jsonl", tolerant).problems == []


def test_words_that_lie_where_their_speaker_is_silent(tmp_path, spoken):
    root = tmp_path / "c"
    make_moshi_finetune(root, spoken)
    rows = [[text, [start, end], "SPEAKER_MAIN"] for text, start, end in spoken.words]  # the other channel's words
    write_json(root / "audio" / "one.json", {"alignments": rows})
    assert len(rows) >= 20
    summary, _ = curated(root)
    assert "% of the words of channel 0 lie in its speech: are the channels swapped" in summary.problems[0].message


def test_one_and_three_participants(tmp_path, spoken):
    folder = make_seamless(tmp_path / "c", spoken)
    for name in ("V00_S0809_I00000583_P0001.wav", *(f"V01_S0001_I00000001_P000{n}.wav" for n in (1, 2, 3))):
        write(folder / name, spoken.audio[:, 0], spoken.rate)
    summary, _ = curated(tmp_path / "c")
    messages = {problem.recording: problem.message for problem in summary.problems}
    assert messages["V00_S0809_I00000583"].startswith("2 participants are needed, found 1")
    assert messages["V01_S0001_I00000001"].startswith("2 participants are needed, found 3")


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="does not exist: give a folder"):
        find_corpus(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no recordings: give a moshi-finetune"):
        find_corpus(tmp_path / "empty")
    (tmp_path / "none.jsonl").write_text("\n")
    for layout in CORPORA:
        with pytest.raises(InputError, match=f"holds no recording in the layout of {layout}"):
            find_corpus(tmp_path / "empty", layout)


def test_two_recordings_of_one_name(tmp_path, spoken):
    beside(tmp_path / "c", spoken)
    write(tmp_path / "c" / "whole.flac", spoken.audio, spoken.rate)
    with pytest.raises(InputError, match=r"two recordings of .* are called 'whole'"):
        find_corpus(tmp_path / "c")


def test_a_transcript_that_goes_on_after_the_audio(tmp_path, spoken):
    make_fisher(tmp_path / "c", spoken)
    (text,) = (tmp_path / "c").rglob("fe_03_00001.txt")
    text.write_text(text.read_text() + "30.0 31.5 A: good bye\n")
    summary, segments = curated(tmp_path / "c")
    assert "go on to 31.5 s, the audio only to 8.4 s" in summary.problems[0].message
    assert segments
    text.write_text(text.read_text() + "good bye\n")
    summary, _ = curated(tmp_path / "c")  # the sidecar is another one now: the recording is looked at anew
    assert "fe_03_00001.txt:8: not `start end A: words`: 'good bye'" in summary.problems[0].message
