"""Conditions made from a base configuration: the paper's ablation table, and sweeps over reward weights.

What would change nothing with a base (no judge in its mix, no context before its segments) is left out, and why.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from envs.errors import InputError
from envs.segments import SEGMENT_AXES, read_manifest
from rlhf_duplex.ablate.plan import Condition, Skipped
from rlhf_duplex.config import Config

Rows = tuple[list[Condition], list[Skipped]]
SHORT = {"pause_handling": "pause", "turn_taking": "turn", "user_interruption": "interruption"}
MIN_CONTEXT_SECONDS = 1.0  # of which the longest context of any segment must have more, to be called context


def preset_conditions(preset: Any, base: Config) -> Rows:
    """The conditions of a preset with this base, and those that it leaves out.

    Args:
        preset: its name, or `{name: ..., option: value}`.
        base: the configuration that is varied.

    Raises:
        InputError: an unknown preset or option, or a base that it can do nothing with.
    """
    options = {"name": preset} if isinstance(preset, str) else dict(preset) if isinstance(preset, Mapping) else {}
    name = options.pop("name", None)
    if name not in PRESETS:
        raise InputError(f"preset {preset!r} is not known: choose {' or '.join(PRESETS)}")
    try:
        return PRESETS[name](base, **options)
    except TypeError as error:
        raise InputError(f"preset {name}: {str(error).partition('() ')[2] or error}") from error


def leave_one_axis_out(base: Config, groups: str = "given") -> Rows:
    """The ablations of arXiv 2606.11167 (its table for Moshi, Fisher): one thing missing at a time.

    Without an axis, neither its segments nor its reward are trained on. The axis is measured all the same.
    Without the judge, judged axes have weight 0. Without the schedule, context has its full length from the first
    update on; without context there is none.

    Args:
        base: the configuration that is varied.
        groups: what becomes of the groups of the axis that is left out. `given`: they go to the others, and
            `trainer.groups` stays (the paper gives one number of groups for all, 32). `dropped`: nobody has them, and
            the minibatch is less by the same share, so that the others have the groups and the optimiser steps that
            they have in the full mix (for a base that names its `train_axes`).

    Raises:
        InputError: another word, or groups or a minibatch that cannot be divided so.
    """
    if groups not in ("given", "dropped"):
        raise InputError(f"preset leave_one_axis_out: groups must be given or dropped, found {groups!r}")
    rows, skipped = [Condition("full", {})], []
    trained = trained_axes(base)
    for axis in SEGMENT_AXES:
        name = f"without {SHORT.get(axis, axis)}"
        others = [other for other in base.train_axes or trained if other in trained and other != axis]
        if axis not in trained:
            skipped.append(Skipped(name, f"the base does not train on {axis}"))
        elif not others:
            skipped.append(Skipped(name, f"the base trains on nothing but {axis}"))
        else:
            weight = {f"rewards.{axis}.weight": 0.0} if axis in base.rewards else {}
            fewer = _without_groups(base, len(others)) if groups == "dropped" else {}
            rows.append(Condition(name, {"train_axes": others, **weight, **fewer}))
    judged = [axis for axis in judged_axes(base) if base.rewards[axis].get("weight", 1.0)]
    if judged:
        rows.append(Condition("without judge", {f"rewards.{axis}.weight": 0.0 for axis in judged}))
    else:
        skipped.append(Skipped("without judge", "the base has no judged axis (content, safety) in its mix"))
    none = _no_context(base)
    if none:
        skipped += [Skipped("without schedule", none), Skipped("without context", none)]
        return rows, skipped
    if base.context.schedule == "constant":
        skipped.append(Skipped("without schedule", "context.schedule of the base is constant already"))
    else:
        rows.append(Condition("without schedule", {"context.schedule": "constant"}))
    rows.append(Condition("without context", {"context.probability": 0.0}))
    return rows, skipped


def _without_groups(base: Config, kept: int) -> dict[str, int]:
    """Groups and minibatch of an update in which so many of the `train_axes` are kept."""
    whole, trainer = len(base.train_axes), base.trainer
    parts = {"trainer.groups": trainer.groups * kept, "trainer.minibatch": trainer.minibatch * kept}
    if not whole or any(part % whole for part in parts.values()):
        raise InputError(
            f"preset leave_one_axis_out: groups: dropped needs train_axes of whose number trainer.groups and "
            f"trainer.minibatch are multiples, found {whole} axes, {trainer.groups} and {trainer.minibatch}"
        )
    return {key: part // whole for key, part in parts.items()}


def trained_axes(base: Config) -> list[str]:
    """Axes whose segments the base trains on and whose reward has a weight."""
    wanted = [a for a in SEGMENT_AXES if a in base.rewards and base.rewards[a].get("weight", 1.0)]
    return [a for a in wanted if not base.train_axes or a in base.train_axes]


def judged_axes(base: Config) -> list[str]:
    """Axes of the base that ask a judge."""
    from rewards.axis import find_axis
    from rewards.content import JudgedAxis

    return [a for a, options in base.rewards.items() if issubclass(find_axis(a, options.get("target")), JudgedAxis)]


def _no_context(base: Config) -> str:
    """Why the base has no context to take away; empty where it has."""
    if base.context.probability == 0 or base.context.max_seconds == 0:
        return "the base has no context (context.probability or context.max_seconds is 0)"
    from rlhf_duplex.inputs import NANO_DATA

    path = NANO_DATA / "train" / "segments.jsonl" if base.segments == "nano" else Path(base.segments)
    longest = max(segment.start for segment in read_manifest(path))
    if longest < MIN_CONTEXT_SECONDS:
        return f"nothing precedes the base's segments (at most {longest:.1f} s of recording)"
    return ""


def reward_weights(base: Config, resolution: int = 2, axes: list[str] | None = None) -> Rows:
    """A simplex sweep: all ways to share the sum of the base's weights among axes in `resolution` equal parts.

    The base's own weights come first, as `full`.

    Args:
        base: the configuration that is varied.
        resolution: parts; with 4 axes 2 gives 10 mixtures, 4 gives 35.
        axes: to share among; by default all with a weight.
    """
    names = axes or [axis for axis, options in base.rewards.items() if options.get("weight", 1.0)]
    unknown = sorted(set(names) - set(base.rewards))
    if unknown or len(names) < 2:
        found = f"'{unknown[0]}' is no reward of the base" if unknown else f"at least 2 axes are needed, found {names}"
        raise InputError(f"preset reward_weights: {found}")
    if not isinstance(resolution, int) or resolution < 1:
        raise InputError(f"preset reward_weights: `resolution` must be a number of at least 1, found {resolution!r}")
    weights = [float(base.rewards[name].get("weight", 1.0)) for name in names]
    rows = [Condition("full", {})]
    for parts in itertools.product(range(resolution, -1, -1), repeat=len(names)):
        shares = [sum(weights) * part / resolution for part in parts]
        if sum(parts) == resolution and shares != weights:
            label = " ".join(f"{SHORT.get(n, n)}={share:g}" for n, share in zip(names, shares, strict=True) if share)
            overrides = {f"rewards.{n}.weight": share for n, share in zip(names, shares, strict=True)}
            rows.append(Condition(label, overrides))
    return rows, []


PRESETS: dict[str, Callable[..., Rows]] = {"leave_one_axis_out": leave_one_axis_out, "reward_weights": reward_weights}
