"""Fields of a dataclass that say what they may hold: one walk checks them, and a command makes its arguments of them.

Imports nothing heavy, so that `--help` answers at once.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """What a field may hold, or each thing in the list that it holds. A number of which nothing is said is at least 0.

    Attributes:
        above, at_least, at_most, below: bounds of a number, which is finite whatever they are.
        choices: for a text.
        must: what an error says of the bounds, where more is to be said than the figures.
    """

    above: float = -math.inf
    at_least: float = 0
    at_most: float = math.inf
    below: float = math.inf
    choices: Sequence[str] = ()
    must: str = ""

    def holds(self, number: float) -> bool:
        """Whether a number is within the bounds; NaN and the infinities never are."""
        return self.above < number < self.below and self.at_least <= number <= self.at_most

    def words(self) -> str:
        """What a value must."""
        if self.must:
            return self.must
        if min(self.at_most, self.below) < math.inf:
            low = f"({self.above:g}" if self.above >= self.at_least else f"[{self.at_least:g}"
            return f"lie in {low}, " + (f"{self.at_most:g}]" if self.at_most < self.below else f"{self.below:g})")
        if self.above >= self.at_least:
            return f"be above {self.above:g}"
        return f"be at least {self.at_least:g}" if self.at_least else "be a number of at least 0"


_USUAL = Allowed()


def option(default: Any, text: str = "", *, metavar: str | None = None, group: str = "", **allowed: Any) -> Any:
    """A field of a dataclass with what it may hold.

    Args:
        default: its default. (A list takes `field(default_factory=..., metadata={"allowed": Allowed(...)})`.)
        text, metavar: of its argument, where it is a command's.
        group: of a command's arguments, the one that it stands in.
        allowed: see `Allowed`.
    """
    metadata = {"text": text, "metavar": metavar, "group": group, "allowed": Allowed(**allowed)}
    return field(default=default, metadata=metadata)


def check_options(options: Any, spelled: Callable[[str], str] = str, within: str = "") -> None:
    """Hold every field of a dataclass, and of the dataclasses in it, against what it may hold.

    Args:
        options: the dataclass.
        spelled: makes of a key, such as `trainer.updates`, what a person wrote: `flag` for a command's arguments.
        within: what stands before each key.

    Raises:
        InputError: the first value that may not be.
    """
    for item in fields(options):
        key, value = within + item.name, getattr(options, item.name)
        if is_dataclass(value):
            check_options(value, spelled, f"{key}.")
        elif (allowed := item.metadata.get("allowed")) or isinstance(value, int | float):
            check_value(spelled(key), value, allowed or _USUAL)


def check_value(key: str, value: Any, allowed: Allowed = _USUAL) -> None:
    """Hold a value, or each in a list, against what it may be; `key` names it in the error.

    Raises:
        InputError: it may not be.
    """
    from envs.errors import InputError  # `envs` imports torch

    several = isinstance(value, list | tuple)
    for one in value if several else [value]:
        if allowed.choices and one not in allowed.choices:
            *others, last = [choice for choice in allowed.choices if choice]
            name = key.removesuffix("s") if several else key  # a tracker of `trackers`
            raise InputError(f"{name} '{one}' is not known: choose {', '.join(others)} or {last}")
        if isinstance(one, bool) or not isinstance(one, int | float):
            continue
        if not allowed.holds(one):
            finite = " and finite" if one == math.inf else ""
            raise InputError(f"{key} must {allowed.words()}{finite}, found {list(value) if several else value}")
        if isinstance(one, int) and one >= 2**63:
            raise InputError(f"{key} must be below 2^63, found {value}")


def flag(key: str) -> str:
    """The argument that a field is: `--max-pairs` of `max_pairs`, whatever dataclass it stands in."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def add_options(parser: argparse._ActionsContainer, options: type, names: Sequence[str] | None = None) -> None:
    """Arguments of a command, by group, of the fields of a dataclass that have a text; or of some fields, ungrouped."""
    groups = {"": parser}
    for item in fields(options):
        more = item.metadata
        if not more.get("text") or (names is not None and item.name not in names):
            continue
        title = more["group"] if names is None else ""
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if isinstance(item.default, bool):
            groups[title].add_argument(flag(item.name), action="store_true", help=more["text"])
            continue
        kind = str if item.default is None else type(item.default)
        shown = "" if item.default is None else " (default: %(default)s)"
        choices = more["allowed"].choices or None
        metavar = more["metavar"] or (None if choices else {int: "N", float: "X"}.get(kind, "TEXT"))
        given: dict[str, Any] = {"type": kind, "default": item.default, "choices": choices, "metavar": metavar}
        groups[title].add_argument(flag(item.name), help=more["text"] + shown, **given)
