"""What is called held-out and was trained on."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from warmstart_pairs import config_of, make_pairs

from envs.segments import Segment, write_manifest
from rlhf_duplex.config import load_config
from rlhf_duplex.data.pair import Pair, stream_format, write_pairs
from rlhf_duplex.held_out import overlap_line, pair_stretches, segment_stretches, trained_on
from rlhf_duplex.inputs import load_inputs
from rlhf_duplex.run import train
from rlhf_duplex.run_folder import StoppedError
from rlhf_duplex.warmstart.run import Suite, warmstart


def segment(name, start, end, recording="a.wav"):
    return Segment(name, "turn_taking", Path(recording), 1, start, end)


def test_the_same_seconds_of_the_same_recording(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "link.wav").symlink_to("a.wav")
    trained = [segment("t0", 0, 30, tmp_path / "a.wav"), segment("t1", 10, 12, tmp_path / "a.wav")]
    cases = [
        (segment("inside", 5, 8, tmp_path / "link.wav"), 1),  # another name of it
        (segment("inside, behind one that ended", 13, 20, tmp_path / "a.wav"), 1),
        (segment("touches", 30, 40, tmp_path / "a.wav"), 0),
        (segment("begins before", 29, 40, tmp_path / "a.wav"), 1),
        (segment("another", 5, 8, tmp_path / "b.wav"), 0),
    ]
    for held_out, expected in cases:
        assert trained_on([held_out], segment_stretches(trained)) == expected, held_out.id
    assert trained_on([s for s, _ in cases], segment_stretches(trained)) == 3
    assert overlap_line(3, 5).startswith("3 of 5 held-out segments are of audio that is trained on")


def test_pairs_that_say_where_they_are_from():
    codes = torch.zeros(9, 25, dtype=torch.long)
    said = {"recording": "a.wav", "start": 10.0}
    pairs = [
        Pair("p", "unresponsive", "train", codes, codes, codes, (0, 25), (0, 25), provenance)
        for provenance in (said, {}, {"recording": "b.wav"})
    ]
    assert pair_stretches(pairs, 12.5) == [(Path("a.wav"), 10.0, 14.0)]
    assert trained_on([segment("x", 13, 15), segment("y", 14, 15)], pair_stretches(pairs, 12.5)) == 1


def test_a_run_says_what_it_is_measured_on(tmp_path, one_of_each):
    ids = [replace(s, id=f"again-{s.id}") for s in one_of_each]
    write_manifest(tmp_path / "train.jsonl", one_of_each[:2])
    write_manifest(tmp_path / "same.jsonl", ids[:2])
    write_manifest(tmp_path / "partly.jsonl", ids[1:])
    write_manifest(tmp_path / "other.jsonl", ids[2:])
    found = {}
    for name in ("same", "partly", "other", None):
        held_out = "null" if name is None else f"{tmp_path}/{name}.jsonl"
        arguments = [f"segments={tmp_path}/train.jsonl", f"evaluation.segments={held_out}", f"run_dir={tmp_path}/run"]
        inputs = load_inputs(load_config(None, arguments))
        found[name] = (inputs.held_out_trained, inputs.held_out_is_training)
    assert found == {"same": (2, True), "partly": (1, False), "other": (0, False), None: (2, True)}


def stop(*arguments):
    raise StoppedError


def lines_of(command, config):
    console = Console(file=io.StringIO(), width=300)
    path = command(config, console)
    assert path.name == "run"
    return console.file.getvalue()


@pytest.fixture
def overlapping(tmp_path, one_of_each):
    """What to tell a run that is evaluated on four segments, of which it is trained on two."""
    write_manifest(tmp_path / "train.jsonl", one_of_each[:2])
    write_manifest(tmp_path / "held.jsonl", one_of_each)
    return [f"segments={tmp_path}/train.jsonl", f"run_dir={tmp_path}/run"]


def test_a_run_that_is_stopped_has_said_so(tmp_path, overlapping, monkeypatch):
    line, own = "2 of 4 held-out segments are of audio that is trained on", "measured on the training segments"
    other = load_config(None, [*overlapping, f"evaluation.segments={tmp_path}/held.jsonl"])
    same = load_config(None, overlapping)
    monkeypatch.setattr("rlhf_duplex.run._evaluated", stop)
    shown = lines_of(train, other)
    assert shown.index(line) < shown.index("stopped after update 0")
    assert "trained on" not in lines_of(train, same)
    monkeypatch.setattr("rlhf_duplex.run._evaluated", lambda trainer: ({}, {}))
    monkeypatch.setattr("rlhf_duplex.run.build_report", lambda run_dir: run_dir / "report.html")
    monkeypatch.setattr("rlhf_duplex.run.format_table", lambda before, after: "the table")
    shown = lines_of(train, other)
    assert shown.count(line) == 1
    assert shown.index(line) < shown.index("the table")
    assert own not in shown
    shown = lines_of(train, same)
    assert shown.index("the table") < shown.index(own)
    assert "held-out segments are of audio" not in shown


def test_a_warm_start_says_so_before_it_evaluates(tmp_path, nano, one_of_each, monkeypatch):
    said = {"recording": str(one_of_each[0].recording), "start": one_of_each[0].start}
    pairs = [replace(pair, provenance=said) for pair in make_pairs(nano.lm)]
    write_pairs(tmp_path / "pairs.jsonl", pairs, stream_format(nano))
    write_manifest(tmp_path / "held.jsonl", one_of_each)
    config = config_of(
        pairs=tmp_path / "pairs.jsonl", run_dir=tmp_path / "run", evaluation__segments=tmp_path / "held.jsonl"
    )
    monkeypatch.setattr(Suite, "play", stop)
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(StoppedError):
        warmstart(config, console)
    assert console.file.getvalue().count("1 of 4 held-out segments are of audio that is trained on") == 1
