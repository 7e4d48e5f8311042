"""Full-Duplex-Bench v1 as a table: published rows beside any number of systems measured here.

Published figures are those of arXiv 2606.11167 (Moshi and PersonaPlex, each with 3 s of lead-in where it is Moshi, and
after RL on two corpora). A row of ours is named with its lead-in: the lead-in alone moves these figures.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table


class Column(NamedTuple):
    """A figure of the table: where it lies in a result, and how it is called."""

    axis: str
    metric: str
    title: str
    better: int  # +1 higher, -1 lower


COLUMNS = (
    Column("pause_handling_synthetic", "takeover_rate", "pause TOR synthetic", -1),
    Column("pause_handling_candor", "takeover_rate", "pause TOR Candor", -1),
    Column("backchannel", "takeover_rate", "BC TOR", -1),
    Column("backchannel", "frequency", "BC freq", 1),
    Column("backchannel", "jsd", "BC JSD", -1),
    Column("turn_taking", "takeover_rate", "turn TOR", 1),
    Column("turn_taking", "latency", "turn latency", -1),
    Column("user_interruption", "takeover_rate", "interruption TOR", 1),
    Column("user_interruption", "rating", "interruption rating", 1),
    Column("user_interruption", "latency", "interruption latency", -1),
)
# A folder named `pause_handling` is of neither subset; it stands in a column of its own.
_PLAIN = Column("pause_handling", "takeover_rate", "pause TOR", -1)

# arXiv 2606.11167, section 3, in the order of COLUMNS.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "Moshi": (0.445, 0.528, 0.255, 0.074, 0.824, 0.739, 0.162, 0.920, 3.44, 1.377),
    "Moshi + RL (Fisher)": (0.226, 0.417, 0.091, 0.095, 0.789, 0.966, 0.121, 1.000, 3.58, 0.461),
    "Moshi + RL (Seamless)": (0.307, 0.463, 0.145, 0.101, 0.794, 0.958, 0.160, 1.000, 3.63, 0.409),
    "PersonaPlex": (0.482, 0.444, 0.182, 0.046, 0.841, 0.958, 0.219, 0.940, 4.50, 0.271),
    "PersonaPlex + RL (Fisher)": (0.328, 0.361, 0.127, 0.122, 0.783, 0.950, 0.079, 1.000, 4.52, 0.187),
    "PersonaPlex + RL (Seamless)": (0.350, 0.356, 0.073, 0.112, 0.786, 0.975, 0.086, 0.995, 4.53, 0.223),
}


class Row(NamedTuple):
    """A line of the table: a system, whether its figures are published ones, and a text for each column."""

    name: str
    published: bool
    cells: tuple[str, ...]


def columns(results: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns that the table needs for these results, by system."""
    plain = any("pause_handling" in result["axes"] for result in results.values())
    return (_PLAIN, *COLUMNS) if plain else COLUMNS


def leaderboard(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Published rows, then ours: mean with its 95 % interval and n; `-` where it was not measured.

    Args:
        results: by the system's name, as `evaluate --suite fdb-v1` writes them.
    """
    shown = columns(results)
    rows = []
    for name, figures in PUBLISHED.items():
        known = dict(zip(COLUMNS, figures, strict=True))
        rows.append(Row(name, True, tuple(f"{known[c]:.3f}" if c in known else "-" for c in shown)))
    for name, result in results.items():
        cells = [_cell(result["axes"].get(column.axis, {}).get(column.metric)) for column in shown]
        rows.append(Row(row_name(name, result), False, tuple(cells)))
    return rows


def row_name(name: str, result: Mapping[str, Any]) -> str:
    """A system with its lead-in, where it was played here."""
    lead_in = result.get("lead_in_seconds")
    return name if lead_in is None else f"{name} (lead-in {lead_in:g} s)"


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] n {estimate['n']}"


def as_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The leaderboard for the console, a line a figure and a column a system measured here."""
    rows = leaderboard(results)
    table = Table(title="Full-Duplex-Bench v1, mean [95 % interval]; published: arXiv 2606.11167", title_justify="left")
    for title in ("figure", "published Moshi", "published PersonaPlex", *(r.name for r in rows if not r.published)):
        table.add_column(title)
    by_name = {row.name: row for row in rows}
    for index, column in enumerate(columns(results)):
        ours = [row.cells[index] for row in rows if not row.published]
        arrow = "\u2191" if column.better > 0 else "\u2193"
        published = [by_name[name].cells[index] for name in ("Moshi", "PersonaPlex")]
        table.add_row(f"{column.title} {arrow}", *published, *ours)
    return table


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The leaderboard as a Markdown table, a line a system."""
    shown = columns(results)
    titles = [f"{column.title} {'↑' if column.better > 0 else '↓'}" for column in shown]
    lines = [f"| system | {' | '.join(titles)} |", f"|{'---|' * (len(shown) + 1)}"]
    for row in leaderboard(results):
        name = " ".join(row.name.split()).replace("|", "\\|")
        lines.append(f"| {name}{' (published)' if row.published else ''} | {' | '.join(row.cells)} |")
    return "\n".join(lines) + "\n"
