"""The metrics log: a line an update, cut back on resume, mirrored to TensorBoard."""

import json

import pytest

from envs.errors import InputError
from rlhf_duplex.tracking import MetricsLog, check_trackers, read_metrics


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_fresh_log_starts_empty_and_a_resumed_one_is_cut_back(tmp_path):
    log = MetricsLog(tmp_path, [], {})
    for update in (1, 2, 3):
        log.write(update, {"loss": update / 2})
    log.close()
    assert [line["update"] for line in lines(tmp_path)] == [1, 2, 3]
    MetricsLog(tmp_path, [], {}, keep_updates=2).write(3, {"loss": 9.0})
    assert lines(tmp_path)[-2:] == [{"update": 2, "loss": 1.0}, {"update": 3, "loss": 9.0}]
    MetricsLog(tmp_path, [], {})
    assert lines(tmp_path) == []


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 0.5}\n{"update": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"update": 1, "loss": 0.5}]


def test_wandb_without_a_key_is_said_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="tracker wandb has no key: run `wandb login`"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").touch()
    check_trackers(["wandb", "tensorboard"])


def test_tensorboard_gets_the_same_scalars(tmp_path):
    log = MetricsLog(tmp_path, ["tensorboard"], {"seed": 0, "checkpoint": "nano"})
    log.write(1, {"reward/turn_taking": -1.5})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("reward/turn_taking")
    assert (scalar.step, scalar.value) == (1, -1.5)
