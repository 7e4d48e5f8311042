"""Stamps of pipelines: what earlier versions finished or began stays so, and a replaced recording is noticed."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from envs.errors import InputError
from rlhf_duplex.pipeline import Stage, load_pipeline, recordings_of, run_pipeline


def test_a_recording_that_was_replaced_is_found_through_its_manifest(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("user.wav", "agent.wav", "log.wav", "log.json"):
        (data / name).write_bytes(name.encode() * 10000)
    rows = [{"id": "s", "recording": "user.wav", "agent_recording": "agent.wav"}, {"path": "log.wav"}]
    rows += [{"path": "/"}, {"path": "a text " * 1000}]  # other files have such a key, too
    (data / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\nno json\n7\n")
    stage = Stage("train", ("train", f"segments={data}/list.jsonl"), (tmp_path / "made",))
    before = recordings_of(stage)
    for name in ("user.wav", "agent.wav", "log.wav", "log.json"):
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[::-1])
        assert recordings_of(stage) != before, name
        (data / name).write_bytes(whole)  # as it was, but for its time
        assert recordings_of(stage) == before
    (data / "log.wav").unlink()
    assert recordings_of(stage) != before


# What the first pipelines noted of the stage below: where it is another, all that is done is done again.
OLD_HASH = "ef4e5b0eee5ac5e43c1ab25bfa87d6ca35afa11acaa71eed48d26ce3b56681d0"


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """A training stage on a recording outside the pipeline, with relative paths: its hash is the same everywhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "run/.stages"):
        Path(name).mkdir(parents=True)
    Path("corpus/talk.wav").write_bytes(b"talk" * 9000)
    Path("list.jsonl").write_text('{"id": "s", "recording": "corpus/talk.wav"}\n')
    Path("p.yaml").write_text(
        "run_dir: run\nstages:\n  train:\n    run: train segments=list.jsonl run_dir=run/rl\n    makes: run/rl/made\n"
    )

    def start(fail=False, **options):
        """Gives `kept`, `ran` or, where it ran with it, `resumed`."""
        calls = []

        def command(arguments):
            calls.append(list(arguments))
            Path("run/rl/checkpoints/step_000002").mkdir(parents=True, exist_ok=True)
            if not fail:
                Path("run/rl/made").write_text("")
            return 2 if fail else 0

        with pytest.raises(InputError, match="ended with code 2") if fail else nullcontext():
            outcome = run_pipeline(load_pipeline(Path("p.yaml")), command, lambda line: None, **options)
        if not calls:
            return "would run" if outcome.ran else "kept"
        return "resumed" if calls[0][-1] == "resume=true" else "ran"

    return Path("run/.stages/train.json"), start


def old_stamp(path, done):
    path.write_text(json.dumps({"hash": OLD_HASH, "done": done}) + "\n")


def test_a_stage_that_an_earlier_version_finished_is_done_and_its_recordings_are_held_from_then_on(talk):
    stamp, start = talk
    assert start() == "ran"
    old_stamp(stamp, done=True)
    assert start(dry=True) == "kept"
    assert "recordings" not in json.loads(stamp.read_text())
    Path("corpus/talk.wav").write_bytes(b"klat" * 9000)  # nothing is known of what it was
    assert start() == "kept"
    assert json.loads(stamp.read_text()).keys() == {"hash", "done", "recordings"}
    Path("corpus/talk.wav").write_bytes(b"talk" * 9000)
    assert start(dry=True) == "would run"
    assert start() == "ran"
    assert json.loads(stamp.read_text())["hash"] == OLD_HASH
    assert start() == "kept"
    Path("corpus").rename("away")  # a disk that is not mounted
    assert start() == "kept"
    Path("away").rename("corpus")
    assert start() == "kept"


def test_a_stage_that_an_earlier_version_began_goes_on(talk):
    stamp, start = talk
    old_stamp(stamp, done=False)
    os.utime(stamp, (1e9, 1e9))
    Path("run/rl/checkpoints/step_000002").mkdir(parents=True)
    os.utime("run/rl/checkpoints/step_000002", (1e9 + 1, 1e9 + 1))  # the first attempt's: it gets no later one
    assert start(fail=True) == "resumed"
    assert json.loads(stamp.read_text())["recordings"]
    assert start(fail=True) == "resumed"
    Path("corpus/talk.wav").write_bytes(b"klat" * 9000)
    assert start(fail=True) == "ran"


def test_a_stage_whose_recording_was_replaced_while_it_was_interrupted_starts_anew(talk):
    _, start = talk
    assert start(fail=True) == "ran"
    Path("corpus/talk.wav").write_bytes(b"klat" * 9000)
    assert start(fail=True) == "ran"
