"""What the report shows of a warm start: the implicit rewards of its pairs, in all and by kind."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_duplex.report.charts import line_chart
from rlhf_duplex.report.labels import axis_title, number

_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"
Curves = dict[str, tuple[list[float], list[float]]]


def preference_charts(updates: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Charts of TRL's metrics over the steps; none where the run had no pairs."""
    groups = (
        ("Pair accuracy", "share of pairs", {"training": _ACCURACY, "held out": f"eval_{_ACCURACY}"}),
        ("Margin", "chosen minus rejected reward", {"training": _MARGIN, "held out": f"eval_{_MARGIN}"}),
        (
            "Implicit rewards, training",
            "beta times log-ratio",
            {"chosen": "rewards/chosen", "rejected": "rewards/rejected"},
        ),
        ("Log-probability, training", "nats a reply", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
        ("Held-out accuracy by kind", "share of pairs", _by_kind(updates, f"eval_{_ACCURACY}/")),
        ("Held-out margin by kind", "chosen minus rejected reward", _by_kind(updates, f"eval_{_MARGIN}/")),
    )
    charts: list[tuple[str, Markup]] = []
    for title, unit, names in groups:
        curves = {label: _curve(updates, key) for label, key in names.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if curves:
            charts.append((title, line_chart(f"{title}, {unit}", curves, unit, f"p{len(charts)}", "step")))
    return charts


def preference_rows(updates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Kind, accuracy and margin of the held-out pairs at their last evaluation, all pairs first."""
    last = next((line for line in reversed(updates) if f"eval_{_ACCURACY}" in line), None)
    if last is None:
        return []
    names = {"All held-out pairs": "", **{label: f"/{kind}" for label, kind in _kinds(last, f"eval_{_ACCURACY}/")}}
    return [
        (
            label,
            number(last[f"eval_{_ACCURACY}{suffix}"], "%"),
            number(last[f"eval_{_MARGIN}{suffix}"], signed=True),
        )
        for label, suffix in names.items()
    ]


def _kinds(line: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    kinds = sorted(key.removeprefix(prefix) for key in line if key.startswith(prefix))
    return [(axis_title(kind).replace("_", " ").capitalize(), kind) for kind in kinds]


def _by_kind(updates: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, str]:
    found = {label: prefix + kind for line in updates for label, kind in _kinds(line, prefix)}
    return dict(sorted(found.items()))


def _curve(updates: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(u["update"], u[key]) for u in updates if isinstance(u.get(key), int | float)]
    return [x for x, _ in points], [y for _, y in points]
