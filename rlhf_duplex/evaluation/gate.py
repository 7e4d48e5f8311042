"""A gate for continuous integration: `evaluate --fail-if "turn_taking.latency > 0.2"` ends with exit code 3.

A condition names an axis and a metric of the result, and when it fails::

    turn_taking.latency > 0.2            the mean
    turn_taking.latency.low > 0.2        the lower end of its 95 % interval: surely above
    backchannel.f1 worse                 than --baseline RESULT.json: paired permutation test, p < 0.05
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.errors import InputError
from rlhf_duplex.evaluation.metrics import DIRECTION, check_metric, direction, other_options
from rlhf_duplex.evaluation.statistics import LEVEL, can_tell, permutation_test

EXIT_CODE = 3
_THRESHOLD = re.compile(r"\s*([\w-]+)\.(\w+?)(?:\.(mean|low|high))?\s*(>=|<=|>|<)\s*([-+\d.eE]+)\s*")
_WORSE = re.compile(r"\s*([\w-]+)\.(\w+)\s+worse\s*")
_HOLDS = {
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
}


@dataclass(frozen=True)
class Condition:
    """When a result fails: `axis.metric[.part] operator bound`, or `worse` than a baseline.

    Attributes:
        text: as it was written.
        axis, metric: of the result.
        part: `mean`, `low` or `high`.
        operator: `>`, `<`, `>=`, `<=` or `worse`.
        bound: for a comparison.
    """

    text: str
    axis: str
    metric: str
    part: str = "mean"
    operator: str = "worse"
    bound: float = 0.0


def parse_condition(text: str) -> Condition:
    """A condition as it is written on the command line.

    Raises:
        InputError: it is none.
    """
    if found := _WORSE.fullmatch(text):
        return Condition(text.strip(), found[1], found[2])
    found = _THRESHOLD.fullmatch(text)
    try:
        if not found:
            raise ValueError
        return Condition(text.strip(), found[1], found[2], found[3] or "mean", found[4], float(found[5]))
    except ValueError:
        raise InputError(
            f'--fail-if {text!r} is no condition: write it as "turn_taking.latency > 0.2" '
            'or "turn_taking.latency worse" (than --baseline)'
        ) from None


def check_gate(conditions: Sequence[Condition], baseline: Mapping[str, Any] | None) -> None:
    """Whether the conditions can be asked at all, before anything is played.

    Raises:
        InputError: a metric that is none; `worse` needs a baseline, and a metric of which one direction is the better
            one.
    """
    for condition in conditions:
        try:
            check_metric(condition.axis, condition.metric)
        except InputError as error:
            raise InputError(f"--fail-if {condition.text!r}: {error}") from None
        if condition.operator != "worse":
            continue
        if baseline is None:
            raise InputError(f"--fail-if {condition.text!r} needs --baseline, the JSON file of an earlier evaluation")
        if direction(condition.axis, condition.metric) == 0:
            raise InputError(
                f"--fail-if {condition.text!r}: of {condition.axis}.{condition.metric} neither direction is worse; "
                "give a threshold"
            )


def failures(
    conditions: Sequence[Condition], result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None
) -> list[str]:
    """A sentence for every condition that fails, with the value that it fails by; empty where all pass.

    A metric that an axis is known to have, but of which there is no value (the latency where no turn was taken, the
    words of an agent that says none), fails its condition, as does a change for the worse of fewer than six shared
    segments, and a reward of other options: what cannot be measured must not pass.

    Args:
        conditions: from `parse_condition`.
        result: as `evaluation.metrics.write_results` writes it.
        baseline: another such result.

    Raises:
        InputError: an axis or metric that no result has.
    """
    check_gate(conditions, baseline)
    found = [_failure(condition, result, baseline) for condition in conditions]
    return [sentence for sentence in found if sentence]


def _failure(condition: Condition, result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str | None:
    axes = result["axes"]
    name = f"{condition.axis}.{condition.metric}"
    nothing = f"{condition.text}: {name} has no value"
    built_in = (condition.axis, condition.metric) in DIRECTION
    if condition.axis not in axes:
        if built_in:
            return nothing
        raise InputError(
            f"--fail-if {condition.text!r}: there is no axis '{condition.axis}': there are {', '.join(sorted(axes))}"
        )
    estimate = axes[condition.axis].get(condition.metric)
    if estimate is None:
        if not built_in and direction(condition.axis, condition.metric) == 0:
            known = ", ".join(sorted(axes[condition.axis]))
            raise InputError(f"--fail-if {condition.text!r}: there is no metric {name}: there are {known}")
        return nothing
    if condition.operator == "worse":
        assert baseline is not None
        return _worse(condition, result, baseline)
    value = estimate[condition.part]
    if not math.isfinite(value):
        return nothing
    if not _HOLDS[condition.operator](value, condition.bound):
        return None
    part = "" if condition.part == "mean" else f".{condition.part}"
    interval = f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{condition.text}: {name}{part} is {value:.3f} (95 % {interval}, n {estimate['n']})"


def _worse(condition: Condition, result: Mapping[str, Any], baseline: Mapping[str, Any]) -> str | None:
    axis, metric = condition.axis, condition.metric
    before, after = (table.get("segments", {}).get(axis, {}).get(metric, {}) for table in (baseline, result))
    test = permutation_test(before, after)
    if test is None:
        return f"{condition.text}: the baseline shares no segment with {axis}.{metric}"
    if metric == "reward" and axis in other_options(baseline, result):
        return f"{condition.text}: the baseline measured {axis} with other options of the reward"
    changed = f"{condition.text}: {axis}.{metric} changed by {test.difference:+.3f} (p {test.p:.3f}, n {test.n})"
    if test.difference * direction(axis, metric) >= 0:
        return None
    if not can_tell(test.n):
        return f"{changed}: too few shared segments to tell whether by chance"
    return changed if test.p < LEVEL else None
