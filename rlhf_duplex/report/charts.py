"""Charts as inline SVG: curves over updates, and two intervals on one scale. Every text is escaped."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

# Dark enough for 4.5:1 against white, and told apart by dash as well as by colour.
COLOURS = ("#1d4f91", "#a3420b", "#1c6b3a", "#7a2e86", "#5b5b00", "#444b54")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 40


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within `[low, high]`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def trailing_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window - 1` before it (fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    y_label: str,
    identifier: str,
    x_label: str = "update",
    whole: bool = True,
) -> Markup:
    """Curves over updates.

    One series is drawn with its points, and with its trailing mean as the bold line once there are 20; several are
    drawn as lines with a legend.

    Args:
        title: named to screen readers; the page shows it as the caption.
        series: by name, x and y of equal length. Points that are not finite are left out.
        y_label: what y is, with its unit.
        identifier: prefix of the ids in the SVG, unique in the page.
        x_label: what x is.
        whole: only whole numbers stand on the x scale, as updates are.
    """
    clean = {name: _finite(xs, ys) for name, (xs, ys) in series.items()}
    clean = {name: points for name, points in clean.items() if len(points)}
    if not clean:
        return Markup('<p class="missing">No values yet.</p>')
    stacked = np.concatenate(list(clean.values()))
    x_low, x_high = padded(float(stacked[:, 0].min()), float(stacked[:, 0].max()), 0.0)
    y_low, y_high = padded(float(stacked[:, 1].min()), float(stacked[:, 1].max()), 0.06)
    legend_rows = math.ceil(len(clean) / 2) if len(clean) > 1 else 0
    height = _HEIGHT + 16 * legend_rows + (4 if legend_rows else 0)
    plot_bottom = _HEIGHT - _BOTTOM

    def x_at(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return plot_bottom - (y - y_low) / (y_high - y_low) * (plot_bottom - _TOP)

    parts = [grid(x_low, x_high, y_low, y_high, x_at, y_at, plot_bottom, whole)]
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label
        )
    )
    parts.append(
        Markup('<text class="label" transform="translate(9 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (_TOP + plot_bottom) / 2, y_label
        )
    )
    for index, (name, points) in enumerate(clean.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[(index + index // len(COLOURS)) % len(DASHES)]  # of curves of one colour, another each time
        many = len(clean) == 1 and len(points) >= 20
        if many:
            parts.append(_path(points, x_at, y_at, colour, "", 1, 0.35))
            mean = trailing_mean(points[:, 1], max(2, len(points) // 10))
            points = np.column_stack([points[:, 0], mean])
        parts.append(_path(points, x_at, y_at, colour, dash, 2, 1))
        if not many and len(points) <= (40 if len(clean) == 1 else 12):
            parts += [
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2" fill="{}"/>').format(x_at(x), y_at(y), colour)
                for x, y in points
            ]
        if len(clean) > 1:
            left, top = _LEFT + (index % 2) * 165, _HEIGHT + 10 + 16 * (index // 2)
            parts.append(
                Markup(
                    '<line x1="{0}" x2="{1}" y1="{2}" y2="{2}" stroke="{3}" stroke-width="2" stroke-dasharray="{4}"/>'
                    '<text class="label" x="{5}" y="{6}">{7}</text>'
                ).format(left, left + 26, top, colour, dash, left + 32, top + 4, name)
            )
    description = "; ".join(
        f"{name}: from {points[0, 1]:.4g} at {x_label} {points[0, 0]:g} to {points[-1, 1]:.4g} at {points[-1, 0]:g}"
        for name, points in clean.items()
    )
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{title}</title><desc id="{i}-d">{desc}</desc>{body}</svg>'
    ).format(w=_WIDTH, h=height, i=identifier, title=title, desc=description, body=Markup("").join(parts))


def interval_plot(
    before: tuple[float, float, float], after: tuple[float, float, float] | None, description: str
) -> Markup:
    """Mean and interval before (hollow, above) and after (filled, below) on one scale of their own.

    Args:
        before, after: mean, low, high.
        description: read by screen readers.
    """
    shown = [before] + ([after] if after is not None else [])
    low, high = padded(min(e[1] for e in shown), max(e[2] for e in shown), 0.05)

    def x_at(value: float) -> float:
        return 6 + (value - low) / (high - low) * 138

    parts = []
    if low < 0 < high:
        parts.append(Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="2" y2="28"/>').format(x_at(0)))
    for row, (mean, lower, upper) in enumerate(shown):
        y, kind = (9, "before") if row == 0 else (21, "after")
        parts.append(
            Markup(
                '<line class="{0}" x1="{1:.1f}" x2="{2:.1f}" y1="{4}" y2="{4}"/>'
                '<circle class="{0}" cx="{3:.1f}" cy="{4}" r="4"/>'
            ).format(kind, x_at(lower), x_at(upper), x_at(mean), y)
        )
    return Markup(
        '<svg class="interval" viewBox="0 0 150 30" width="150" height="30" role="img" aria-label="{}">{}</svg>'
    ).format(description, Markup("").join(parts))


def _finite(xs: Sequence[float], ys: Sequence[float]) -> np.ndarray:
    points = np.array(list(zip(xs, ys, strict=True)), dtype=float).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A range that is never empty: a constant gets some room on both sides."""
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        room = 0.5 * abs(low) or 0.5
        return low - room, high + room
    room = share * (high - low)
    return low - room, high + room


def grid(x_low, x_high, y_low, y_high, x_at, y_at, bottom, whole: bool = True) -> Markup:
    """Lines and numbers of both scales, and the line below; on the x scale whole numbers only, unless told else."""
    parts = []
    ticks = nice_ticks(y_low, y_high)
    if len(ticks) < 3:  # of one number nobody reads a scale
        ticks = nice_ticks(y_low, y_high, 8)
    for tick in ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y_at(tick), _LEFT - 6, y_at(tick) + 3.5, _tick(tick))
        )
    for tick in nice_ticks(x_low, x_high, 6):
        if whole and abs(tick - round(tick)) >= 1e-9:
            continue
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x_at(tick), bottom + 15, _tick(tick)
            )
        )
    parts.append(
        Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(_LEFT, _WIDTH - _RIGHT, bottom)
    )
    return Markup("").join(parts)


def _tick(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "\u2212")


def _path(points: np.ndarray, x_at, y_at, colour: str, dash: str, width: float, opacity: float) -> Markup:
    track = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
    return Markup(
        '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" stroke-dasharray="{}" opacity="{}"/>'
    ).format(track, colour, width, dash, opacity)
