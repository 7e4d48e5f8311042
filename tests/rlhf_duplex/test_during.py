"""Evaluation during training leaves the training as it was, and RL runs in live dialogues, too."""

import json
import signal

from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.suite import put_aside
from rlhf_duplex.inputs import first_of_each
from rlhf_duplex.run_folder import StoppedError

SMALL = [
    "trainer.updates=2", "trainer.groups=2", "trainer.group_size=2", "trainer.minibatch=4", "context.probability=0",
    "context.lead_in=0.4", "evaluation.limit=1", "checkpointing.every=2", "checkpointing.keep=1",
]  # fmt: skip
FREE = ("time/", "evaluation/", "audio_seconds_per_second")


def run(folder, *arguments):
    assert main(["train", f"run_dir={folder}", *SMALL, *arguments]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_evaluation_during_training_changes_nothing(tmp_path):
    plain = run(tmp_path / "plain")
    watched = run(tmp_path / "watched", "evaluation.limit=2", "evaluation.every=1", "evaluation.every_limit=1")
    for one, other in zip(plain, watched, strict=True):
        keep = [{k: v for k, v in row.items() if not k.startswith(FREE)} for row in (one, other)]
        assert keep[0] == keep[1]
    for row in watched:
        assert "evaluation/turn_taking/reward" in row
        assert row["time/evaluation"] > 0
    # After the last update the policy is the one of `after.json`: half of its segments, and of those the same draws.
    last = json.loads((tmp_path / "watched" / "evaluation" / "update_000002.json").read_text())
    after = json.loads((tmp_path / "watched" / "evaluation" / "after.json").read_text())
    rewards = [result["segments"]["turn_taking"]["reward"] for result in (last, after)]
    assert [len(found) for found in rewards] == [1, 2]
    for axis, metrics in last["segments"].items():
        for metric, values in metrics.items():
            assert values.items() <= after["segments"][axis][metric].items(), (axis, metric)
    assert watched[-1]["evaluation/turn_taking/reward"] == sum(rewards[0].values())


def test_what_was_measured_at_an_earlier_end_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "evaluation"
    run(tmp_path / "run", "trainer.updates=1", "evaluation.episodes=1")
    first = (folder / "after.json").read_bytes()
    monkeypatch.setattr("rlhf_duplex.trainer.Trainer.run", lambda trainer: True)  # stopped at once
    assert main(["train", f"run_dir={tmp_path / 'run'}", *SMALL, "evaluation.episodes=1", "resume=true"]) == 0
    assert not (folder / "after.json").exists()
    assert not (folder / "after").exists()
    assert (folder / "step_000001.json").read_bytes() == first
    assert list((folder / "step_000001").iterdir())
    (folder / "after.json").write_bytes(first + b"\n")  # where that update was measured by `evaluate`, too
    (folder / "after").mkdir()
    put_aside(tmp_path / "run", "after")
    assert not (folder / "after.json").exists()
    assert not (folder / "after").exists()
    assert (folder / "step_000001.json").read_bytes() == first
    assert list((folder / "step_000001").iterdir())


def test_an_interruption_changes_neither_the_curve_nor_the_best(tmp_path, monkeypatch):
    best = "checkpointing.best=evaluation/turn_taking/reward"
    rl = ["trainer.updates=3", "evaluation.every=1", "evaluation.episodes=0", best]
    whole = run(tmp_path / "whole", *rl)

    def stopped(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        raise StoppedError

    for update in (1, 2):  # in its evaluation: a checkpoint out of turn, and one that is due
        go_on = ["resume=true"] if update == 2 else []
        with monkeypatch.context() as patch:
            calls = iter([first_of_each] * (update - 1) + [stopped])
            patch.setattr("rlhf_duplex.trainer.first_of_each", lambda *a, calls=calls: next(calls)(*a))
            rows = run(tmp_path / "run", *rl, *go_on)
        assert [row["update"] for row in rows] == list(range(1, update + 1))
        assert (tmp_path / "run" / "checkpoints" / f"step_{update:06d}").is_dir()
        assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()

    def killed(*arguments):
        raise KeyboardInterrupt  # between a checkpoint and its mark

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_duplex.trainer.mark_best", killed)
        assert main(["train", f"run_dir={tmp_path / 'run'}", *SMALL, *rl, "resume=true"]) == 130
    assert not (tmp_path / "run" / "checkpoints" / "best.json").exists()
    found = run(tmp_path / "run", *rl, "resume=true")
    for one, other in zip(whole, found, strict=True):
        keep = [{k: v for k, v in r.items() if not k.startswith(("time/", "audio_seconds_per"))} for r in (one, other)]
        assert keep[0] == keep[1]
    best = [(tmp_path / name / "checkpoints" / "best.json").read_text() for name in ("whole", "run")]
    assert best[0] == best[1]


def test_an_evaluation_of_other_settings_is_not_held_against_the_first(tmp_path, capsys):
    run(tmp_path / "run", "trainer.updates=1", "evaluation.episodes=0")
    arguments = ["train", f"run_dir={tmp_path / 'run'}", *SMALL, "resume=true"]
    config = (tmp_path / "run" / "config.yaml").read_text()
    for changed, what in (
        ("evaluation.samples=2", "was measured with samples 1, not 2"),
        ("evaluation.seed=7", "was measured with seed 1, not 7"),
        ("evaluation.limit=2", "has nothing of 4 of 8 held-out segments"),
    ):
        assert main([*arguments, changed]) == 2
        assert what in capsys.readouterr().err
    assert (tmp_path / "run" / "evaluation" / "after.json").is_file()
    assert main(["evaluate", *arguments[1:], "evaluation.samples=2", "evaluation.episodes=0"]) == 0  # beside the run's
    assert (tmp_path / "run" / "evaluation" / "step_000001.json").is_file()
    assert (tmp_path / "run" / "config.yaml").read_text() == config


def test_the_first_update_tells_what_no_configuration_could(tmp_path, capsys):
    axes = tmp_path / "axes.py"
    axes.write_text(
        "from rewards import RewardAxis\nclass Mute(RewardAxis):\n    name = 'mute'\n"
        "    def score_episode(self, episode):\n        return None\n"
    )
    run(
        tmp_path / "run",
        f"rewards={{turn_taking: {{weight: 1}}, backchannel: {{weight: 1}}, mute: {{weight: 1, target: {axes}}}}}",
        "checkpointing.best=reward/totl",
        "train_axes=[turn_taking]",
        "evaluation.episodes=0",
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("reward axis 'mute' gave no score in this update") == 1
    assert shown.count("reward axis 'backchannel' scores backchannel: none of it is trained on") == 1
    assert shown.count("checkpointing.best: 'reward/totl' is no metric (reward/total") == 1
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "pause_handling" not in config.partition("rewards:")[2]  # the command line's rewards are all there are


def test_rl_trains_in_live_dialogues(tmp_path):
    live = ["env=live", "live.dialogues=4", "live.seconds=6", "live.lead_in=0.4", "rewards={fluency: {weight: 1.0}}"]
    first = run(tmp_path / "one", *live, "evaluation.episodes=0")
    assert len(first) == 2
    for row in first:
        assert row["episodes"] == 4
        assert row["audio_seconds"] == 4 * 6.4
        assert -10 <= row["reward/fluency"] <= 0
        assert abs(row["ratio_first"] - 1) < 1e-3
