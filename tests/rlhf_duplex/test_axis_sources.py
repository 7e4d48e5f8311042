"""The code of reward axes of one's own: noted, and held against what a run or an ablation goes on with."""

import json

import pytest

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex import run_folder
from rlhf_duplex.ablate.plan import load_plan
from rlhf_duplex.ablate.run import before_key, show_plan
from rlhf_duplex.ablate.trial import check_same
from rlhf_duplex.axis_sources import axis_sources, check_axes
from rlhf_duplex.config import Config
from rlhf_duplex.run_folder import make_console, prepare_run_dir

CODE = """
from rewards import RewardAxis, Score

class Length(RewardAxis):
    name = "length"

    def score_episode(self, episode):
        return Score(1.0)
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "length.py"
    path.write_text(CODE)
    return path


def config_of(folder, mine, **options):
    rewards = {"turn_taking": {"weight": 1.0}, "length": {"weight": 1.0, "target": str(mine)}}
    return Config(checkpoint="nano", segments="nano", run_dir=str(folder / "run"), rewards=rewards, **options)


def test_axes_of_this_package_are_left_out(mine, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    rewards = {
        "turn_taking": None,
        "overlap": {"target": "rewards.overlap:Overlap"},
        "file": {"target": str(mine)},
        "module": {"target": "length:Length"},
    }
    found = axis_sources(rewards)
    assert found.keys() == {"file", "module"}
    assert found["file"] == found["module"]
    mine.unlink()
    with pytest.raises(InputError, match=r"reward axis 'file': .*length.py cannot be read"):
        axis_sources({"file": rewards["file"]})


def test_a_run_goes_on_with_the_code_that_it_began_with(tmp_path, mine):
    note = tmp_path / "run" / "provenance.json"
    prepare_run_dir(config_of(tmp_path, mine), files={})
    kept = json.loads(note.read_text())
    assert kept["axes"].keys() == {"length"}
    resumed = config_of(tmp_path, mine, resume=True)
    prepare_run_dir(resumed, files={})
    mine.write_text(CODE.replace("1.0", "2.0"))
    refused = (
        r"the code of the reward axis 'length' \(.*length.py\) is not what it was.*take its entry out of `axes` in"
    )
    with pytest.raises(InputError, match=refused):
        prepare_run_dir(resumed, files={})
    assert json.loads(note.read_text()) == kept
    note.write_text(json.dumps(kept | {"axes": {}}))  # as the message says
    prepare_run_dir(resumed, files={})
    assert json.loads(note.read_text())["axes"] != kept["axes"]
    note.write_text(json.dumps({key: kept[key] for key in ("sha256", "versions")}))  # as older versions left it
    prepare_run_dir(resumed, files={})
    assert json.loads(note.read_text())["axes"] != kept["axes"]
    for damaged in ("[", "[]", '{"axes": 3}'):
        note.write_text(damaged)
        with pytest.raises(InputError, match=r"provenance.json is damaged"):
            check_axes(tmp_path / "run", True, resumed.rewards)


def test_a_run_that_is_killed_at_its_beginning_keeps_the_note_of_its_axes(tmp_path, mine, monkeypatch):
    note = tmp_path / "run" / "provenance.json"
    prepare_run_dir(config_of(tmp_path, mine), files={})
    written = []

    def noted(path, text):
        if path == note:
            written.append(json.loads(text))
        write_text(path, text)

    monkeypatch.setattr(run_folder, "write_text", noted)
    prepare_run_dir(config_of(tmp_path, mine, resume=True), files={})
    assert [found["axes"].keys() for found in written] == [{"length"}]  # wherever it ends, they are there


def test_trials_of_other_code_are_not_mixed(tmp_path, mine):
    (tmp_path / "base.yaml").write_text(
        f"checkpoint: nano\nsegments: nano\nrewards: {{turn_taking: {{}}, length: {{weight: 0, target: {mine}}}}}\n"
    )
    path = tmp_path / "ablation.yaml"
    path.write_text(f"base: {tmp_path}/base.yaml\nrun_dir: {tmp_path}/run\ngrid: {{rewards.length.weight: [0, 1]}}\n")
    trial, other = (trial.config for trial in load_plan(path).trials)
    prepare_run_dir(trial, files={})
    key = before_key(trial)
    assert before_key(other) == key
    show_plan(load_plan(path), make_console())
    mine.write_text(CODE.replace("1.0", "2.0"))
    assert before_key(trial) != key
    check_same("other", other)  # was not begun
    with pytest.raises(InputError, match="was run with other code of the reward axis 'length': put the old one back"):
        show_plan(load_plan(path), make_console())
    mine.write_text(CODE)
    show_plan(load_plan(path), make_console())
