"""`evaluate --suite live`: what is measured in a live dialogue, and the whole of it on nano."""

import json

import pytest
from report_runs import make_episode

from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.live import live_values


def test_values_of_dialogues_by_hand():
    # The user's turn ends at 5.0 s of the segment; the agent answers at 6.9 s and, in another episode, at 5.3 s.
    slow, quick = (make_episode("turn_taking", [agent]) for agent in ((6.9, 8.9), (5.3, 8.8)))
    values = live_values([slow, quick])["live"]
    (gap,) = values["gap"].values()  # one dialogue, the mean of its two episodes
    assert gap == pytest.approx((1.9 + 0.3) / 2)
    assert list(values["answer_rate"].values()) == [1.0]
    assert list(values["overlap"].values()) == [0.0]
    assert list(values["user_yields"].values()) == [0.0]


def test_nano_in_live_dialogues(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["evaluate", "--suite", "live", "--out", str(out), "evaluation.limit=2", "live.seconds=8"]
    systems = ["--checkpoint", "base=nano", "--checkpoint", "same=nano"]
    assert main([*arguments, *systems, "--fail-if", "live.seconds_lost < 0"]) == 0
    base, same = (json.loads((out / f"{name}.json").read_text()) for name in ("base", "same"))
    assert base["segments"] == same["segments"]  # deterministic: the same users, the same draws
    assert base["axes"]["live"]["seconds_lost"]["n"] == 2
    assert base["user"] == "scripted"
    page = (out / "report.html").read_text()
    assert "s lost a turn" in page
    assert "Worst cases" in page
    assert main([*arguments, "detector.name=energy"]) == 2
    assert "only Silero can" in capsys.readouterr().err


def test_a_second_policy_can_be_the_user(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["evaluate", "--suite", "live", "--out", str(out), "evaluation.limit=2", "live.seconds=4"]
    assert main([*arguments, "--checkpoint", "nano", "live.user=nano"]) == 0
    found = json.loads((out / "nano.json").read_text())
    assert found["user"] == "nano"
    assert found["samples"] == 2
    assert main([*arguments, "live.user=/nowhere/at-all"]) == 2
    assert "/nowhere/at-all" in capsys.readouterr().err
    assert main([*arguments, "live.user=nano", "--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "m"]) == 2
    assert "set live.user=scripted" in capsys.readouterr().err
