"""What an ablation's file makes: conditions, trials, presets, and what is wrong with it in one line."""

from pathlib import Path

import pytest

from envs.errors import InputError
from envs.segments import write_manifest
from rlhf_duplex.ablate.plan import describe, flatten, load_plan, slug
from rlhf_duplex.ablate.presets import preset_conditions
from rlhf_duplex.ablate.run import before_key
from rlhf_duplex.ablate.search import SearchConfig, random_points
from rlhf_duplex.cli import main
from rlhf_duplex.config import Config, TrainerConfig, load_config
from rlhf_duplex.config_files import check_resumed

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "debug.yaml"


def plan_of(folder, text, *arguments):
    path = folder / "ablation.yaml"
    path.write_text(f"base: {BASE}\nrun_dir: {folder}/run\n{text}")
    return load_plan(path, arguments)


def test_an_axis_with_nothing_after_its_name_has_its_defaults(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("rewards:\n  pause_handling:\n  turn_taking: {weight: 2.0}\n")
    assert load_config(base).rewards == {"pause_handling": {}, "turn_taking": {"weight": 2.0}}
    names = [condition.name for condition in preset_conditions("leave_one_axis_out", load_config(base))[0]]
    assert names[:3] == ["full", "without pause", "without turn"]


def test_a_grid_is_crossed_and_seeds_come_one_after_another(tmp_path):
    plan = plan_of(
        tmp_path,
        "seeds: [4, 5]\ngrid: {rewards.backchannel.weight: [1.0, 2], trainer.kl_beta: [0.1, 0.01]}\n"
        "overrides: {trainer: {updates: 7}}\nconditions:\n"
        "- {name: slow, overrides: {optimiser: {learning_rate: 1e-5}}}\n",
        "trainer.clip=0.3",
    )
    assert [condition.name for condition in plan.conditions] == [
        "slow",
        "backchannel.weight 1, kl_beta 0.1",
        "backchannel.weight 1, kl_beta 0.01",
        "backchannel.weight 2, kl_beta 0.1",
        "backchannel.weight 2, kl_beta 0.01",
    ]
    assert [trial.seed for trial in plan.trials] == [4] * 5 + [5] * 5
    last = plan.trials[-1]
    assert last.name == "backchannel.weight_2_kl_beta_0.01_seed5"
    assert last.config.rewards["backchannel"]["weight"] == 2
    assert (last.config.trainer.kl_beta, last.config.trainer.updates, last.config.trainer.clip) == (0.01, 7, 0.3)
    assert last.config.seed == 5
    assert last.config.run_dir == f"{tmp_path}/run/trials/{last.name}"
    assert plan.trials[0].config.optimiser.learning_rate == 1e-5
    assert plan.baseline.name == "backchannel.weight 1, kl_beta 0.01"  # whatever its place: it is the base


def test_keys_are_the_ablations_or_the_configurations(tmp_path):
    plan = plan_of(
        tmp_path, "grid: {trainer.clip: [0.1, 0.2]}\n", "seeds=3", f"run_dir={tmp_path}/other", "budget.trials=2"
    )
    assert [trial.seed for trial in plan.trials] == [0, 0, 1, 1, 2, 2]
    assert plan.run_dir == tmp_path / "other"
    assert plan.config.budget.trials == 2


def test_leave_one_out_leaves_out_what_the_base_does_not_have():
    quickstart = load_config(ROOT / "configs" / "quickstart.yaml")
    rows, skipped = preset_conditions("leave_one_axis_out", quickstart)
    assert [row.name for row in rows] == [
        "full",
        "without pause",
        "without turn",
        "without backchannel",
        "without interruption",
    ]
    assert rows[1].overrides == {
        "train_axes": [axis for axis in quickstart.train_axes if axis != "pause_handling"],
        "rewards.pause_handling.weight": 0.0,
    }
    assert [row.name for row in skipped] == ["without judge", "without schedule", "without context"]
    assert "no judged axis" in skipped[0].why
    assert "context.probability" in skipped[1].why


def test_the_groups_of_an_axis_that_is_left_out_can_be_dropped():
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    dropped = {"name": "leave_one_axis_out", "groups": "dropped"}
    rows, _ = preset_conditions(dropped, base)
    assert rows[0].overrides == {}
    assert rows[2].name == "without turn"
    assert rows[2].overrides["trainer.groups"] == 5  # of 8, three of which were turns
    assert rows[2].overrides["trainer.minibatch"] == 15  # of 24: as many optimiser steps
    base.trainer.minibatch = 20
    with pytest.raises(InputError, match="multiples, found 8 axes, 8 and 20"):
        preset_conditions(dropped, base)
    with pytest.raises(InputError, match="given or dropped, found 'kept'"):
        preset_conditions(dropped | {"groups": "kept"}, base)


def test_leave_one_out_with_a_judge_and_context(tmp_path, nano_segments):
    base = load_config(ROOT / "experiments" / "judge" / "nano_content.yaml", ["context.probability=0.5"])
    rows, skipped = preset_conditions("leave_one_axis_out", base)
    assert rows[-1].name == "without judge"
    assert rows[-1].overrides == {"rewards.content.weight": 0.0}
    # nano's recordings have half a second before their segments, which is no context.
    assert [row.why for row in skipped] == ["nothing precedes the base's segments (at most 0.5 s of recording)"] * 2
    late = [s for s in nano_segments if s.duration > 4][:1]
    write_manifest(tmp_path / "late.jsonl", [type(s)(**{**vars(s), "start": s.start + 2, "events": {}}) for s in late])
    base.segments = str(tmp_path / "late.jsonl")
    rows, skipped = preset_conditions("leave_one_axis_out", base)
    assert [(row.name, row.overrides) for row in rows[-2:]] == [
        ("without schedule", {"context.schedule": "constant"}),
        ("without context", {"context.probability": 0.0}),
    ]
    assert skipped == []
    base.context.schedule = "constant"
    assert preset_conditions("leave_one_axis_out", base)[1][0].name == "without schedule"


def test_leave_one_out_of_fewer_axes():
    base = load_config(BASE, ["train_axes=[turn_taking, backchannel]"])
    rows, skipped = preset_conditions("leave_one_axis_out", base)
    assert [row.name for row in rows] == ["full", "without turn", "without backchannel"]
    assert rows[1].overrides["train_axes"] == ["backchannel"]
    assert skipped[0].why == "the base does not train on pause_handling"
    twice = load_config(BASE, ["train_axes=[turn_taking, turn_taking, backchannel]"])
    rows, _ = preset_conditions("leave_one_axis_out", twice)
    assert [row.overrides.get("train_axes") for row in rows] == [None, ["backchannel"], ["turn_taking", "turn_taking"]]
    alone = load_config(BASE, ["train_axes=[turn_taking]"])
    assert "nothing but turn_taking" in preset_conditions("leave_one_axis_out", alone)[1][1].why


def test_the_simplex_of_weights():
    base = load_config(BASE)
    rows, _ = preset_conditions({"name": "reward_weights", "resolution": 2}, base)
    assert len(rows) == 1 + 10
    assert rows[1].name == "pause=4"
    weights = [tuple(row.overrides.values()) for row in rows[1:]]
    assert len(set(weights)) == 10
    assert all(sum(row) == 4 for row in weights)
    # 4 parts of 2 axes whose weights sum to 2: (2, 0), (1.5, 0.5), [1, 1 is the base], (0.5, 1.5), (0, 2).
    rows, _ = preset_conditions(
        {"name": "reward_weights", "resolution": 4, "axes": ["turn_taking", "backchannel"]}, base
    )
    assert [tuple(row.overrides.values()) for row in rows[1:]] == [(2, 0), (1.5, 0.5), (0.5, 1.5), (0, 2)]


def test_the_result_before_training_is_shared_where_it_is_the_same():
    keys = [
        before_key(load_config(BASE, arguments))
        for arguments in (
            [],
            ["seed=3", "rewards.turn_taking.weight=2", "trainer.updates=1", "train_axes=[turn_taking]"],
            ["rewards.turn_taking.barge_in_seconds=2"],
            ["context.lead_in=2"],
            ["sampling.text_temperature=0.5"],
            ["evaluation.seed=2"],
            ["prompt.text=hello"],
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 6


def test_random_points_are_the_same_again_and_more_points_begin_with_fewer():
    space = {"a": {"uniform": [0.0, 2.0]}, "b": {"log_uniform": [1e-4, 1e-2]}, "c": {"choice": ["x", "y"]}}
    few, many = (random_points(SearchConfig(space, points=n, seed=3)) for n in (4, 40))
    assert many[:4] == few
    assert all(0 <= p["a"] <= 2 and 1e-4 <= p["b"] <= 1e-2 for p in many)
    assert {p["c"] for p in many} == {"x", "y"}
    assert sum(p["b"] < 1e-3 for p in many) == pytest.approx(20, abs=8)  # half of the decades
    assert len({p["a"] for p in many}) == 40


def test_a_search_is_held_against_the_base(tmp_path):
    plan = plan_of(tmp_path, "search: {space: {rewards.backchannel.weight: {uniform: [0, 2]}}, points: 3}\n")
    assert len(plan.trials) == 4
    assert plan.baseline.name == "base"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_loads_and_opens_with_its_command(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "warm").mkdir(parents=True)
    assert f"rlhf-duplex ablate configs/ablations/{path.name}" in path.read_text().splitlines()[0]
    plan = load_plan(path)
    assert len(plan.trials) >= 2
    assert all(trial.config.run_dir.startswith(f"runs/ablations/{path.stem}/") for trial in plan.trials)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing varies"),
        ("seeds: []\ngrid: {trainer.clip: [1]}\n", "`seeds` must be"),
        ("seeds: [1, 1]\ngrid: {trainer.clip: [1]}\n", "seed 1 is given twice"),
        ("grid: {trainer.clip: 0.1}\n", "trainer.clip needs a list of values"),
        ("grid: {trainer.clap: [0.1]}\n", "condition 'clap 0.1': the command line: unknown configuration key"),
        ("grid: {trainer.algorithm: [grpo, sarsa]}\n", "condition 'algorithm sarsa'"),
        ("grid: {rewards.charm.weight: [1]}\n", "unknown reward axis 'charm'"),
        ("grid: {checkpoint: [nano, no-such-model]}\n", "checkpoint 'no-such-model' is no folder"),
        ("grid: {seed: [1, 2]}\n", "`seed` cannot vary"),
        ("conditions: [{overrides: {}}]\n", "condition 1 must be"),
        ("conditions: [{name: a}, {name: a}]\n", "two conditions are called 'a'"),
        ("conditions: [{name: a b}, {name: a/b}]\n", "two trials would be called 'a_b_seed0'"),
        ("preset: everything\n", "preset 'everything' is not known"),
        ("preset: {name: reward_weights, parts: 3}\n", "unexpected keyword argument 'parts'"),
        ("preset: {name: reward_weights, resolution: 0}\n", "`resolution` must be"),
        ("preset: {name: reward_weights, axes: [charm, turn_taking]}\n", "'charm' is no reward of the base"),
        ("preset: leave_one_axis_out\nbaseline: none\n", "baseline 'none' is none of full"),
        ("retries: -1\ngrid: {trainer.clip: [1]}\n", "`retries` must be at least 0"),
        ("metrics: [latency]\ngrid: {trainer.clip: [1]}\n", "a metric is written axis.metric"),
        ("metrics: [words.latency]\ngrid: {trainer.clip: [1]}\n", "no metric words.latency: there are known,"),
        ("luck: 7\n", "unknown configuration key 'luck'"),
        ("asha: {metric: reward/total}\ngrid: {trainer.clip: [1]}\n", "asha needs workers"),
        ("search: {space: {trainer.clip: {normal: [0, 1]}}}\n", "needs {uniform or log_uniform: [low, high]}"),
        ("search: {space: {trainer.clip: {log_uniform: [0, 1]}}}\n", "values above 0"),
        ("search: {space: {trainer.clip: {choice: []}}}\n", "choice needs a list"),
        ("search: {space: {trainer.clip: {uniform: [0, 1]}}, points: 0}\n", "points of at least 1"),
        ("search: {space: {trainer.clip: {uniform: [0, 1]}}, sampler: optuna, metric: a.b}\n", "runs on Ray"),
        ("search: {space: {trainer.clip: {uniform: [0, 1]}}, sampler: optuna}\nworkers: 1\n", "search.metric must be"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {BASE}\nrun_dir: {tmp_path}/run\n{text}")
    assert main(["ablate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_optuna_that_is_not_installed(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else find(name, *rest)
    )
    search = (
        "search: {space: {trainer.clip: {uniform: [0, 1]}}, sampler: optuna, metric: turn_taking.latency}\nworkers: 1\n"
    )
    with pytest.raises(InputError, match="optuna is not installed: pip install optuna"):
        plan_of(tmp_path, search)


def test_a_plan_is_shown_without_running(tmp_path, capsys):
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {BASE}\nrun_dir: {tmp_path}/run\npreset: leave_one_axis_out\n")
    assert main(["ablate", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "without_turn_seed0: open" in shown
    assert "left out: without judge" in shown
    assert not (tmp_path / "run").exists()


def test_an_axis_is_made_once_with_the_same_options(tmp_path):
    (tmp_path / "heavy.py").write_text(
        "from pathlib import Path\nfrom rewards import RewardAxis\n"
        "class Heavy(RewardAxis):\n    name = 'heavy'\n"
        "    def __init__(self, size=1):\n"
        "        if size > 2: raise ValueError('too large')\n"
        "        Path(__file__).with_suffix('.log').open('a').write(f'{size}\\n')\n"
    )
    text = f"overrides: {{rewards.heavy.target: {tmp_path}/heavy.py}}\nseeds: [0, 1, 2]\n"
    plan = plan_of(tmp_path, text + "grid: {rewards.heavy.weight: [0, 1, 2], rewards.heavy.size: [1, 2]}\n")
    assert len(plan.trials) == 18
    assert (tmp_path / "heavy.log").read_text().split() == ["1", "2"]
    with pytest.raises(InputError, match=r"condition 'heavy.size 3': reward axis 'heavy': too large"):
        plan_of(tmp_path, text + "grid: {rewards.heavy.size: [1, 3]}\n")
    with pytest.raises(InputError, match="reward axis 'heavy': `weight` must be a finite number"):
        plan_of(tmp_path, text + "grid: {rewards.heavy.weight: [1, .nan]}\n")


def test_names():
    assert flatten({"trainer": {"clip": 1}, "a.b": {"c": [1]}}) == {"trainer.clip": 1, "a.b.c": [1]}
    assert describe({"rewards.x.weight": 0.50, "trainer.whiten": True}) == "x.weight 0.5, whiten true"
    assert slug("a/b: c=1.5, -2") == "a_b_c_1.5_2"
    assert slug("//") == "condition"
    long = "rewards.pause_handling.weight=0.5 rewards.turn_taking.weight=0.5 rewards.backchannel.weight=0.5 kl="
    assert slug(f"{long}0.1") != slug(f"{long}0.2")
    assert len(slug(f"{long}0.1")) <= 100


def test_what_was_begun_must_be_what_is_asked_for(tmp_path):
    saved = tmp_path / "config.yaml"
    # As an older version wrote it: without keys that did not exist, which then have their defaults.
    saved.write_text("seed: 0\ntrainer: {kl_beta: 0.01}\nrewards: {turn_taking: {weight: 1.0}, charm: {weight: 1}}\n")
    rewards = {"turn_taking": {"weight": 1.0}, "charm": {"weight": 1}}
    check_resumed(Config(rewards=rewards), saved)
    with pytest.raises(InputError, match=r"trainer\.clip was 0\.2 and is 0\.3"):
        check_resumed(Config(rewards=rewards, trainer=TrainerConfig(clip=0.3)), saved)
    with pytest.raises(InputError, match=r"rewards\.charm was \{'weight': 1\} and is None"):
        check_resumed(Config(rewards={"turn_taking": {"weight": 1.0}}), saved)
    with pytest.raises(InputError, match=r"rewards\.safety was None"):
        check_resumed(Config(rewards=rewards | {"safety": {}}), saved)
