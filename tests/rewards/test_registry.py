import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import rewards.axis
from envs import InputError
from rewards import RewardAxis, Score, checked_scores, find_axis, make_axis, register_axis, registered_axes
from rewards.aggregate import RewardFunction, RewardSpec
from rewards.axis import axes_in_file, broken_axes
from rewards.details import finite, not_finite
from rlhf_duplex.cli import main

BUILT_IN = {"pause_handling", "turn_taking", "backchannel", "user_interruption"}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    registered_axes()
    monkeypatch.setattr(rewards.axis, "_REGISTRY", dict(rewards.axis._REGISTRY))


def axis_giving(scores):
    class Given(RewardAxis):
        name = "given"

        def score(self, episodes):
            return scores

    return Given()


def test_the_built_in_axes_are_known():
    assert set(registered_axes()) >= BUILT_IN
    assert make_axis("backchannel", tolerance=0.5).tolerance == 0.5


def test_a_name_belongs_to_one_class():
    with pytest.raises(InputError, match=r"reward axis 'backchannel' is defined twice, by rewards\.backchannel"):

        @register_axis
        class Another(RewardAxis):
            name = "backchannel"

    with pytest.raises(InputError, match="has no `name`"):

        @register_axis
        class Nameless(RewardAxis):
            pass


def test_unknown_names_options_and_targets():
    with pytest.raises(InputError, match=r"unknown reward axis 'humour': the known ones are backchannel, "):
        find_axis("humour")
    with pytest.raises(InputError, match=r"'backchannel': unknown option `tolerence`: the options are .*tolerance"):
        make_axis("backchannel", tolerence=0.5)
    for target, message in [
        ("no_such_module:Axis", "target 'no_such_module:Axis' cannot be imported"),
        ("rewards.backchannel:Nothing", "cannot be imported"),
        (":Axis", "cannot be imported"),
        (".axis:Axis", "cannot be imported"),
        ("rewards.backchannel", "neither module:Class nor a .py file"),
        ("rewards.axis:Score", "is not a subclass of rewards.RewardAxis"),
        ("nowhere/axes.py", "file nowhere/axes.py does not exist"),
    ]:
        with pytest.raises(InputError, match=f"reward axis 'mine': .*{message}"):
            find_axis("mine", target)


def test_what_an_axis_of_ones_own_gets_wrong_names_it():
    @register_axis
    class Charm(RewardAxis):
        name = "charm"

        def __init__(self, least=0, most=1, to=("turn_taking",)):
            if least > most:
                raise ValueError(f"least {least} is above most {most}")
            self.applies_to = to

        def prepare(self, segments):
            raise KeyError("voice")

    with pytest.raises(InputError, match="reward axis 'charm': least 2 is above most 1"):
        make_axis("charm", least=2)
    for to in (("turn_takin",), ["turn_taking"], "turn_taking"):
        with pytest.raises(InputError, match="reward axis 'charm': `applies_to` must be a tuple of pause_handling, "):
            make_axis("charm", to=to)
    with pytest.raises(KeyError) as raised:
        RewardFunction({"charm": RewardSpec()}).prepare([])
    assert raised.value.__notes__ == ["in `prepare` of reward axis 'charm'"]


@pytest.mark.parametrize("text", ["def broken(:", "import no_such_module_at_all", "nothing_of_that_name"])
def test_a_file_that_cannot_be_run_is_one_line(tmp_path, text):
    (tmp_path / "mine.py").write_text(text + "\n")
    with pytest.raises(InputError, match=r"mine\.py cannot be run \(\w+Error: "):
        axes_in_file(tmp_path / "mine.py")


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from rewards import RewardAxis, Score, register_axis

@register_axis
@dataclass
class Mine(RewardAxis):
    factor: float = 1.0
    name = "mine"

    def score_episode(self, episode):
        return Score(self.factor * episode.duration)
"""


def test_an_axis_from_a_file_can_be_read_again(tmp_path, episode):
    (tmp_path / "my_axes.py").write_text(FILE)
    for _ in range(2):
        axis = make_axis("mine", str(tmp_path / "my_axes.py"), factor=0.5)
        assert checked_scores(axis, [episode("turn_taking")]) == [Score(10.0)]
    with pytest.raises(InputError, match="defines no RewardAxis of that name"):
        find_axis("yours", str(tmp_path / "my_axes.py"))


def test_a_file_imports_its_neighbours_under_the_console_script(tmp_path):
    (tmp_path / "axes").mkdir()
    (tmp_path / "axes" / "neighbour_of_mine.py").write_text("FACTOR = 0.5\n")
    (tmp_path / "axes" / "mine.py").write_text(
        FILE.replace("from rewards", "from neighbour_of_mine import FACTOR\nfrom rewards")
    )
    script = Path(sys.executable).with_name("rlhf-duplex")
    if not script.exists():  # the package is not installed
        pytest.skip("no console script beside the interpreter")
    done = subprocess.run(
        [str(script), "rewards", "check", "axes/mine.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mine: keeps the contract" in done.stdout


def test_an_axis_from_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "axes_beside_the_config.py").write_text(FILE)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    monkeypatch.chdir(tmp_path)
    assert find_axis("mine", "axes_beside_the_config:Mine").name == "mine"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "reward axis 'given' gave 0 scores for 1 episodes"),
        (None, "reward axis 'given': score must return a list, found NoneType"),
        ([Score(math.nan)], "reward axis 'given', episode of segment 's7': the value nan is not finite"),
        ([Score(math.inf)], "the value inf is not finite"),
        ([Score(10**400)], "the value inf is not finite"),
        ([Score("high")], "the value must be a number, found str"),
        ([Score(np.bool_(True))], "the value must be a number, found bool"),
        ([Score(1.0, None)], "'s7': details cannot be saved as JSON .they must be a dictionary, found NoneType"),
        ([Score(1.0, {"db": np.zeros(2)})], "'s7': details cannot be saved as JSON .Object of type ndarray"),
        ([0.5], "'s7': expected a Score or None, found float"),
    ],
)
def test_a_broken_contract_names_axis_and_episode(scores, message, episode):
    with pytest.raises(ValueError, match=message):
        checked_scores(axis_giving(scores), [episode("turn_taking")])


def test_numbers_of_every_kind_are_plain_ones(episode):
    details = {"n": np.int64(3), "spans": [(np.float32(0.5), 1.0)], np.int64(2): np.array(1.5), "none": math.nan}
    for value in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        (score,) = checked_scores(axis_giving([Score(value, details)]), [episode("turn_taking")])
        assert type(score.value) is float
        saved = json.dumps(finite(score.details), allow_nan=False)
        assert json.loads(saved) == {"n": 3, "spans": [[0.5, 1.0]], "2": 1.5, "none": None}
    assert not_finite({"a": [1, {"b": [0.0, -math.inf]}]}) == "a[1].b[1]"
    assert not_finite({"a": {math.nan: 1}}) == "the key nan of a"
    assert finite({"a": {math.nan: 1, 2.5: 2}}) == {"a": {"nan": 1, "2.5": 2}}
    assert not_finite({"a": [1, None, "nan", True]}) == ""
    loop: dict = {}
    loop["loop"] = loop
    with pytest.raises(ValueError, match="they hold themselves"):
        checked_scores(axis_giving([Score(1.0, loop)]), [episode("turn_taking")])


def test_an_axis_that_defines_no_score(episode):
    class Empty(RewardAxis):
        name = "empty"

    with pytest.raises(TypeError, match="'empty' defines neither score nor score_episode"):
        Empty().score([episode("turn_taking")])


def install(folder, entry_points, monkeypatch):
    """A package with axes, as an installer leaves it."""
    (folder / "package_with_axes.py").write_text(FILE)
    (folder / "broken_package.py").write_text("import no_such_module_at_all\n")
    about = folder / "package_with_axes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: package-with-axes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[rlhf_duplex.rewards]", *entry_points]) + "\n")
    monkeypatch.syspath_prepend(folder)


def test_an_axis_of_an_installed_package_is_known_by_its_name(tmp_path, monkeypatch, episode):
    install(tmp_path, ["mine = package_with_axes:Mine"], monkeypatch)
    assert "mine" in registered_axes()
    assert make_axis("mine", factor=2.0).score_episode(episode("turn_taking")) == Score(40.0)


def test_a_broken_package_is_in_nobodys_way(tmp_path, monkeypatch, capsys):
    promises = ["pk = broken_package:Pk", "yours = package_with_axes:Mine", "path = pathlib:Path"]
    install(tmp_path, promises, monkeypatch)
    assert make_axis("turn_taking").name == "turn_taking"
    assert "broken_package" not in sys.modules
    for name, message in {
        "pk": r"'pk = broken_package:Pk' cannot be imported \(ModuleNotFoundError: No module named 'no_such",
        "yours": r"'yours = package_with_axes:Mine' is a class whose name is 'mine': give both the same name",
        "path": "'path = pathlib:Path' is not a subclass",
        "humour": "unknown reward axis 'humour': the known ones are .*, pk, .*turn_taking",
    }.items():
        with pytest.raises(InputError, match=message):
            find_axis(name)
    assert {"pk", "yours", "path"}.isdisjoint(registered_axes())
    assert broken_axes().keys() == {"pk", "yours", "path"}
    assert main(["rewards"]) == 0
    listed = capsys.readouterr().out
    assert "turn_taking" in listed
    assert "pk: entry point 'pk = broken_package:Pk' cannot be imported (ModuleNotFoundError: " in listed
