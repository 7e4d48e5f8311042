"""What is called held-out and was trained on."""

from dataclasses import replace
from pathlib import Path

import torch

from envs.segments import Segment, write_manifest
from rlhf_duplex.config import load_config
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.held_out import overlap_line, pair_stretches, segment_stretches, trained_on
from rlhf_duplex.inputs import load_inputs


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
