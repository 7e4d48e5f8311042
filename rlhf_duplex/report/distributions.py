"""Distributions, and what was measured during training, as inline SVG; curves are told apart by dash, too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from rlhf_duplex.report.charts import line_chart
from rlhf_duplex.report.labels import axis_title, label

LATENCIES = (
    ("turn_taking", "latency"),
    ("user_interruption", "latency"),
    ("user_interruption", "stop_latency"),
    ("user_interruption", "response_latency"),
    ("live", "gap"),
    ("live", "stop_seconds"),
)
_BINS = 24


def distribution_charts(results: Mapping[str, Mapping[str, Any]], prefix: str = "d") -> list[tuple[str, Markup]]:
    """(title, chart) of every latency that a result has values of, and of the timing of backchannels beside people's.

    Args:
        results: by the system's name, as `write_results` writes them; `timing` in them is of
            `evaluation.distributions.backchannel_timing`.
        prefix: of the ids in the SVG, unique in the page.
    """
    charts: list[tuple[str, Markup]] = []
    for axis, metric in LATENCIES:
        columns = {n: list(r.get("segments", {}).get(axis, {}).get(metric, {}).values()) for n, r in results.items()}
        columns = {name: [v for v in values if math.isfinite(v)] for name, values in columns.items()}
        columns = {name: values for name, values in columns.items() if values}
        if columns:
            title = f"{axis_title(axis)}: {label(axis, metric).name}"
            counted = {f"{name} (n {len(values)})": values for name, values in columns.items()}
            charts.append((title, latency_histogram(title, counted, f"{prefix}{len(charts)}")))
    timings = {name: result.get("timing") or {} for name, result in results.items()}
    curves = {name: timing["agent"] for name, timing in timings.items() if timing.get("agent")}
    people = next((timing["human"] for timing in timings.values() if timing.get("human")), None)
    if people:
        curves = {"people": people} | curves
    if curves:
        title = "Backchannel: when they are said"
        steps = {name: _steps(np.linspace(0, 100, len(shares) + 1), shares) for name, shares in curves.items()}
        chart = line_chart(title, steps, "share of backchannels", f"{prefix}{len(charts)}", "% of the user's speech")
        charts.append((title, chart))
    return charts


def during_charts(updates: Sequence[Mapping[str, Any]], prefix: str = "v") -> list[tuple[str, Markup]]:
    """(title, chart) of each axis' reward on the held-out segments during training (`evaluation.every`)."""
    charts: list[tuple[str, Markup]] = []
    keys = dict.fromkeys(k for row in updates for k in row if k.startswith("evaluation/") and k.endswith("/reward"))
    for key in keys:
        axis = key.split("/")[1]
        points = [(row["update"], row[key]) for row in updates if isinstance(row.get(key), int | float)]
        unit = label(axis, "reward").unit
        y_label = f"mean reward ({unit})" if unit else "mean reward"
        curve = {axis: ([x for x, _ in points], [y for _, y in points])}
        chart = line_chart(f"{axis_title(axis)}, held-out, {y_label}", curve, y_label, f"{prefix}{len(charts)}")
        charts.append((f"{axis_title(axis)}, held-out", chart))
    return charts


def latency_histogram(title: str, columns: Mapping[str, Sequence[float]], identifier: str) -> Markup:
    """Shares of latencies (s) in equal bins that all systems share; what lies beyond the 99th percentile is in the
    last one."""
    everything = np.concatenate([np.asarray(values, dtype=float) for values in columns.values()])
    low = min(0.0, float(np.floor(everything.min() * 10) / 10))
    high = max(low + 0.5, math.ceil(float(np.quantile(everything, 0.99)) * 10) / 10)
    edges = np.linspace(low, high, _BINS + 1)
    steps = {}
    for name, values in columns.items():
        counts, _ = np.histogram(np.clip(values, low, high), bins=edges)
        steps[name] = _steps(edges, counts / len(values))
    return line_chart(title, steps, "share", identifier, "seconds", whole=False)


def _steps(edges: Any, shares: Any) -> tuple[list[float], list[float]]:
    """The outline of bars, as x and y of a curve."""
    xs, ys = [float(edges[0])], [0.0]
    for index, share in enumerate(shares):
        xs += [float(edges[index]), float(edges[index + 1])]
        ys += [float(share), float(share)]
    return [*xs, float(edges[-1])], [*ys, 0.0]
