"""Points that Optuna proposes, with paths of every kind, and points that Ray loses."""

import json
import signal
from pathlib import Path

import pandas as pd
import pytest
from stored_trials import write_run
from test_ablate import begin, write_base

from envs.files import write_text
from rlhf_duplex.ablate import ray_tune
from rlhf_duplex.ablate.plan import load_plan
from rlhf_duplex.ablate.search import point_name
from rlhf_duplex.ablate.trial import read_record
from rlhf_duplex.cli import main
from rlhf_duplex.config_files import to_yaml
from rlhf_duplex.evaluation.metrics import read_results

__all__ = ["begin"]
pytestmark = pytest.mark.timeout(1800)  # real trainings, on a machine that may be busy
SEARCH = (
    "search: {space: {rewards.trouble.value: {uniform: [0, 1]}}, points: 2, sampler: optuna, metric: trouble.reward}\n"
)


def finished_base(path: Path, begin: Path) -> None:
    """The base's own trial, as an earlier call leaves it, on the segments of `begin`."""
    (trial,) = load_plan(path).trials
    result = {"trouble": {"reward": dict.fromkeys(read_results(begin)["segments"]["trouble"]["reward"], 0.0)}}
    write_run(Path(trial.config.run_dir), result, result, to_yaml(trial.config), episodes=False)


def test_points_find_what_lies_beside_the_command(tmp_path, one_of_each, begin, monkeypatch):
    pytest.importorskip("optuna", reason="an extra: pip install rlhf-duplex[search]; part of [dev]")
    base = write_base(tmp_path, one_of_each)
    base.write_text(base.read_text().replace(f"{tmp_path}/", ""))  # Tune's trials have folders of their own
    (tmp_path / "before.json").write_text(begin.read_text())
    monkeypatch.chdir(tmp_path)
    path = Path("ablation.yaml")
    path.write_text(
        "base: base.yaml\nrun_dir: run\nseeds: [3]\noverrides: {evaluation.before: before.json}\nworkers: 2\n" + SEARCH
    )
    finished_base(path, begin)
    assert main(["ablate", "ablation.yaml"]) == 0
    states = pd.read_csv("run/trials.csv", keep_default_na=False)
    assert states["status"].tolist() == ["done"] * 3
    assert set(pd.read_csv("run/table.csv")["trial"]) == set(states["trial"])


def test_a_point_that_ray_loses_is_a_failure_with_its_reason(tmp_path, one_of_each, begin, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="an extra: pip install rlhf-duplex[search]; part of [dev]")
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3]\nworkers: 1\n" + SEARCH)
    finished_base(path, begin)
    points = [{"rewards.trouble.value": 0.25}, {"rewards.trouble.value": 0.75}]

    def run_search(search, root, known, make_jobs, workers, config, stopping, ended):
        for point, lost in zip(points, ("InputError: gone.yaml does not exist", ""), strict=True):
            if lost:  # the other's process died before it could keep its point
                kept = json.dumps({"number": 0, "overrides": point})
                write_text(root / "points" / f"{point_name(point)}.json", kept)
            ended(point, lost)

    monkeypatch.setattr(ray_tune, "run_search", run_search)
    assert main(["ablate", str(path)]) == 1
    states = pd.read_csv(tmp_path / "run" / "trials.csv", keep_default_na=False)
    assert states["status"].tolist() == ["done", "failed", "failed"]
    assert states["why"].tolist() == ["", "InputError: gone.yaml does not exist", "Lost: ended without a result"]
    assert "was not run (InputError: gone.yaml does not exist)" in capsys.readouterr().out
    lost = read_record(tmp_path / "run", load_plan(path).trials[1].name)
    assert (lost.status, lost.kind, lost.attempts) == ("failed", "InputError", 1)


def test_a_point_that_a_stop_kept_from_being_run_is_no_failure(tmp_path, one_of_each, begin, monkeypatch):
    pytest.importorskip("optuna", reason="an extra: pip install rlhf-duplex[search]; part of [dev]")
    base = write_base(tmp_path, one_of_each)
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {base}\nrun_dir: {tmp_path}/run\nseeds: [3]\nworkers: 1\n" + SEARCH)
    finished_base(path, begin)
    point = {"rewards.trouble.value": 0.25}

    def run_search(search, root, known, make_jobs, workers, config, stopping, ended):
        kept = json.dumps({"number": 0, "overrides": point})
        write_text(root / "points" / f"{point_name(point)}.json", kept)
        signal.raise_signal(signal.SIGINT)
        ended(point, "")

    monkeypatch.setattr(ray_tune, "run_search", run_search)
    assert main(["ablate", str(path)]) == 0
    states = pd.read_csv(tmp_path / "run" / "trials.csv", keep_default_na=False)
    assert states["status"].tolist() == ["done", "not run"]
