"""Fields that say what they may hold: every key of the configurations is checked, and errors name it."""

import argparse
import math
from dataclasses import dataclass, field, fields, is_dataclass

import pytest

from envs.errors import InputError
from rlhf_duplex.cli import build_parser
from rlhf_duplex.config import Config
from rlhf_duplex.config_checks import check_config
from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.options import Allowed, add_options, check_options, flag, option
from rlhf_duplex.warmstart.config import WarmstartConfig, check_warmstart


def plain_fields(options, within=""):
    """Every key, with the dataclass and the field that it is."""
    for item in fields(options):
        value, key = getattr(options, item.name), within + item.name
        if is_dataclass(value):
            yield from plain_fields(value, f"{key}.")
        else:
            yield key, options, item


@pytest.mark.parametrize(("config", "check"), [(Config(), check_config), (WarmstartConfig(), check_warmstart)])
def test_no_key_takes_a_number_that_cannot_be_or_an_unknown_choice(config, check):
    tried = []
    for key, part, item in plain_fields(config):
        usual = getattr(part, item.name)
        wrong = {int: (-1, 2**63), float: (-1.0, math.nan, math.inf)}.get(type(usual), ())
        if "allowed" in item.metadata and isinstance(usual, str):
            wrong = ("none of them",)
        for value in wrong:
            setattr(part, item.name, value)
            with pytest.raises(InputError, match=rf"^{key} (must |'none of them' is not known: choose \w+)"):
                check(config)
            tried.append(key)
        setattr(part, item.name, usual)
    check(config)
    assert len(tried) > 60
    assert {"seed", "dtype", "sampling.text_temperature", "evaluation.samples", "lora.scaling"} <= set(tried)


@dataclass
class Part:
    share: float = option(0.5, at_most=1)
    open_share: float = option(0.5, above=0, below=1)
    count: int = option(1, "how many", at_least=1, group="a group")
    rate: float = option(1.0, "how fast", above=0)
    mark: int = option(3, at_least=1, at_most=5, must="be a mark from 1 to 5")
    free: float = option(0.0, at_least=-math.inf)
    usual: float = 0.0
    yes: bool = True
    limit: float | None = option(None, above=0)
    way: str = option("", "which way", choices=("", "up", "down"))


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    shares: list[float] = field(default_factory=list, metadata={"allowed": Allowed(below=1)})
    colours: list[str] = field(default_factory=list, metadata={"allowed": Allowed(choices=("red", "blue", "green"))})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("share", 1.5, "part.share must lie in [0, 1], found 1.5"),
        ("open_share", 0.0, "part.open_share must lie in (0, 1), found 0.0"),
        ("count", 0, "part.count must be at least 1, found 0"),
        ("rate", 0.0, "part.rate must be above 0, found 0.0"),
        ("mark", 6, "part.mark must be a mark from 1 to 5, found 6"),
        ("free", math.inf, "part.free must "),
        ("usual", -0.5, "part.usual must be a number of at least 0, found -0.5"),
        ("limit", -1.0, "part.limit must be above 0, found -1.0"),
        ("way", "left", "part.way 'left' is not known: choose up or down"),
    ],
)
def test_what_a_number_or_a_choice_must(name, value, message):
    with pytest.raises(InputError) as error:
        check_options(Whole(Part(**{name: value})))
    assert str(error.value).startswith(message)


def test_each_in_a_list_is_held_against_what_is_allowed():
    check_options(Whole(Part(free=-3.0), [0, 0.5], ["red", "green"]))
    with pytest.raises(InputError, match=r"^shares must lie in \[0, 1\), found \[0.5, 1\]$"):
        check_options(Whole(shares=[0.5, 1]))
    with pytest.raises(InputError, match=r"^colour 'pink' is not known: choose red, blue or green$"):
        check_options(Whole(colours=["red", "pink"]))


def test_arguments_of_a_command():
    parser = argparse.ArgumentParser(prog="command")
    add_options(parser, Part)
    shown = parser.format_help()
    assert "a group:\n  --count N" in shown
    assert "--way {,up,down}" in shown
    assert "--share" not in shown  # has no text
    assert vars(parser.parse_args(["--count", "0"])) == {"count": 0, "rate": 1.0, "way": ""}
    with pytest.raises(InputError, match=r"^--count must be at least 1, found 0$"):
        check_options(Part(count=0), flag)


def test_pairs_says_which_source_reads_an_option_and_converse_has_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def shown(command):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        return capsys.readouterr().out

    assert all(f"  {flag(item.name)}" in shown("pairs") for item in fields(PairOptions))
    conversations, rollouts = shown("pairs").split("\nconversations:\n")[1].split("\nrollouts:\n")
    assert "--accept" in conversations
    assert "--lead-in X" in rollouts.split("\n\n")[0]
    assert "--lead-in X           seconds of silence before a segment (default: 1.0)" in shown("converse")
