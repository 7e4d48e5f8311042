"""`comparison.html`: runs held against each other, an ablation's or any: effects, trade-offs, and two side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from envs.errors import InputError
from envs.segments import SEGMENT_AXES
from rlhf_duplex.evaluation.effects import dominated_by, seed_interval
from rlhf_duplex.evaluation.metrics import direction
from rlhf_duplex.evaluation.statistics import Estimate
from rlhf_duplex.report.build import write_page
from rlhf_duplex.report.cards import run_cards
from rlhf_duplex.report.comparable import (
    comparison_notes,
    lead_ins,
    mixed_rewards,
    on_shared_segments,
    played_segments,
)
from rlhf_duplex.report.effect_table import Metric, effect_rows, metric_title
from rlhf_duplex.report.labels import axis_title, interval, label, number
from rlhf_duplex.report.plots import Point, Row, condition_plot, front_plot, weight_plot
from rlhf_duplex.report.runs import Comparison
from rlhf_duplex.report.side_by_side import script_data, untested

# What arXiv 2606.11167's tables have, as far as it is measured here; backchannels' F1, and whether the words hold.
USUAL: tuple[Metric, ...] = (
    ("pause_handling", "takeover_rate"),
    ("turn_taking", "takeover_rate"),
    ("turn_taking", "latency"),
    ("backchannel", "takeover_rate"),
    ("backchannel", "f1"),
    ("backchannel", "jsd"),
    ("user_interruption", "takeover_rate"),
    ("user_interruption", "latency"),
    ("words", "known_pairs"),
)
TRADE_OFF: tuple[Metric, Metric] = (("turn_taking", "latency"), ("pause_handling", "takeover_rate"))


def build_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page; it loads nothing from elsewhere.

    Where it lies in the folder that the runs are in, it links to each run's own report.

    Raises:
        InputError: no run is finished, the runs share no segment, an episode is damaged, or the page cannot be written.
    """
    if not comparison.finished:
        raise InputError(f"no run of {comparison.title} is finished: there is nothing to compare yet")
    notes = comparison_notes(comparison)
    comparison = on_shared_segments(comparison)
    metrics = shown_metrics(comparison)
    mixed = mixed_rewards(comparison)
    comparable = [metric for metric in metrics if not (metric[1] == "reward" and metric[0] in mixed)]
    effects = effect_rows(comparison, metrics)
    cards = run_cards(comparison, path, [axis for axis, _ in reversed(TRADE_OFF)])
    return write_page(
        path,
        "comparison.html",
        name=comparison.title,
        facts=_facts(comparison),
        notes=notes,
        lead=_lead(comparison, effects),
        metrics=[_heading(metric) for metric in metrics],
        baseline=comparison.baseline,
        baseline_cells=[_baseline_cell(comparison, metric) for metric in metrics],
        effects=effects,
        condition_plots=_condition_plots(comparison, comparable),
        weight_plots=_weight_plots(comparison, comparable),
        front=_front(comparison, cards),
        dominated=_dominated(comparison, comparable),
        cards=cards,
        data=script_data(comparison, comparable),
        untested=untested(comparison),
        unfinished=[run for run in comparison.runs if run.after is None],
        skipped=comparison.skipped,
    )


def shown_metrics(comparison: Comparison) -> list[Metric]:
    """The metrics of the page: those asked for, or the usual ones and the reward of every further axis.

    Raises:
        InputError: a metric that was asked for is not there.
    """
    known: dict[Metric, None] = {}
    for run in comparison.finished:
        known |= {(axis, metric): None for axis, row in (run.after or {})["axes"].items() for metric in row}
    if comparison.metrics:
        wanted = [(axis, metric) for axis, _, metric in (name.partition(".") for name in comparison.metrics)]
        missing = [metric for metric in wanted if metric not in known]
        if missing:
            there = ", ".join(".".join(metric) for metric in known)
            raise InputError(f"metric {'.'.join(missing[0])} is in no result: there are {there}")
        return wanted
    more = [(axis, metric) for axis, metric in known if metric == "reward" and axis not in SEGMENT_AXES]
    return [metric for metric in USUAL if metric in known] + more


def _heading(metric: Metric) -> dict[str, str]:
    words = label(*metric)
    goal = {1: "higher is better", -1: "lower is better"}.get(direction(*metric), "")
    return {"axis": axis_title(metric[0]), "name": words.name, "meaning": words.meaning, "goal": goal}


def _baseline_cell(comparison: Comparison, metric: Metric) -> dict[str, str] | None:
    values = _values(comparison, comparison.baseline, metric)
    if not values:
        return None
    estimate, unit = seed_interval(values), label(*metric).unit
    spread = interval(min(values), max(values), unit) if len(values) > 1 else "one seed"
    return {"mean": number(estimate.mean, unit), "range": spread}


def _values(comparison: Comparison, condition: str, metric: Metric) -> list[float]:
    means = [run.mean(*metric) for run in comparison.of(condition)]
    return [mean for mean in means if mean is not None]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = comparison.runs
    seeds = sorted({run.seed for run in runs})
    segments = set().union(*(played_segments(run.after) for run in comparison.finished))
    silence = " and ".join(f"{seconds:g}" for seconds in lead_ins(comparison)) or "?"
    facts = [
        ("Base", comparison.base),
        ("Conditions", str(len(comparison.conditions))),
        ("Seeds", ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{len(seeds)}"),
        ("Runs", f"{len(comparison.finished)} finished of {len(runs)}"),
        ("Held against", comparison.baseline),
        ("Held-out segments", str(len(segments))),
        ("Lead-in before each segment", f"{silence} s of silence"),
    ]
    return [(name, value) for name, value in facts if value]


def _lead(comparison: Comparison, effects: Sequence[dict[str, Any]]) -> str:
    clear = [
        f"{row['name']}: {metric_title(cell['metric']).lower()} {cell['difference']}"
        for row in effects
        for cell in row["cells"]
        if cell.get("verdict")
    ]
    if not effects:
        return "There is no second condition with a finished run yet."
    if not clear:
        return f"No condition differs clearly from {comparison.baseline} on any of these metrics."
    more = f"; and {len(clear) - 6} more" if len(clear) > 6 else ""
    return f"Against {comparison.baseline}, clear beyond chance: {'; '.join(clear[:6])}{more}."


def _factor(metric: Metric) -> float:
    return 100.0 if label(*metric).unit == "%" else 1.0


def _spread(metric: Metric, values: Sequence[float]) -> Estimate:
    """Mean and interval over seeds, as drawn: of an interval about a share, what lies between 0 and 100 %."""
    estimate = seed_interval(values)
    if label(*metric).unit != "%":
        return estimate
    return estimate._replace(low=max(0.0, estimate.low), high=min(100.0, estimate.high))


def _with_unit(metric: Metric) -> str:
    words = label(*metric)
    return f"{words.name} ({words.unit})" if words.unit else words.name


def _condition_plots(comparison: Comparison, metrics: Sequence[Metric]) -> list[tuple[str, Markup]]:
    names = [comparison.baseline, *(name for name in comparison.conditions if name != comparison.baseline)]
    plots = []
    for number_, metric in enumerate(metrics):
        rows = []
        for name in names:
            values = [_factor(metric) * value for value in _values(comparison, name, metric)]
            if values:
                rows.append(Row(name, values, _spread(metric, values)))
        if rows:
            title = metric_title(metric)
            plots.append((title, condition_plot(title, rows, _with_unit(metric), f"m{number_}")))
    return plots


def varied_numbers(comparison: Comparison) -> dict[str, list[str]]:
    """Keys to plot metrics against, each with the conditions whose means are joined by a line.

    These are the conditions that differ from the baseline in this key alone; where there are none (a simplex sweep
    moves several weights at once) and the key has three values or more, all conditions.
    """
    base = comparison.conditions[comparison.baseline]
    found = {}
    for key in dict.fromkeys(key for values in comparison.conditions.values() for key in values):
        numbers = {n: v[key] for n, v in comparison.conditions.items() if _is_number(v.get(key))}
        alone = [n for n in numbers if all(comparison.conditions[n].get(k) == base.get(k) for k in base if k != key)]
        if len({numbers[name] for name in alone}) > 1:
            found[key] = alone
        elif len(set(numbers.values())) > 2:
            found[key] = list(numbers)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weight_plots(comparison: Comparison, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    sections = []
    for section, (key, joined) in enumerate(varied_numbers(comparison).items()):
        plots = []
        for number_, metric in enumerate(metrics):
            points: list[tuple[float, float]] = []
            groups: dict[float, list[float]] = {}
            for name, values in comparison.conditions.items():
                if not _is_number(values.get(key)):
                    continue
                x, ys = float(values[key]), [_factor(metric) * y for y in _values(comparison, name, metric)]
                points += [(x, y) for y in ys]
                if name in joined:
                    groups.setdefault(x, []).extend(ys)
            means = [(x, _spread(metric, ys)) for x, ys in sorted(groups.items()) if ys]
            if points:
                title, identifier = metric_title(metric), f"w{section}-{number_}"
                drawn = weight_plot(title, points, means, key, _with_unit(metric), identifier)
                plots.append((title, drawn))
        others = len(joined) < len(comparison.conditions)
        sections.append({"key": key, "plots": plots, "alone": others})
    return sections


def _front(comparison: Comparison, cards: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The plot of the trade-off over all runs."""
    x, y = TRADE_OFF
    runs = [run for run in comparison.finished if run.mean(*x) is not None and run.mean(*y) is not None]
    if not runs:
        return None
    costs = {r.name: (_factor(x) * float(r.mean(*x) or 0.0), _factor(y) * float(r.mean(*y) or 0.0)) for r in runs}
    beaten = dominated_by(costs)
    conditions = list(comparison.conditions)
    numbers = {card["name"]: card["index"] for card in cards}
    points = [
        Point(numbers[r.name], r.name, *costs[r.name], not beaten[r.name], conditions.index(r.condition)) for r in runs
    ]
    x_label, y_label = (f"{axis_title(m[0]).lower()} {_with_unit(m)}" for m in TRADE_OFF)
    return {
        "plot": front_plot("Pause takeovers against turn latency", points, x_label, y_label, "front"),
        "best": [run.name for run in runs if not beaten[run.name]],
        "legend": [(name, index + 1, index % 6) for index, name in enumerate(conditions) if comparison.of(name)],
    }


def _dominated(comparison: Comparison, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """By condition, on its means over seeds: what dominates it in the trade-off, and on all metrics of the page."""
    names = [name for name in comparison.conditions if comparison.of(name)]
    directed = [m for m in metrics if direction(*m) and all(_values(comparison, name, m) for name in names)]

    def costs(wanted: Sequence[Metric]) -> dict[str, list[float]]:
        return {n: [-direction(*m) * float(np.mean(_values(comparison, n, m))) for m in wanted] for n in names}

    pair = dominated_by(costs(TRADE_OFF)) if all(m in directed for m in TRADE_OFF) else {name: [] for name in names}
    whole = dominated_by(costs(directed))
    return [{"name": name, "pair": pair[name], "all": whole[name]} for name in names]
