"""The command line as a person meets it: help at once, errors in a line with exit code 2, before a model is loaded."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from envs.audio import resample
from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.config import load_config
from rlhf_duplex.config_files import to_yaml
from rlhf_duplex.inputs import NANO_DATA, load_segments
from rlhf_duplex.policy.bundle import NANO_FOLDER
from rlhf_duplex.run_folder import check_data, claimed
from rlhf_duplex.warmstart.config import load_warmstart_config

ROOT = Path(__file__).parents[2]


def run(*arguments, **options):
    command = [sys.executable, "-m", "rlhf_duplex.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, **options)


def manifest(tmp_path, recording="dialogue.wav", **changes):
    row = {
        "id": "s0",
        "axis": "turn_taking",
        "recording": recording,
        "user_channel": 1,
        "start": 0.0,
        "end": 2.0,
        "events": {"user_turn_end": 1.0},
    } | changes
    path = tmp_path / "segments.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def write(tmp_path, samples, name="dialogue.wav"):
    soundfile.write(str(tmp_path / name), samples, 16000, subtype="FLOAT")


def talk(spoken):
    """The beginning of a dialogue, in which the user speaks."""
    return resample(spoken.audio.T, spoken.rate, 16000).T[:48000]


def noise(channels=2, seconds=3.0):
    return np.random.default_rng(0).normal(0, 0.01, (int(seconds * 16000), channels)).astype(np.float32)


def failing(capsys, *arguments):
    """Exit code 2 and exactly one line on standard error, which is returned."""
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("rlhf-duplex: ")
    return error


def test_help_names_the_commands_and_imports_nothing_heavy():
    shown = run("--help")
    assert shown.returncode == 0
    assert re.match(r"python 3\.\d+\.\d+, rlhf-duplex \S+, moshi 0\.", run("--version").stdout)
    commands = ("curate", "pairs", "converse", "warmstart", "pipeline", "train", "evaluate", "ablate", "report")
    assert all(name in shown.stdout for name in commands)
    code = "import rlhf_duplex.cli, sys; rlhf_duplex.cli.build_parser(); print('torch' in sys.modules)"
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert heavy.stdout.strip() == "False"
    for command in commands:
        assert "example" in run(command, "--help").stdout


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_loads_and_opens_with_its_command(name):
    first = (ROOT / "configs" / name).read_text().splitlines()[0]
    command = first.removeprefix("# rlhf-duplex ").split()[0]
    {"train": load_config, "warmstart": load_warmstart_config}[command](ROOT / "configs" / name)
    assert f"configs/{name}" in first


def test_bad_manifests(tmp_path, capsys):
    run_dir = f"run_dir={tmp_path / 'run'}"

    def error():
        return failing(capsys, run_dir, f"segments={tmp_path / 'segments.jsonl'}")

    assert "does not exist" in error()
    write(tmp_path, noise())
    path = manifest(tmp_path)
    path.write_text(path.read_text() + "{not json\n")
    assert "segments.jsonl:2: not valid JSON" in error()
    manifest(tmp_path, axis="telepathy")
    assert "unknown axis 'telepathy'" in error()
    manifest(tmp_path, user_channel=2)
    assert "`user_channel` 2 is out of range" in error()
    manifest(tmp_path, end=99.0)
    assert "lies outside" in error()
    manifest(tmp_path, recording="nowhere.wav")
    assert "does not exist" in error()


def test_bad_audio(tmp_path, capsys):
    run_dir = f"run_dir={tmp_path / 'run'}"
    path = manifest(tmp_path)

    def error():
        return failing(capsys, run_dir, f"segments={path}")

    write(tmp_path, noise(channels=1))
    assert "1 channel(s), 2 are needed" in error()
    (tmp_path / "dialogue.wav").write_bytes(b"RIFF, or so it says")
    assert "cannot be read as audio" in error()
    (tmp_path / "dialogue.wav").write_bytes(b"")
    assert "cannot be read as audio" in error()
    write(tmp_path, np.zeros((0, 2), dtype=np.float32))
    assert "lasts 0.000 s" in error()
    write(tmp_path, noise() * [1, 0])
    assert "is silent on channel 1 (peak 0), where the user should speak: is `user_channel` right?" in error()
    broken = noise()
    broken[8000, 1] = np.nan
    write(tmp_path, broken)
    assert "NaN or infinite samples on channel 1" in error()
    write(tmp_path, noise())  # loud enough, and nobody speaks: the event is given and cannot tell
    heard = f"segment 's0' of {tmp_path / 'dialogue.wav'} holds no user speech on channel 1: is `user_channel` right?"
    assert heard in error()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.onset_words=[mm-hm]", "trainer.onset_words are of trainer.objective=onsets, found tokens"),
        ("trainer.update=3", "unknown configuration key 'trainer.update'"),
        ("nonsense=3", "unknown configuration key 'nonsense'"),
        ("trainer.updates=many", "trainer.updates"),
        ("trainer.group_size=1", "at least 2"),
        ("sampling.text_temperature=nan", "sampling.text_temperature must be a number of at least 0, found nan"),
        ("sampling.audio_top_k=-3", "sampling.audio_top_k must be a number of at least 0, found -3"),
        ("optimiser.learning_rate=inf", "optimiser.learning_rate must be above 0 and finite, found inf"),
        ("context.max_seconds=nan", "context.max_seconds must be a number of at least 0, found nan"),
        ("rewards.turn_taking.name=x", "a reward axis has no option 'name'"),
        ("trainer.algorithm=sarsa", "'sarsa' is not known"),
        ("checkpoint=no-such-model", "checkpoint 'no-such-model' is no folder"),
        ("checkpoint=rlhf_duplex/nanno", "checkpoint 'rlhf_duplex/nanno' is not there: rlhf_duplex holds nano"),
        ("rewards.charm.weight=1", "unknown reward axis 'charm'"),
        ("rewards.turn_taking.weight=heavy", "`weight` must be a finite number"),
        ("detector.name=ear", "unknown speech detector 'ear'"),
        ("evaluation.segments=nowhere.jsonl", "does not exist"),
        ("rewards.backchannel=0", "did you mean rewards.<axis>.weight"),
        ("seed=-1", "seed must be a number of at least 0"),
        ("context.lead_in=nan", "context.lead_in must be a number"),
        ("optimiser.betas=[0.9,1.5]", "optimiser.betas must lie in"),
        ("optimiser.final_share=-2", "optimiser.final_share must lie in [0, 1], found -2"),
        ("rollout.batch_size=-1", "rollout.batch_size must be a number of at least 0, found -1"),
        ("seed=99999999999999999999999", "seed must be below 2^63"),
        ("context.schedule=steep", "context schedule 'steep' is not known"),
        ("train_axes=backchannel", "'train_axes' is a list: write train_axes=[ONE, ANOTHER]"),
        ("trainer=3", "a section of the configuration has keys, such as trainer.updates"),
        ("run_dir=", "'run_dir' must have a value"),
        ("rewards={}", "no reward axis is configured"),
        ("prompt.voice=nowhere.wav", "prompt.voice nowhere.wav is no recording of a voice"),
        ("device=abacus", "device 'abacus' cannot be used"),
        ("trackers=[abacus]", "tracker 'abacus' is not known"),
        ("cluster.workers=1 device=cuda:1", "device cuda:1: on Ray each process sees the GPUs that it was given"),
        ("cluster.workers=1 device=gpu", "device 'gpu' cannot be used"),
    ],
)
def test_bad_configuration(tmp_path, capsys, argument, message):
    arguments = argument.split() if argument.startswith("cluster") else [argument]
    assert message in failing(capsys, f"run_dir={tmp_path / 'run'}", *arguments)


def test_onset_words_that_the_tokenizer_cannot_tell_apart(tmp_path, capsys):
    def error(words):
        run = f"run_dir={tmp_path / 'run'}"
        return failing(capsys, run, "trainer.objective=onsets", f"trainer.onset_words={words}")

    assert "'I see' and 'I think' begin with the same token" in error("[mm-hm, I see, I think]")
    assert "the tokenizer of this model has no token for ''" in error("['']")


def test_configuration_files_that_are_wrong(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {updates: 1, luck: 7}\n")
    assert "unknown configuration key 'trainer.luck'" in failing(capsys, str(path))
    path.write_text("# rlhf-duplex warmstart this.yaml\npairs: p.jsonl\n")
    assert "(the file opens with 'rlhf-duplex warmstart this.yaml')" in failing(capsys, str(path))
    path.write_text("\n")
    assert "config.yaml is empty: leave it out" in failing(capsys, str(path))
    path.write_text("trainer: [unclosed\n")
    assert "not valid YAML" in failing(capsys, str(path))


def test_a_run_folder_that_another_run_writes_to(tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    with claimed(tmp_path / "run"):
        assert "another run is writing to" in failing(capsys, f"run_dir={tmp_path / 'run'}")
        assert main(["evaluate", f"run_dir={tmp_path / 'run'}"]) == 2
        assert "another run is writing to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # not put aside, and the lock is gone
    monkeypatch.setattr(Path, "open", denied)
    with claimed(tmp_path / "run"):  # a mount, beside which nothing can be written
        pass
    monkeypatch.undo()
    with claimed(tmp_path / "suite"):
        assert main(["evaluate", "--suite", "questions", "--out", str(tmp_path / "suite")]) == 2
        assert "another run is writing to" in capsys.readouterr().err
    with claimed(tmp_path / "run"):  # free again
        (tmp_path / "latest").symlink_to(tmp_path / "run")
        with pytest.raises(InputError, match="another run is writing to"), claimed(tmp_path / "latest"):
            pass


def test_a_lock_that_was_removed_while_it_was_waited_for_is_no_lock(tmp_path, monkeypatch):
    take = fcntl.flock

    def removed(file, how):
        take(file, how)
        (tmp_path / ".run.lock").unlink()  # by the run that ended between our opening it and our locking it

    monkeypatch.setattr("rlhf_duplex.run_folder.fcntl.flock", removed)
    with pytest.raises(InputError, match="another run is writing to"), claimed(tmp_path / "run"):
        pass

    def none(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("rlhf_duplex.run_folder.fcntl.flock", none)
    with claimed(tmp_path / "run"):  # a file system without locks
        pass


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in failing(capsys, f"run_dir={tmp_path / 'file' / 'run'}")


def test_speech_is_found_beside_what_is_louder(tmp_path, spoken, silero):
    burst = np.random.default_rng(0).normal(0, 0.3, (64000, 2)).astype(np.float32)
    write(tmp_path, np.concatenate([talk(spoken), burst]))
    path = manifest(tmp_path, end=7.0)
    (segment,) = load_segments(str(path), "train", silero)
    assert segment.end == 7.0
    manifest(tmp_path, start=3.5, end=7.0, events={"user_turn_end": 4.0})  # the burst alone
    with pytest.raises(InputError, match="holds no user speech on channel 1"):
        load_segments(str(path), "train", silero)


def several(tmp_path, spoken, heard, unheard, **changes):
    """A manifest of segments in which the user speaks, and of segments of noise."""
    write(tmp_path, np.concatenate([talk(spoken), noise()]))
    rows = []
    for i in range(heard + unheard):
        begin = 0.0 if i < heard else 3.0
        at = {"start": begin, "end": begin + 3.0, "events": {"user_turn_end": begin + 1.0}}
        rows.append(manifest(tmp_path, id=f"s{i}", **(at | changes)).read_text())
    path = tmp_path / "segments.jsonl"
    path.write_text("".join(rows))
    return path


def test_a_few_segments_without_a_user_are_noted_and_most_are_refused(tmp_path, spoken, silero):
    notes = []
    path = str(several(tmp_path, spoken, 4, 4))
    assert len(load_segments(path, "train", silero, notes)) == 8
    note = f"{path}: the detector hears no user in 4 of 8 segments ('s4', 's5', 's6', ...): look at them, or leave "
    assert [n.startswith(note) for n in notes] == [True], notes
    several(tmp_path, spoken, 1, 2)
    refused = r"segment 's1' of .* no user speech on channel 1: is `user_channel` right\? It is so in 2 of 3 segments"
    with pytest.raises(InputError, match=refused):
        load_segments(path, "train", silero, notes)
    notes = []
    assert len(load_segments(path, "train", silero, notes, resumed=True)) == 3
    assert "in 2 of 3 segments ('s1', 's2')" in notes[0]
    several(tmp_path, spoken, 3, 2, events={})  # an event that cannot be read off, said of all at once
    with pytest.raises(InputError, match=r"segment 's3' of .* It is so in 2 of 5 segments"):
        load_segments(path, "train", silero)


def test_a_run_notes_what_is_odd_before_a_model_is_loaded(tmp_path, spoken, capsys, monkeypatch):
    def stop(*arguments):
        raise InputError("here the model would be loaded")

    path = several(tmp_path, spoken, 2, 1)
    monkeypatch.setattr("rlhf_duplex.run.Trainer", stop)
    assert main(["train", f"segments={path}", f"evaluation.segments={path}", f"run_dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("hears no user in 1 of 3 segments ('s2'): look at them") == 2
    monkeypatch.setattr("rlhf_duplex.warmstart.run.check_machine", lambda config: None)
    monkeypatch.setattr("rlhf_duplex.warmstart.run.read_pairs", lambda path: [])
    monkeypatch.setattr("rlhf_duplex.warmstart.run.split_pairs", lambda *arguments: ([], []))
    monkeypatch.setattr("rlhf_duplex.warmstart.run._warmstart", stop)
    assert main(["warmstart", f"evaluation.segments={path}", f"run_dir={tmp_path / 'warm'}"]) == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("hears no user in 1 of 3 segments") == 1


def test_a_mistake_leaves_an_older_run_where_it_is(tmp_path, capsys, spoken):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    failing(capsys, f"run_dir={run}", "segments=typo.jsonl")
    assert (run / "evaluation").is_dir()
    shutil.copytree(NANO_FOLDER, run / "checkpoints" / "step_000001")
    assert main(["evaluate", f"run_dir={run}", f"checkpoint={run / 'checkpoints' / 'step_000001'}"]) == 2
    assert "lies in the run folder" in capsys.readouterr().err
    assert (run / "checkpoints" / "step_000001").is_dir()
    write(run, talk(spoken))
    for argument in (f"segments={manifest(run)}", f"evaluation.segments={manifest(run)}"):
        assert "lies in the run folder" in failing(capsys, f"run_dir={run}", argument)
    assert main(["evaluate", f"run_dir={run}", f"evaluation.segments={run}/segments.jsonl"]) == 2
    assert "lies in the run folder" in capsys.readouterr().err
    assert (run / "segments.jsonl").is_file()
    assert not list(tmp_path.glob("run.old-*"))


def test_a_suite_says_what_it_would_ignore(tmp_path, capsys):
    assert main(["evaluate", "--suite", "live", "checkpoint=nano", f"run_dir={tmp_path}"]) == 2
    assert f"run_dir={tmp_path} is of --suite heldout, not of live" in capsys.readouterr().err


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert "has no checkpoint" in failing(capsys, f"run_dir={tmp_path / 'run'}", "resume=true")


def test_a_resumed_run_has_no_fewer_updates_than_are_done(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "step_000004").mkdir(parents=True)
    arguments = [str(ROOT / "configs" / "debug.yaml"), f"run_dir={tmp_path / 'run'}"]
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(load_config(Path(arguments[0]), arguments[1:])))
    assert main(["train", *arguments, "resume=true", "trainer.updates=3"]) == 2
    said = capsys.readouterr().err
    assert "resume: 4 updates are done, and trainer.updates is 3: it may grow, not shrink" in said


def test_a_tilde_is_the_users_folder_wherever_a_path_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["run_dir=~/run", "segments=~/s.jsonl", "rewards={mine: {target: ~/axis.py}}"])
    assert (config.run_dir, config.segments) == (f"{tmp_path}/run", f"{tmp_path}/s.jsonl")
    assert config.rewards["mine"]["target"] == f"{tmp_path}/axis.py"
    assert main(["curate", "~/none", "--out=~/q.jsonl"]) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err
    assert main(["curate", "none", "--out=~nobody/q.jsonl"]) == 2
    assert main(["report", "~/run"]) == 2
    assert f"{tmp_path}/run" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_what_a_resumed_run_learns_from_is_what_it_was(tmp_path, capsys, spoken):
    path, run = manifest(tmp_path), tmp_path / "run"
    write(tmp_path, talk(spoken))
    run.mkdir()
    check_data(run, False, "nano", {"segments": path})
    check_data(run, True, "nano", {"segments": path})
    assert json.loads((run / "provenance.json").read_text())["versions"].keys() > {"python", "moshi", "torch"}
    manifest(tmp_path, end=2.5)
    assert "segments.jsonl is not what it was when this run began" in failing(
        capsys, f"run_dir={run}", f"segments={path}", "resume=true"
    )
    manifest(tmp_path)
    audio = (tmp_path / "dialogue.wav").read_bytes()
    write(tmp_path, talk(spoken)[::-1])  # as long as it was, and the manifest is the old one
    changed = f"resume: a recording or shard that {path} names is not what it was when this run began"
    with pytest.raises(InputError, match=re.escape(changed)):
        check_data(run, True, "nano", {"segments": path})
    (tmp_path / "dialogue.wav").write_bytes(audio)  # only its time is another
    check_data(run, True, "nano", {"segments": path})
    note = json.loads((run / "provenance.json").read_text())
    del note["sha256"]["segments: files"]  # as earlier versions wrote it
    (run / "provenance.json").write_text(json.dumps(note))
    write(tmp_path, talk(spoken)[::-1])
    check_data(run, True, "nano", {"segments": path})
    manifest(tmp_path, end=2.5)
    check_data(run, False, "nano", {"segments": path})  # a run that begins anew takes what there is
    (run / "provenance.json").write_text("{")
    assert "provenance.json is damaged" in failing(capsys, f"run_dir={run}", f"segments={path}", "resume=true")
    base, other = tmp_path / "base", tmp_path / "other"
    other.mkdir()
    shutil.copytree(NANO_FOLDER, base)
    check_data(other, False, str(base), {"segments": path})
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"text_linear.weight": weights["text_linear.weight"] + 1}, base / "model.safetensors")
    arguments = [f"run_dir={other}", f"segments={path}", f"checkpoint={base}", "resume=true"]
    assert "base is not what it was when this run began" in failing(capsys, *arguments)


def test_a_result_before_training_of_other_segments_is_refused(tmp_path, capsys):
    record = {"checkpoint": "nano", "lead_in_seconds": 1.0, "samples": 1, "update": 0, "axes": {}}
    found = tmp_path / "before.json"
    found.write_text(json.dumps(record | {"segments": {"turn_taking": {"reward": {"elsewhere": 0.0}}}}))
    arguments = [f"run_dir={tmp_path / 'run'}", f"evaluation.before={found}", "context.lead_in=1"]
    assert "has nothing of 8 of 8 held-out segments, such as" in failing(capsys, *arguments, "evaluation.limit=2")
    assert "was measured with samples 1, not 2" in failing(capsys, *arguments, "evaluation.samples=2")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    errors = iter(
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints/model.safetensors"),
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            OSError(errno.EIO, os.strerror(errno.EIO)),
        ]
    )

    def train(_):
        raise next(errors)

    monkeypatch.setattr("rlhf_duplex.run.train", train)
    assert "the disk is full" in failing(capsys)
    assert "the disk is full" in failing(capsys)
    with pytest.raises(OSError, match="Input/output"):
        main(["train"])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def train(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_duplex.run.train", train)
    assert main(["train"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "rlhf-duplex: stopped; training that has a checkpoint goes on with resume=true, the rest with the same command"
    ]


def test_a_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_stopped_run_leaves_a_checkpoint_to_go_on_from(tmp_path):
    segments = NANO_DATA / "heldout" / "segments.jsonl"
    rows = [json.loads(line) for line in segments.read_text().splitlines()]
    for row in rows:
        row["recording"] = str(segments.parent / row["recording"])
    short = tmp_path / "segments.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    arguments = [f"run_dir={tmp_path / 'run'}", f"segments={short}", "trainer.updates=500", "trainer.groups=1"]
    arguments += ["trainer.group_size=2", "sampling.audio_top_k=0", "context.lead_in=0.2", "context.probability=0"]
    command = [sys.executable, "-m", "rlhf_duplex.cli", "train", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "no update within 240 s"
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "resume=true" in output
    done = metrics.read_text().count("\n")
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert checkpoint.name == f"step_{done:06d}"
