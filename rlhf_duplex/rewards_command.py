"""`rlhf-duplex rewards`: which axes there are, and whether one keeps the contract."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from envs.episode import Episode, recorded_episode
from envs.errors import InputError
from envs.events import complete_events
from envs.segments import SEGMENT_AXES, read_manifest
from envs.speech import make_detector
from rewards.axis import RewardAxis, axes_in_file, broken_axes, construct, find_axis, registered_axes
from rewards.contract import ContractReport, check_contract


def list_axes(name: str | None, console: Console) -> None:
    """Print all axes, or everything about one.

    Raises:
        InputError: no axis of that name.
    """
    if name is not None:
        cls = find_axis(name)
        console.print(Text.assemble((name, "bold"), f" ({cls.__module__}:{cls.__qualname__})"))
        console.print(f"scores segments of {', '.join(cls.applies_to)}\n", highlight=False)
        console.print(inspect.cleandoc(cls.__doc__ or "no docstring"), highlight=False)
        console.print(f"\noptions: {', '.join(_options(cls)) or 'none'}", highlight=False)
        return
    table = Table(title="reward axes", title_justify="left")
    for column in ("name", "scores segments of", "options", "what it says"):
        table.add_column(column)
    for known, cls in sorted(registered_axes().items()):
        applies = "all axes" if set(cls.applies_to) == set(SEGMENT_AXES) else ", ".join(cls.applies_to)
        first = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(known, applies, ", ".join(_options(cls)), first)
    console.print(table)
    for known, why in sorted(broken_axes().items()):
        console.print(f"{known}: {why}", soft_wrap=True, highlight=False)
    console.print("rlhf-duplex rewards NAME says more; a config has `rewards: {NAME: {weight: 1.0, OPTION: ...}}`")


def _options(cls: type[RewardAxis]) -> list[str]:
    """The options of the constructor, `name=default` where there is a default."""
    if is_dataclass(cls):
        shown = []
        for option in fields(cls):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            shown.append(option.name if default is MISSING else f"{option.name}={default!r}")
        return shown
    if cls.__init__ is object.__init__:
        return []
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]


def check_axes(target: str, options: Sequence[str], episodes_folder: Path | None, console: Console) -> None:
    """Run the contract test and print what it found.

    Args:
        target: a registered name, `module:Class`, or a file, of which every axis is tested.
        options: `key=value` for the constructor.
        episodes_folder: episodes that a run saved; the recordings of nano's held-out segments where there is none.

    Raises:
        InputError: an axis breaks the contract, or cannot be made at all.
    """
    keywords = _parse_options(options)
    classes = _find(target)
    with console.status("reading episodes"):
        episodes = _saved_episodes(episodes_folder) if episodes_folder else _recorded_episodes()
    broken, unknown = [], []
    for name, cls in classes.items():
        axis = construct(cls, name, keywords)
        if not any(episode.segment.axis in axis.applies_to for episode in episodes):
            raise InputError(f"reward axis '{name}' applies to {axis.applies_to}, of which there is no episode")
        axis.prepare([episode.segment for episode in episodes])
        report = check_contract(lambda cls=cls, name=name: construct(cls, name, keywords), episodes)  # type: ignore[misc]
        _print(name, report, console)
        if report.wrong:
            broken.append(name)
        elif not report.values:
            unknown.append(name)
    if broken:
        raise InputError(f"{', '.join(broken)}: does not keep the contract of a reward axis, see above")
    if unknown:
        console.print(f"{', '.join(unknown)}: no score was seen, see above", soft_wrap=True)
    kept = [name for name in classes if name not in unknown]
    if not kept:
        return
    name = kept[0]
    where = f" rewards.{name}.target={target}" if target.endswith(".py") or ":" in target else ""
    console.print(f"{', '.join(kept)}: keeps the contract; use it with `rewards.{name}.weight=1{where}`")


def _find(target: str) -> dict[str, type[RewardAxis]]:
    if target.endswith(".py"):
        return axes_in_file(Path(target))
    cls = find_axis(target, target if ":" in target else None)
    return {getattr(cls, "name", target): cls}


def _parse_options(options: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    malformed = [option for option in options if "=" not in option]
    if malformed:
        raise InputError(f"argument '{malformed[0]}' is not of the form key=value")
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
    assert isinstance(parsed, dict)
    return {str(key): value for key, value in parsed.items()}


def _recorded_episodes(of_each: int = 4) -> list[Episode]:
    """The first recorded dialogues of each axis that ship with nano: what people (here: a recipe) did."""
    from rlhf_duplex.inputs import NANO_DATA

    chosen = []
    for axis in SEGMENT_AXES:
        mine = [s for s in read_manifest(NANO_DATA / "heldout" / "segments.jsonl") if s.axis == axis]
        chosen += mine[:of_each]
    detector = make_detector("energy")
    return [recorded_episode(segment, detector) for segment in complete_events(chosen, detector)]


def _saved_episodes(folder: Path) -> list[Episode]:
    places = sorted(path.parent for path in folder.rglob("episode.json"))
    if not places:
        raise InputError(f"{folder} holds no saved episode: give such as runs/quickstart/evaluation/after")
    return [Episode.load(place) for place in places]


def _print(name: str, report: ContractReport, console: Console) -> None:
    console.print(name, style="bold")
    for mark, colour, lines in (
        ("ok", "green", report.passed),
        ("wrong", "red", report.wrong),
        ("hm", "yellow", report.doubtful),
    ):
        for line in lines:
            console.print(Text.assemble("  ", (mark.ljust(6), colour), " ", line), highlight=False, soft_wrap=True)
    if report.values:
        low, high = min(report.values), max(report.values)
        mean = sum(report.values) / len(report.values)
        console.print(
            f"  {len(report.values)} scores from {low:.3g} to {high:.3g}, mean {mean:.3g}; "
            f"{1000 * report.seconds_per_episode:.2f} ms an episode",
            highlight=False,
        )
