"""Plots of a comparison as inline SVG: conditions, a metric against a weight, and the trade-off of two metrics."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from rlhf_duplex.evaluation.statistics import Estimate
from rlhf_duplex.report.charts import COLOURS, grid, nice_ticks, padded

_WIDTH, _ROW = 380, 22
_PLOT_BOTTOM, _HEIGHT, _LEFT, _RIGHT, _TOP = 230, 270, 58, 14, 12
_NAME_CHARACTERS = 21


class Row(NamedTuple):
    """A condition in a plot: its name, one value a seed, and their mean with its interval."""

    name: str
    values: Sequence[float]
    estimate: Estimate


class Point(NamedTuple):
    """A run in the trade-off: where it lies, what it is called, whether none dominates it, its condition's place."""

    run: int
    name: str
    x: float
    y: float
    front: bool
    condition: int


def condition_plot(title: str, rows: Sequence[Row], x_label: str, identifier: str) -> Markup:
    """A row a condition: small dots are seeds, the large one their mean, the line its interval.

    Args:
        title: named to screen readers; the page shows it as the caption.
        rows: in order; a vertical line goes through the mean of the first.
        x_label: what is shown, with its unit.
        identifier: prefix of the ids in the SVG, unique in the page.
    """
    ends = [v for row in rows for v in (*row.values, row.estimate.low, row.estimate.high)]
    low, high = padded(min(ends), max(ends), 0.06)
    left, bottom = 150, 8 + _ROW * len(rows)

    def x_at(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)

    parts = []
    for tick in nice_ticks(low, high):
        parts.append(
            Markup(
                '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1}"/>'
                '<text class="tick" x="{0:.1f}" y="{2}" text-anchor="middle">{3:.4g}</text>'
            ).format(x_at(tick), bottom, bottom + 14, 0.0 if abs(tick) < 1e-12 else tick)
        )
    parts.append(
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1}"/>').format(
            x_at(rows[0].estimate.mean), bottom
        )
    )
    for number, (row, shown) in enumerate(zip(rows, short_names([row.name for row in rows]), strict=True)):
        y = 8 + _ROW * number + _ROW / 2
        mean, lower, upper, _ = row.estimate
        parts.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="end"><title>{}</title>{}</text>').format(
                left - 10, y + 4, row.name, shown
            )
        )
        parts += [Markup('<circle class="seed" cx="{:.1f}" cy="{}" r="2.6"/>').format(x_at(v), y) for v in row.values]
        parts.append(
            Markup(
                '<line class="mean" x1="{0:.1f}" x2="{1:.1f}" y1="{3}" y2="{3}"/>'
                '<circle class="mean" cx="{2:.1f}" cy="{3}" r="4.2"/>'
            ).format(x_at(lower), x_at(upper), x_at(mean), y)
        )
    parts.append(_x_label((left + _WIDTH - _RIGHT) / 2, bottom + 29, x_label))
    description = "; ".join(f"{r.name}: {r.estimate.mean:.4g} over {r.estimate.n} seeds" for r in rows)
    return _svg(title, description, bottom + 36, parts, identifier)


def weight_plot(
    title: str,
    points: Sequence[tuple[float, float]],
    means: Sequence[tuple[float, Estimate]],
    x_label: str,
    y_label: str,
    identifier: str,
) -> Markup:
    """A metric against a key of the configuration: small dots are runs, large ones the mean of a value of the key.

    Args:
        points: (value of the key, metric) of every run.
        means: (value of the key, mean with its interval), where several runs have it; joined by a line.
        title, x_label, y_label, identifier: as in `condition_plot`.
    """
    x_low, x_high = padded(min(x for x, _ in points), max(x for x, _ in points), 0.05)
    ends = [*(y for _, y in points), *(e for _, m in means for e in (m.low, m.high))]
    y_low, y_high = padded(min(ends), max(ends), 0.06)
    x_at, y_at = _scales(x_low, x_high, y_low, y_high)
    parts = [grid(x_low, x_high, y_low, y_high, x_at, y_at, _PLOT_BOTTOM, whole=False)]
    parts += [
        Markup('<circle class="seed" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(x_at(x), y_at(y)) for x, y in points
    ]
    if len(means) > 1:
        track = " ".join(f"{x_at(x):.1f},{y_at(m.mean):.1f}" for x, m in means)
        parts.append(Markup('<polyline class="track" points="{}"/>').format(track))
    for x, m in means:
        parts.append(
            Markup(
                '<line class="mean" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>'
                '<circle class="mean" cx="{0:.1f}" cy="{3:.1f}" r="4.2"/>'
            ).format(x_at(x), y_at(m.low), y_at(m.high), y_at(m.mean))
        )
    parts += _labels(x_label, y_label)
    description = "; ".join(f"at {x:g}: {m.mean:.4g}" for x, m in means) or f"{len(points)} runs"
    return _svg(title, description, _HEIGHT, parts, identifier)


def front_plot(title: str, points: Sequence[Point], x_label: str, y_label: str, identifier: str) -> Markup:
    """Two metrics of which lower is better: filled points are those that none dominates, joined by the front's line.

    Each point links to `#run-N` of its run.

    Args:
        points: of every run.
        title, x_label, y_label, identifier: as in `condition_plot`.
    """
    x_low, x_high = padded(min(p.x for p in points), max(p.x for p in points), 0.08)
    y_low, y_high = padded(min(p.y for p in points), max(p.y for p in points), 0.08)
    x_at, y_at = _scales(x_low, x_high, y_low, y_high)
    parts = [grid(x_low, x_high, y_low, y_high, x_at, y_at, _PLOT_BOTTOM, whole=False)]
    front = sorted((p.x, p.y) for p in points if p.front)
    steps = [front[0]] + [corner for a, b in itertools.pairwise(front) for corner in ((b[0], a[1]), b)]
    track = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in steps)
    parts.append(Markup('<polyline class="front" points="{}"/>').format(track))
    for p in sorted(points, key=lambda p: p.front):  # those on the front above the others
        colour = COLOURS[p.condition % len(COLOURS)]
        fill = colour if p.front else "none"
        parts.append(
            Markup(
                '<a href="#run-{0}" data-run="{0}" aria-label="{1}">'
                '<circle class="run" cx="{2:.1f}" cy="{3:.1f}" r="5" fill="{4}" stroke="{5}" pointer-events="all"/>'
                '<text class="tick" x="{8:.1f}" y="{9:.1f}">{10}</text><title>{1}: {6:.3g}, {7:.3g}</title></a>'
            ).format(
                *(p.run, p.name, x_at(p.x), y_at(p.y), fill, colour, p.x, p.y, x_at(p.x) + 7, y_at(p.y) - 4),
                p.condition + 1,
            )
        )
    parts += _labels(x_label, y_label)
    description = "not dominated: " + "; ".join(f"{p.name} at {p.x:.3g}, {p.y:.3g}" for p in points if p.front)
    return _svg(title, description, _HEIGHT, parts, identifier, role="group")  # an image has no links in it


def _scales(x_low: float, x_high: float, y_low: float, y_high: float):
    def x_at(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return _PLOT_BOTTOM - (y - y_low) / (y_high - y_low) * (_PLOT_BOTTOM - _TOP)

    return x_at, y_at


def _labels(x_label: str, y_label: str) -> list[Markup]:
    return [
        _x_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label),
        Markup('<text class="label" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (_TOP + _PLOT_BOTTOM) / 2, y_label
        ),
    ]


def _x_label(x: float, y: float, text: str) -> Markup:
    return Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(x, y, text)


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit beside a plot, no two alike, cut in the middle: their end is the value that they are about.

    Of those that would be cut to the same text, what they begin with in common is left out, again until that is of no
    use: what tells some of a grid apart makes them like others. Those have the number of their row in front.
    """
    left_out = [0] * len(names)
    numbered: set[int] = set()
    while True:  # ends: each round leaves out more of some names, or numbers some
        cut = [
            _cut(name, start=left_out[place]) if place not in numbered else _with_number(name, place + 1)
            for place, name in enumerate(names)
        ]
        alike: dict[str, list[int]] = {}
        for place, text in enumerate(cut):
            alike.setdefault(text, []).append(place)
        groups = [places for places in alike.values() if len(places) > 1]
        if not groups:
            return cut
        for places in groups:
            letters = zip(*(names[place] for place in places), strict=False)
            same = len(list(itertools.takewhile(lambda found: len(set(found)) == 1, letters)))
            if numbered.isdisjoint(places) and same > max(left_out[place] for place in places):
                for place in places:
                    left_out[place] = same
            else:
                numbered.update(places)


def _with_number(name: str, number: int) -> str:
    front = f"{number}: "
    return front + _cut(name, _NAME_CHARACTERS - len(front))


def _cut(name: str, room: int = _NAME_CHARACTERS, start: int = 0) -> str:
    if start:
        return "\u2026" + _cut(name[start:], room - 1)
    first = room // 3
    return name if len(name) <= room else f"{name[:first]}\u2026{name[first + 1 - room :]}"


def _svg(
    title: str, description: str, height: float, parts: Sequence[Markup], identifier: str, role: str = "img"
) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="{r}" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{t}</title><desc id="{i}-d">{d}</desc>{body}</svg>'
    ).format(w=_WIDTH, h=height, r=role, i=identifier, t=title, d=description, body=Markup("").join(parts))
