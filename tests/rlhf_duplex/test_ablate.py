"""Ablations with real trials in their own processes: failures of every kind, kills, Ray."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from stored_trials import write_run

from envs.errors import InputError
from envs.files import write_text
from envs.segments import write_manifest
from rlhf_duplex.ablate.plan import load_plan
from rlhf_duplex.ablate.run import ablate, show_plan
from rlhf_duplex.ablate.trial import Record, read_record, write_record
from rlhf_duplex.cli import main
from rlhf_duplex.config_files import to_yaml
from rlhf_duplex.evaluation.metrics import read_results
from rlhf_duplex.run_folder import claimed, make_console

pytestmark = pytest.mark.timeout(1800)  # real trainings, on a machine that may be busy
ROOT = Path(__file__).parents[2]
AXIS = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path
from rewards import RewardAxis, Score, register_axis

@register_axis
@dataclass
class Trouble(RewardAxis):
    """What goes wrong in the second update."""
    kind: str = "none"
    value: float = 0.0
    name = "trouble"

    def score_episode(self, episode):
        if episode.policy_version >= 1:
            if self.kind == "memory":
                bytearray(64 << 30)
            once = Path(__file__).with_name("was_killed")
            if self.kind == "killed" or (self.kind == "killed once" and not once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
            if self.kind == "raises":
                raise KeyError("what the axis forgot")
        return Score(self.value)
'''


def write_base(folder: Path, one_of_each) -> Path:
    """A configuration that trains in seconds: two short segments, two updates of two groups of two."""
    wanted = [s for s in one_of_each if s.axis in ("pause_handling", "turn_taking")]
    write_manifest(folder / "segments.jsonl", wanted)
    (folder / "trouble.py").write_text(AXIS)
    path = folder / "base.yaml"
    path.write_text(
        f"checkpoint: nano\nsegments: {folder}/segments.jsonl\nevaluation: {{segments: {folder}/segments.jsonl}}\n"
        "trainer: {updates: 2, groups: 2, group_size: 2, minibatch: 4}\ncontext: {probability: 0.0, lead_in: 0.4}\n"
        "checkpointing: {every: 1}\n"
        "rewards:\n  pause_handling: {}\n  turn_taking: {}\n"
        f"  trouble: {{weight: 0, kind: none, target: {folder}/trouble.py}}\n"
    )
    return path


@pytest.fixture(scope="module")
def begin(tmp_path_factory, one_of_each):
    """The result of nano as it is, for trials that are not to measure it again."""
    folder = tmp_path_factory.mktemp("begin")
    assert main(["evaluate", str(write_base(folder, one_of_each)), f"run_dir={folder}/run"]) == 0
    return folder / "run" / "evaluation" / "before.json"


@pytest.fixture(scope="module")
def ended(tmp_path_factory, begin):
    """An ablation of which every condition but the first fails in a way of its own."""
    folder = tmp_path_factory.mktemp("failures")
    base = begin.parents[2] / "base.yaml"  # the same axis file: rewards of another are not compared
    (folder / "ablation.yaml").write_text(
        f"base: {base}\nrun_dir: {folder}/run\nseeds: [3]\nmemory_gb: 16\nretries: 0\n"
        f"overrides: {{evaluation.before: {begin}}}\n"
        "grid: {rewards.trouble.kind: [none, raises, memory, killed]}\n"
        "conditions: [{name: diverges, overrides: {optimiser.learning_rate: 1.0e+30, optimiser.warmup_updates: 0}}]\n"
    )
    plan = load_plan(folder / "ablation.yaml")
    ablate(plan)
    return plan


def test_failures_leave_the_other_trials_alone(ended):
    states = pd.read_csv(ended.run_dir / "trials.csv", keep_default_na=False).set_index("condition")
    assert states["status"].to_dict() == {
        "diverges": "failed",
        "trouble.kind none": "done",
        "trouble.kind raises": "failed",
        "trouble.kind memory": "failed",
        "trouble.kind killed": "failed",
    }
    assert states["attempts"].tolist() == [1] * 5
    why = states["why"]
    assert why["diverges"].startswith("NonFiniteError: ")
    assert why["trouble.kind raises"] == "KeyError: 'what the axis forgot'"
    assert why["trouble.kind memory"].startswith("MemoryError")
    assert "most likely it ran out of memory" in why["trouble.kind killed"]
    record = read_record(ended.run_dir, "trouble.kind_raises_seed3")
    assert "trouble.py" in record.traceback


def test_the_table_is_tidy_and_the_same_in_both_files(ended):
    table = pd.read_csv(ended.run_dir / "table.csv")
    pd.testing.assert_frame_equal(table, pd.read_parquet(ended.run_dir / "table.parquet"), check_dtype=False)
    assert set(table["trial"]) == {"trouble.kind_none_seed3"}
    assert not table.duplicated(["trial", "axis", "metric"]).any()
    assert set(table["rewards.trouble.kind"]) == {"none"}
    after = json.loads((ended.run_dir / "trials" / table["trial"][0] / "evaluation" / "after.json").read_text())
    row = table[(table["axis"] == "turn_taking") & (table["metric"] == "reward")].iloc[0]
    assert row["after"] == pytest.approx(after["axes"]["turn_taking"]["reward"]["mean"])
    assert row["n"] == 1


def test_the_page_says_which_failed_and_why(ended):
    page = (ended.run_dir / "report.html").read_text()
    for reason in ("NonFiniteError", "what the axis forgot", "MemoryError", "most likely it ran out of memory"):
        assert reason in page


def test_what_has_ended_is_not_run_again(ended, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # would fail, were a trial started
    before = {p: p.stat().st_mtime_ns for p in (ended.run_dir / "trials").rglob("*") if p.is_file()}
    assert main(["ablate", str(ended.run_dir.parent / "ablation.yaml")]) == 1  # four of them have failed
    assert before == {p: p.stat().st_mtime_ns for p in (ended.run_dir / "trials").rglob("*") if p.is_file()}


def copy_of(ended, folder, *arguments):
    """The ablation that has ended, with other options, in a folder that may be changed."""
    shutil.copytree(ended.run_dir, folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return load_plan(ended.run_dir.parent / "ablation.yaml", [f"run_dir={folder}/run", *arguments])


def test_a_spent_budget_starts_nothing(ended, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    ablate(copy_of(ended, tmp_path, "seeds=[3, 4]", "budget.trials=5"))
    shown = capsys.readouterr().out
    assert "the budget of 5 trials is spent: the same command goes on" in shown
    states = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert states["status"].tolist() == ["failed", "done", *["failed"] * 3, *["not run"] * 5]


def test_retries_left_and_retry_failed_make_trials_open_again(ended, tmp_path, capsys):
    capsys.readouterr()
    show_plan(copy_of(ended, tmp_path, "retries=3"), make_console())
    assert capsys.readouterr().out.count(": failed: ") == 4
    plan = load_plan(ended.run_dir.parent / "ablation.yaml", [f"run_dir={tmp_path}/run", "budget.trials=1"])
    ablate(plan, retry_failed=True)  # the one that is done is the whole budget
    assert [read_record(plan.run_dir, t.name).status for t in plan.trials] == ["open", "done", "open", "open", "open"]
    assert "<td>interrupted</td>" in (plan.run_dir / "report.html").read_text()


def test_the_policy_before_training_is_taken_not_played_again(ended, begin):
    source = begin.parent
    mine = ended.run_dir / "trials" / "trouble.kind_none_seed3" / "evaluation"
    assert (mine / "before.json").read_bytes() == (source / "before.json").read_bytes()
    kept = sorted(p.relative_to(source) for p in source.rglob("*.json"))
    assert kept == sorted(p.relative_to(mine) for p in mine.rglob("*.json") if "after" not in str(p.relative_to(mine)))


def test_one_command_at_a_time(ended, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    plan = copy_of(ended, tmp_path)
    with claimed(plan.run_dir), pytest.raises(InputError, match="another run is writing to"):
        ablate(plan)
    monkeypatch.setattr("rlhf_duplex.run_folder.fcntl.flock", no_locks)
    assert ablate(plan) == plan.run_dir  # a file system without locks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # the lock is gone
    path = ended.run_dir.parent / "ablation.yaml"
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="cannot be written"):
            ablate(load_plan(path, [f"run_dir={folder}"]))


def test_another_configuration_in_the_same_folder_is_refused(ended, tmp_path):
    path = ended.run_dir.parent / "ablation.yaml"
    changed = load_plan(path, ["trainer.clip=0.5"])
    with pytest.raises(InputError, match=r"trainer\.clip was 0\.2 and is 0\.5\): choose another folder"):
        ablate(changed)
    with pytest.raises(InputError, match=r"trainer\.clip was 0\.2"):  # a dry run says what the run would say
        show_plan(changed, make_console())
    assert load_plan(path, [f"run_dir={tmp_path}/run"]).run_dir == tmp_path / "run"


def worker_of(root: Path, trial: str = "") -> list[int]:
    """Processes that train under a folder, all or those of one trial."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "rlhf_duplex.ablate.worker" in command and str(root) in command and trial in command:
            found.append(int(path.parent.name))
    return found


def test_killed_and_started_again_it_is_the_same(tmp_path, one_of_each, ended):
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3]\ngrid: {{trainer.kl_beta: [0.01, 0.1]}}\n")
    command = [sys.executable, "-m", "rlhf_duplex.cli", "ablate", str(path)]
    first, second = (tmp_path / "run" / "trials" / f"kl_beta_{beta}_seed3" for beta in ("0.01", "0.1"))
    deadline = time.monotonic() + 600
    with open(tmp_path / "log", "w") as log:
        for reached in (first / "checkpoints" / "step_000001", second / "checkpoints"):
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                while not reached.exists():
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            while worker_of(tmp_path):  # it dies with whoever started it
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finished = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
        assert (first / "evaluation" / "after.json") in finished
        assert subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode == 0
    assert finished == {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    assert not list((tmp_path / "run" / "trials").glob("*.old-*"))
    assert (tmp_path / "log").read_text().count("evaluating the policy") == 1
    plan = load_plan(path)
    assert [read_record(plan.run_dir, trial.name).status for trial in plan.trials] == ["done", "done"]
    # kl_beta 0.01 is the base, which ran without interruption in the other ablation.
    columns = ["axis", "metric", "before", "after", "low", "high", "n", "difference"]
    mine, theirs = (pd.read_csv(run / "table.csv") for run in (plan.run_dir, ended.run_dir))
    mine = mine[mine["trial"] == "kl_beta_0.01_seed3"][columns].sort_values(["axis", "metric"], ignore_index=True)
    theirs = theirs[columns].sort_values(["axis", "metric"], ignore_index=True)
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def test_stopped_trials_on_ray_keep_every_update(tmp_path, one_of_each, begin):
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(
        f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3, 4, 5]\nworkers: 2\ngrid: {{trainer.kl_beta: [0.01]}}\n"
        f"overrides: {{evaluation.before: {begin}, trainer.updates: 500, checkpointing.every: 500}}\n"
    )
    *begun, third = (tmp_path / "run" / "trials" / f"kl_beta_0.01_seed{seed}" for seed in (3, 4, 5))
    deadline = time.monotonic() + 600
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "rlhf_duplex.cli", "ablate", str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

        def wait_for(condition):
            while not condition():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

        try:
            wait_for(lambda: all((trial / "metrics.jsonl").exists() for trial in begun))
            # By somebody else: it goes on from where it was.
            (stopped,) = worker_of(tmp_path, begun[0].name)
            os.kill(stopped, signal.SIGTERM)
            wait_for(lambda: worker_of(tmp_path, begun[0].name) not in ([], [stopped]))
            kept = len((begun[0] / "metrics.jsonl").read_text().splitlines())
            assert (begun[0] / "checkpoints" / f"step_{kept:06d}").is_dir()
            wait_for(lambda: len((begun[0] / "metrics.jsonl").read_text().splitlines()) > kept)
            process.send_signal(signal.SIGINT)
            assert process.wait(600) == 0
        finally:
            process.kill()
    updates = [len((trial / "metrics.jsonl").read_text().splitlines()) for trial in begun]
    for trial, count in zip(begun, updates, strict=True):
        assert 1 <= count < 500
        assert max(p.name for p in (trial / "checkpoints").glob("step_*")) == f"step_{count:06d}"
        record = read_record(tmp_path / "run", trial.name)
        assert (record.status, record.attempts) == ("open", 0)
        assert record.seconds > 0
    assert not third.exists()  # it does not take the place of the one that ends first
    assert not (tmp_path / "run" / "records" / f"{third.name}.json").exists()
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert "Last result" not in (tmp_path / "log").read_text()  # a line of Tune's own
    # What has been spent so counts: nothing further begins.
    ablate(load_plan(path, ["budget.hours=0.0001"]))
    assert updates == [len((trial / "metrics.jsonl").read_text().splitlines()) for trial in begun]
    assert not list((tmp_path / "run").glob(".stopping"))


def test_on_ray_with_early_stopping_and_a_second_attempt(tmp_path, one_of_each, begin, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")  # the machine is short of memory throughout
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(
        f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3]\nconditions:\n"
        "- {name: good, overrides: {rewards.trouble.value: 1.0, rewards.trouble.kind: killed once}}\n"
        "- {name: bad, overrides: {rewards.trouble.value: 0.0}}\n"
        f"overrides: {{evaluation.before: {begin}, trainer.updates: 4}}\nworkers: 1\n"
        "asha: {metric: reward/trouble, grace: 1, reduction: 2}\n"
    )
    plan = load_plan(path)
    ablate(plan)
    good, bad = (read_record(plan.run_dir, trial.name) for trial in plan.trials)
    assert (good.status, good.attempts) == ("done", 2)
    assert bad.status == "stopped early"
    assert bad.why.startswith("behind after ")
    assert set(pd.read_csv(plan.run_dir / "table.csv")["trial"]) == {plan.trials[0].name}
    assert not worker_of(tmp_path)
    assert "stopped early" in (plan.run_dir / "report.html").read_text()


def test_optuna_goes_on_from_the_points_that_it_has(tmp_path, one_of_each, begin, monkeypatch):
    pytest.importorskip("optuna", reason="an extra: pip install rlhf-duplex[search]; part of [dev]")
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(
        f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3]\noverrides: {{evaluation.before: {begin}}}\nworkers: 1\n"
        "search: {space: {rewards.trouble.value: {uniform: [0, 1]}}, points: 2, sampler: optuna, "
        "metric: trouble.reward}\n"
    )
    # The base and a point are there, as an earlier call leaves them: the point that Optuna begins with (seed 0).
    point = {"number": 0, "overrides": {"rewards.trouble.value": 0.5488}}
    write_text(tmp_path / "run" / "points" / "5d2f.json", json.dumps(point))
    earlier, played = load_plan(path), read_results(begin)["segments"]["trouble"]["reward"]
    for trial, value in zip(earlier.trials, (0.0, 0.5488), strict=True):
        result = {"trouble": {"reward": dict.fromkeys(played, value)}}
        write_run(Path(trial.config.run_dir), result, result, to_yaml(trial.config), episodes=False)
    assert main(["ablate", str(path)]) == 0
    plan = load_plan(path)
    assert plan.conditions[:2] == earlier.conditions
    proposed = plan.conditions[2].overrides["rewards.trouble.value"]
    table = pd.read_csv(tmp_path / "run" / "table.csv")
    measured = table[(table["axis"] == "trouble") & (table["metric"] == "reward")]
    assert measured["after"].tolist() == pytest.approx([0.0, 0.5488, proposed])
    assert [read_record(plan.run_dir, trial.name).attempts for trial in plan.trials] == [0, 0, 1]
    assert main(["ablate", str(path)]) == 0  # there are as many points as were asked for
    assert load_plan(path).conditions == plan.conditions
    assert main(["ablate", str(path), "search.points=9", "budget.trials=3"]) == 0  # they are spent
    assert load_plan(path).conditions == plan.conditions
    monkeypatch.setattr(subprocess, "Popen", None)  # a point that failed for good is not started again
    failed = {"number": 2, "overrides": {"rewards.trouble.value": 0.1}}
    write_text(tmp_path / "run" / "points" / "77aa.json", json.dumps(failed))
    trial = load_plan(path).trials[-1]
    write_record(plan.run_dir, trial.name, Record("failed", attempts=2))
    assert main(["ablate", str(path), "search.points=3"]) == 1
    assert read_record(plan.run_dir, trial.name).attempts == 2
