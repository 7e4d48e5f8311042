"""Scores and a training run on recordings of people, beside the repository where there is a copy of them."""

import json
from pathlib import Path

import pytest

from envs import SileroDetector, complete_events, read_manifest, recorded_episode
from rewards import RewardFunction, RewardSpec
from rlhf_duplex.cli import main

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
    assert set(after["axes"]) == {"pause_handling", "turn_taking", "backchannel", "user_interruption"}
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
