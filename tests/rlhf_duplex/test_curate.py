"""`rlhf-duplex curate` as a whole: killed and gone on with, on several workers, on a page."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from envs import InputError, Word, read_manifest
from rlhf_duplex.cli import main
from rlhf_duplex.data.curate import curate, transcript_of
from rlhf_duplex.data.curate_options import Criteria, CurateOptions, VoiceActivity
from rlhf_duplex.data.detection import detection_path
from rlhf_duplex.data.recordings import Recording, Side
from rlhf_duplex.inputs import NANO_DATA

ROOT = Path(__file__).parents[2]
SHORT = Criteria(pause_min=2.0, turn_min=1.5, backchannel_min=2.0, interruption_min=1.0)  # nano's dialogues are short
SHORT_ARGUMENTS = ["--pause-min", "2", "--turn-min", "1.5", "--backchannel-min", "2", "--interruption-min", "1"]


def make_corpus(folder, count):
    """Held-out dialogues of nano, as many of each axis, listed as moshi-finetune lists them."""
    folder.mkdir()
    rows = []
    for number in range(count):
        for suffix in (".ogg", ".json"):
            source = NANO_DATA / "heldout" / f"{200 * number // count:04d}{suffix}"
            shutil.copy(source, folder / f"{number:04d}{suffix}")
        rows.append(
            {"path": f"{number:04d}.ogg", "duration": soundfile.info(str(folder / f"{number:04d}.ogg")).duration}
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "nano", 40)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What a run that nothing stopped writes, beside the corpus as all runs here are."""
    out = corpus.parent.parent / "whole.jsonl"
    summary = curate(corpus, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0))
    assert summary.done_before == 0
    return out, summary


def times_of_records(out):
    return {path.name: path.stat().st_mtime_ns for path in out.with_suffix(".work").glob("*.json")}


def test_the_manifest_trains(whole):
    out, summary = whole
    segments = read_manifest(out)
    assert {s.axis for s in segments} == {"pause_handling", "turn_taking", "backchannel", "user_interruption"}
    counts = {axis: sum(s.axis == axis for s in segments) for axis in summary.found}
    assert counts == {axis: min(8, met) for axis, met in summary.found.items()}
    assert len({s.recording for s in segments if s.axis == "turn_taking"}) == 8  # spread
    assert all(s.transcript for s in segments if s.user_channel == 1)
    assert (summary.recordings, summary.transcripts, summary.problems) == (40, 40, [])


def test_killed_three_times_it_writes_the_same_and_does_nothing_twice(corpus, whole):
    out = whole[0].with_name("killed.jsonl")
    command = [sys.executable, "-m", "rlhf_duplex.cli", "curate", str(corpus), "--out", str(out), "--per-axis", "8"]
    command += [*SHORT_ARGUMENTS, "--examples", "0"]
    draw = random.Random(7)
    done = {}
    for goal in sorted(draw.sample(range(2, 35), 3)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(times_of_records(out)) < goal:  # a random moment after so many recordings
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "nothing was done within 120 s"
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert not out.exists()
        now = times_of_records(out)
        assert done.items() <= now.items()  # what was done is as it was, not written again
        done = now
    assert len(done) < 40
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert f"of them read before {len(done)}" in " ".join(finished.stdout.split())
    assert done.items() <= times_of_records(out).items()
    assert out.read_bytes() == whole[0].read_bytes()


def test_two_workers_write_the_same(corpus, whole):
    out = whole[0].with_name("workers.jsonl")
    wrong = corpus.with_name("wrong.ogg")
    wrong.write_bytes(b"OggS and no more")
    listing = corpus.with_name("more.jsonl")
    listing.write_text(corpus.read_text() + '{"path": "wrong.ogg"}\n')
    summary = curate(listing, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0, workers=2))
    assert [problem.recording for problem in summary.problems] == ["wrong"]
    assert out.read_bytes() == whole[0].read_bytes()
    with pytest.raises(InputError, match=r"wrong: recording .*wrong.ogg cannot be read"):
        curate(listing, out, CurateOptions(criteria=SHORT, workers=2, strict=True))


@pytest.mark.long
def test_two_workers_killed_leave_nothing_behind_and_it_goes_on(corpus, whole):
    out = whole[0].with_name("killed_workers.jsonl")
    command = [sys.executable, "-m", "rlhf_duplex.cli", "curate", str(corpus), "--out", str(out), "--per-axis", "8"]
    command += [*SHORT_ARGUMENTS, "--examples", "0", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(times_of_records(out)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline, "nothing was done within 240 s"
        time.sleep(0.005)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 2  # Ray's own processes and the workers
    process.kill()
    process.wait()
    assert not out.exists()
    # The kernel ends Ray's own at once; its agents look for their parent every now and then.
    _, alive = psutil.wait_procs(family, timeout=240)
    assert alive == []
    done = times_of_records(out)
    assert 3 <= len(done) < 40
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert f"of them read before {len(done)}" in " ".join(finished.stdout.split())
    assert done.items() <= times_of_records(out).items()
    assert out.read_bytes() == whole[0].read_bytes()


def test_a_share_of_the_recordings_is_held_out(corpus, whole, tmp_path, capsys):
    out = whole[0].with_name("parted.jsonl")
    shutil.copytree(whole[0].with_suffix(".work"), out.with_suffix(".work"))  # heard before
    summary = curate(corpus, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0, heldout=0.25))
    assert summary.done_before == 40
    told = " ".join(capsys.readouterr().out.split())
    train, held = read_manifest(out), read_manifest(out.with_name("parted.heldout.jsonl"))
    assert not {s.recording for s in train} & {s.recording for s in held}
    assert 1 <= len({s.recording for s in held}) <= 10
    for segments, kept, most in ((train, summary.kept, 6), (held, summary.held_out, 2)):
        counts = Counter(s.axis for s in segments)
        assert counts == kept
        assert max(counts.values()) == most
    assert f"wrote {len(train)} segments to {out}, {len(held)} held-out ones to" in told
    assert f"segments held out {len(held)}" in told
    again = curate(corpus, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0))
    assert not again.held_out
    assert {s.id for s in read_manifest(out)} >= {s.id for s in held}
    assert "nothing is held out any more" in " ".join(capsys.readouterr().out.split())
    assert not out.with_name("parted.heldout.jsonl").exists()  # or a suite would be trained on
    with pytest.raises(InputError, match="--heldout must be a share of at least 0 and below 1, found 1"):
        curate(corpus, out, CurateOptions(heldout=1.0))


def test_other_thresholds_need_no_second_hearing(corpus, whole):
    out = whole[0]
    before = out.read_bytes(), times_of_records(out)
    summary = curate(corpus, out, CurateOptions(criteria=Criteria(pause_min=3.0), per_axis=5, examples=0))
    assert summary.done_before == 40
    assert times_of_records(out) == before[1]
    assert out.read_bytes() != before[0]
    summary = curate(
        corpus, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0, voice=VoiceActivity(vad_threshold=0.6))
    )
    assert summary.done_before == 0  # another way of hearing is another result
    curate(corpus, out, CurateOptions(criteria=SHORT, per_axis=8, examples=0))
    assert out.read_bytes() == before[0]


def test_changed_audio_and_a_damaged_record_are_done_again(tmp_path):
    listing = make_corpus(tmp_path / "c", 3)
    options = CurateOptions(criteria=SHORT, examples=0)
    out = tmp_path / "out.jsonl"
    curate(listing, out, options)
    first = out.read_bytes()
    (damaged, *_) = sorted(out.with_suffix(".work").glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert curate(listing, out, options).done_before == 2
    assert out.read_bytes() == first
    shutil.copy(tmp_path / "c" / "0001.ogg", tmp_path / "c" / "0002.ogg")
    assert curate(listing, out, options).done_before == 2
    assert out.read_bytes() != first


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    make_corpus(tmp_path / "c", 1)
    wrong = [
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "o.jsonl")], "does not exist: give a folder"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.json")], "must end in .jsonl"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "c" / "data.jsonl" / "o.jsonl")], "cannot be written"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--turn-min", "-1"], "--turn-min must be"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--turn-min", "nan"], "--turn-min must be"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--per-axis", "0"], "--per-axis must be at least 1"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--vad-threshold", "1"], "between 0 and 1"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--encode", "noo"], "checkpoint 'noo' is no folder"),
        (
            [str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--encode", "nano", "--codes-cache", "none"],
            "a folder",
        ),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--max-pause", "0.1"], "there would be no pauses"),
        ([str(tmp_path / "c"), "--out", str(tmp_path / "o.jsonl"), "--pause-min", "99"], "no segment that meets"),
    ]
    for arguments, message in wrong:
        assert main(["curate", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_a_transcript_has_what_the_user_said_in_the_context():
    user = [Word("long ago", 1, 2), Word("what is rain", 22, 23), Word("and snow", 51, 54), Word("later", 61, 62)]
    agent = [Word("water falls", 30, 31), Word("ice", 56, 57)]
    assert list(transcript_of((agent, user), 1, 50.0, 60.0)) == [
        ("what is rain", [22, 23], "user"),  # within the longest context; the recorded agent is not heard there
        ("and snow", [51, 54], "user"),
        ("ice", [56, 57], "agent"),
    ]


def test_a_doubled_and_a_dead_channel_are_told(tmp_path, capsys):
    folder = tmp_path / "c"
    folder.mkdir()
    users = [soundfile.read(str(NANO_DATA / "heldout" / f"{number:04d}.ogg"))[0][:, 1] for number in range(8)]
    rate = soundfile.info(str(NANO_DATA / "heldout" / "0000.ogg")).samplerate
    user = np.concatenate(users)
    other = np.concatenate([user[len(user) // 3 :], user[: len(user) // 3]])
    for name, agent in (("doubled", 0.7 * user), ("dead", 0 * user), ("good", other)):
        soundfile.write(str(folder / f"{name}.wav"), np.stack([agent, user], 1), rate)
    arguments = ["curate", str(folder), "--out", str(tmp_path / "o.jsonl"), *SHORT_ARGUMENTS]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "doubled.wav: both sides speak at the same times: one channel doubled" in shown
    assert f"no speech on channel 0 in {len(user) / rate:.0f} s" in shown
    assert "good.wav: both sides" not in shown
    assert {segment.recording.stem for segment in read_manifest(tmp_path / "o.jsonl")} <= {"dead", "good"}


def test_encoded_users_are_those_that_training_reads(tmp_path, nano, capsys):
    make_corpus(tmp_path / "c", 4)
    out, codes = tmp_path / "segments.jsonl", tmp_path / "codes"
    curating = [
        "curate",
        str(tmp_path / "c"),
        "--out",
        str(out),
        *SHORT_ARGUMENTS,
        "--user-channel",
        "1",
        "--examples",
        "0",
    ]
    assert main([*curating, "--encode", "nano", "--lead-in", "0.4", "--codes-cache", str(codes)]) == 0
    entries = {path: path.stat().st_mtime_ns for path in codes.rglob("*.safetensors")}
    segments = read_manifest(out)
    assert len(entries) == len(segments) > 0
    assert f"encoded {len(segments)} segments, 0 were in" in capsys.readouterr().out
    small = [
        "trainer.updates=1",
        "trainer.groups=1",
        "trainer.group_size=2",
        "evaluation.limit=1",
        "context.lead_in=0.4",
    ]
    run = ["train", "checkpoint=nano", f"segments={out}", f"run_dir={tmp_path / 'run'}", f"codes_cache={codes}"]
    assert main([*run, *small, "context.probability=0"]) == 0
    # Training and both evaluations played segments, and no code had to be made for any of them.
    assert {path: path.stat().st_mtime_ns for path in codes.rglob("*.safetensors")} == entries
    capsys.readouterr()
    assert main([*curating, "--encode", "nano", "--lead-in", "0.4", "--codes-cache", str(codes)]) == 0
    assert f"encoded 0 segments, {len(segments)} were in" in capsys.readouterr().out


class _Page(HTMLParser):
    """The tags of a page and their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_a_random_handful_of_each_axis_with_audio(tmp_path):
    hostile = "<script>alert(1)</script>&<img src=x onerror=alert(2)>"
    listing = make_corpus(tmp_path / "c", 60)
    for path in (tmp_path / "c").glob("*.json"):
        path.write_text(json.dumps({"alignments": [[hostile, [1.0, 1.5], "SPEAKER_OTHER"]]}))
    out = tmp_path / "segments.jsonl"
    curate(listing, out, CurateOptions(criteria=SHORT, examples=2, seed=1))
    text = out.with_suffix(".html").read_text()
    page = _Page(text)
    shown = [attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "article"]
    assert len(shown) == 2 * 4
    sounds = [attributes["src"] for tag, attributes in page.tags if tag == "audio"]
    assert len(sounds) == 2 * 4
    assert all(sound.startswith("data:audio/ogg;base64,") for sound in sounds)
    assert sum(tag == "svg" and attributes.get("class") == "timeline" for tag, attributes in page.tags) == 2 * 4
    assert hostile in page.text
    assert "<img src=x" not in text
    assert not any(
        attributes.get(name, "").startswith("http") for _, attributes in page.tags for name in ("src", "href")
    )
    # The recorded agent's own backchannels are the true ones.
    counts = re.findall(r"hits (\d+), false alarms (\d+), missed (\d+)", page.text)
    assert counts
    assert all(int(hits) > 0 and (false, missed) == ("0", "0") for hits, false, missed in counts)
    for words in ("Turn-taking: reward", "Recordings used", "user's utterance shorter than"):
        assert words in page.text
    curate(listing, out, CurateOptions(criteria=SHORT, examples=2, seed=2))
    assert _Page(out.with_suffix(".html").read_text()).text != page.text


def test_a_split_recording_is_played_by_the_environment(tmp_path, nano, silero, spoken):
    """Two mono files a dialogue train as one stereo file does."""
    for channel, name in enumerate(("P0001", "P0002")):
        soundfile.write(str(tmp_path / f"V00_S0001_I00000001_{name}.wav"), spoken.audio[:, channel], spoken.rate)
    soundfile.write(str(tmp_path / "both.wav"), spoken.audio, spoken.rate)
    options = CurateOptions(format="seamless", user_channel="1")
    curate(tmp_path, tmp_path / "split.jsonl", options)
    (split,) = read_manifest(tmp_path / "split.jsonl")
    line = json.loads((tmp_path / "split.jsonl").read_text())
    assert line["recording"] == "V00_S0001_I00000001_P0002.wav"
    assert line["agent_recording"] == "V00_S0001_I00000001_P0001.wav"
    from envs.dialogues import padded_user_audio
    from envs.segments import Segment

    stereo = Segment("s", split.axis, tmp_path / "both.wav", 1, split.start, split.end, split.events)
    assert np.array_equal(padded_user_audio(split, nano.codec, 1.0), padded_user_audio(stereo, nano.codec, 1.0))
    assert np.array_equal(split.agent_audio(16000), stereo.agent_audio(16000))
    run = ["train", f"segments={tmp_path / 'split.jsonl'}", f"run_dir={tmp_path / 'run'}", "context.lead_in=0.2"]
    assert main([*run, "trainer.updates=1", "trainer.groups=1", "trainer.group_size=2"]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_was_detected_before_is_found_again(tmp_path):
    """Cache names of earlier versions hold, but for mp3s, which those may have read wrongly."""
    for name in ("a.wav", "a.MP3", "a.json"):
        (tmp_path / name).write_bytes(b"as it was" * 99)
        os.utime(tmp_path / name, ns=(10**18, 10**18))

    def name_of(*files):
        first, second = (Side(tmp_path / file, channel, "x") for channel, file in enumerate(files))
        recording = Recording("talks/a", (first, second._replace(speaker="y")), (tmp_path / "a.json",), 2.5)
        return detection_path(tmp_path, "stereo", recording, VoiceActivity()).name

    assert name_of("a.wav", "a.wav") == "2d142dc748f85111f316265f8e1af5d42af519a1.json"
    assert name_of("a.MP3", "a.MP3") != "9170218d3e22c423d3dc9c518bc9a11767f927f7.json"
