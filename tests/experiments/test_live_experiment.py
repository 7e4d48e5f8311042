"""The comparison of training by replay and live: its arithmetic by hand, and the whole of it tiny."""

import json

import pytest

from experiments.live.__main__ import main
from experiments.live.compare import comparisons


def result(**metrics):
    return {"segments": {"live": metrics}}


def test_seeds_are_pooled_dialogue_by_dialogue():
    results = {
        "base": result(gap={"a": 2.0, "b": 3.0}),
        "replay-0": result(gap={"a": 1.0, "b": 2.0}),
        "replay-1": result(gap={"a": 2.0}),  # b was not answered: it is left out of the pool
        "live-0": result(gap={"a": 1.0, "b": 1.0}),
        "live-1": result(gap={"a": 1.0, "b": 2.0}),
    }
    rows = {(row["before"], row["after"]): row for row in comparisons(results, [0, 1])}
    assert rows["base", "replay"]["difference"] == pytest.approx(-0.5)  # a: 2 -> 1.5
    assert rows["base", "replay"]["n"] == 1
    assert rows["base", "live"]["difference"] == pytest.approx(-1.25)  # a: 2 -> 1, b: 3 -> 1.5
    assert rows["base", "live"]["better"]
    # a: -1 and -1, b: -2 and -1; as far as they agree, the interval lies around the mean of -1.25.
    assert rows["base", "live"]["crossed"]["low"] < -1.25 < rows["base", "live"]["crossed"]["high"]
    assert rows["base", "live"]["each_seed"] == pytest.approx([1.0, 1.5])
    assert rows["replay", "live"]["difference"] == pytest.approx(-0.5)
    assert all(row["p_holm"] >= row["p"] for row in rows.values())
    assert [(row["before"], row["after"]) for row in comparisons(results, [0, 1], ["replay"])] == [("base", "replay")]


def test_runs_from_elsewhere_are_not_taken_for_these(tmp_path, capsys):
    run = tmp_path / "live" / "replay-0"
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / "after.json").write_text("{}")
    (run / "config.yaml").write_text("checkpoint: nano\n")
    assert main(["--seeds", "0", "--out", str(run.parent), "--start", "runs/quickstart"]) == 2
    assert f"{run} was trained from nano, not from runs/quickstart" in capsys.readouterr().err


@pytest.mark.long
def test_the_whole_of_it_tiny(tmp_path):
    out = tmp_path / "live"
    assert main(["--tiny", "--seeds", "0", "--out", str(out)]) == 0
    record = json.loads((out / "live.json").read_text())
    assert record["dialogues"] == 2
    assert "replay-0" in (out / "report.html").read_text()
    pairs = {(row["metric"], row["before"], row["after"]) for row in record["comparisons"]}
    assert ("seconds_lost", "replay", "live") in pairs
    trained = {path.parents[1].name for path in out.glob("*-0/checkpoints/step_000001")}
    assert trained == {"replay-0", "live-0"}
    assert {path.name for path in out.glob("*.json")} >= {"base.json", "replay-0.json", "live-0.json"}
