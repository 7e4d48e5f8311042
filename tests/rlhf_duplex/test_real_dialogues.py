"""Scores and a training run on recordings of people, beside the repository where there is a copy of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from envs import SileroDetector, complete_events, read_manifest, recorded_episode
from envs.audio import resample
from rewards import RewardFunction, RewardSpec
from rlhf_duplex.cli import main
from rlhf_duplex.data.curate import curate
from rlhf_duplex.data.curate_options import CurateOptions

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "real_dialogues"
pytestmark = pytest.mark.skipif(not (DATA / "truth.json").is_file(), reason=f"no recordings of people in {DATA}")
USER_CHANNEL = 1  # moshi-finetune's layout: left agent, right user


def truth_rows():
    for recording, rows in json.loads((DATA / "truth.json").read_text()).items():
        for index, row in enumerate(rows):
            yield f"{recording}-{index}", recording, row


def events_of(row):
    return {
        "pause_handling": lambda: {"pauses": row["pauses"]},
        "turn_taking": lambda: {"user_turn_end": row["user"][0][1]},
        "backchannel": lambda: {"true_backchannels": row["agent"]},
        "user_interruption": lambda: {"interruption": row["user"][1]},
    }[row["axis"]]()


def expected(row):
    """The reward that the true times give: no takeover, minus the gap, all found, minus the time to the answer."""
    if row["axis"] == "turn_taking":
        return -row["gap"]
    if row["axis"] == "user_interruption":
        return -(row["agent"][1][0] - row["user"][1][1])
    return {"pause_handling": 0.0, "backchannel": 1.0}[row["axis"]]


def write_truth(folder, with_events):
    """A manifest of everything that the truth tells of; gives its path."""
    lines = []
    for name, recording, row in truth_rows():
        spans = row["user"] + row["agent"]
        line = {
            "id": name,
            "axis": row["axis"],
            "recording": str(DATA / recording),
            "user_channel": USER_CHANNEL,
            "start": min(start for start, _ in spans),
            "end": max(end for _, end in spans),
            "events": events_of(row) if with_events else {},
        }
        lines.append(json.dumps(line))
    (folder / "segments.jsonl").write_text("\n".join(lines))
    return folder / "segments.jsonl"


def test_nano_trains_on_recordings_of_people(tmp_path):
    arguments = ["checkpoint=nano", f"segments={write_truth(tmp_path, False)}", f"run_dir={tmp_path / 'run'}"]
    small = ["trainer.updates=1", "trainer.groups=4", "trainer.group_size=2", "evaluation.limit=1"]
    assert main(["train", *arguments, *small]) == 0
    after = json.loads((tmp_path / "run" / "evaluation" / "after.json").read_text())
    assert set(after["axes"]) - {"words"} == {"pause_handling", "turn_taking", "backchannel", "user_interruption"}
    assert after["on_training_segments"]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("with_events", [True, False], ids=["events_given", "events_detected"])
def test_the_recorded_agent_scores_as_the_truth_says(tmp_path, with_events):
    manifest = write_truth(tmp_path, with_events)
    detector = SileroDetector()
    segments = complete_events(read_manifest(manifest), detector)
    axes = ("pause_handling", "turn_taking", "backchannel", "user_interruption")
    function = RewardFunction({axis: RewardSpec() for axis in axes})
    scores = function([recorded_episode(segment, detector) for segment in segments])
    rows = {name: row for name, _, row in truth_rows()}
    assert {segment.axis for segment in segments} == set(axes)
    for segment, score in zip(segments, scores, strict=True):
        row = rows[segment.id]
        # Silero places an edge within some windows of 32 ms; counts come out exactly.
        slack = 0.25 if row["axis"] in ("turn_taking", "user_interruption") else 0.0
        assert score[segment.axis].value == pytest.approx(expected(row), abs=slack), segment.id
        assert [name for name, found in score.items() if found is not None] == [segment.axis]


def noisy(audio, decibels=20.0):
    """White noise on each channel throughout, `decibels` below its speech (what stands above -60 dB of full scale)."""
    out = audio.copy()
    for channel, side in enumerate(audio.T):
        power = (side[np.abs(side) > 1e-3] ** 2).mean() / 10 ** (decibels / 10)
        out[:, channel] += np.random.default_rng(channel).normal(0, np.sqrt(power), len(side))
    return out


# What is done to the recordings, and the channel that the user of the truth is on then.
VARIANTS = {
    "as_they_are": (lambda audio, rate: (audio, rate), 1),
    "swapped": (lambda audio, rate: (audio[:, ::-1], rate), 0),
    "8_kHz": (lambda audio, rate: (resample(audio.T, rate, 8000).T, 8000), 1),
    "48_kHz": (lambda audio, rate: (resample(audio.T, rate, 48000).T, 48000), 1),
    "noise_at_20_dB": (lambda audio, rate: (noisy(audio), rate), 1),
    "noise_at_20_dB_swapped_8_kHz": (lambda audio, rate: (resample(noisy(audio).T[::-1], rate, 8000).T, 8000), 0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_curate_finds_every_block_and_no_false_one(tmp_path, variant):
    """Both directions are looked at.

    In the truth's, every block meets its own axis' criteria and no other's: the agent's utterance that is interrupted
    is shorter than 5 s, the answers to interruptions come after more than 0.4 s. In the other direction nothing meets
    any: no utterance of the agent's has a pause, is met by a backchannel, or is answered at once.
    """
    change, user = VARIANTS[variant]
    for recording in ("dialogue_00", "dialogue_01", "dialogue_02"):
        audio, rate = soundfile.read(str(DATA / f"{recording}.flac"), dtype="float32")
        soundfile.write(str(tmp_path / f"{recording}.flac"), *change(audio, rate))
    curate(tmp_path, tmp_path / "segments.jsonl", CurateOptions(examples=0))
    found = {(s.axis, s.recording.name): s for s in read_manifest(tmp_path / "segments.jsonl")}
    rows = {(row["axis"], recording): row for _, recording, row in truth_rows()}
    assert len(read_manifest(tmp_path / "segments.jsonl")) == len(rows) == 12
    assert found.keys() == rows.keys()
    for key, row in rows.items():
        segment = found[key]
        window = row["user"] if key[0] in ("pause_handling", "backchannel") else row["user"] + row["agent"]
        assert segment.user_channel == user
        assert segment.start == pytest.approx(min(start for start, _ in window), abs=0.25), key
        assert segment.end == pytest.approx(max(end for _, end in window), abs=0.25), key
        (name, value), (true_name, true_value) = *segment.events.items(), *events_of(row).items()
        assert name == true_name
        assert np.shape(value) == np.shape(true_value)
        assert np.allclose(value, true_value, rtol=0, atol=0.25), (key, value, true_value)
