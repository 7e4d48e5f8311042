"""Any number of systems side by side: a row a metric, and whether each differs from the first."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from rlhf_duplex.evaluation.metrics import direction
from rlhf_duplex.evaluation.statistics import LEVEL, can_tell, holm, permutation_test


class Against(NamedTuple):
    """A system against the first: the paired difference, p, p corrected for all tests of the table, n, and a word.

    `corrected` is None where so few segments cannot tell: that is no test, and is not counted among them.
    """

    difference: float
    p: float
    corrected: float | None
    n: int
    word: str


def compare(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str, str], Against]:
    """By (system, axis, metric), every system but the first against the first, by the paired permutation test.

    `better` or `worse` where p, corrected by Holm over all tests that were made, is below 0.05; `too few segments`
    where so few cannot tell; `no change` else. Metrics that the two share no segment of are absent.

    Args:
        results: by name, as `write_results` writes them.
    """
    names = list(results)
    tests = {}
    for name in names[1:]:
        for axis, metrics in results[name]["segments"].items():
            for metric, after in metrics.items():
                before = results[names[0]]["segments"].get(axis, {}).get(metric, {})
                test = permutation_test(before, after)
                if test is not None:
                    tests[name, axis, metric] = test
    asked = [key for key, test in tests.items() if can_tell(test.n)]
    corrected = dict(zip(asked, holm([tests[key].p for key in asked]), strict=True))
    found = {}
    for key, test in tests.items():
        _, axis, metric = key
        p = corrected.get(key)
        sign = direction(axis, metric)
        word = "no change"
        if p is None:
            word = "too few segments"
        elif p < LEVEL:
            word = "changed" if sign == 0 else "better" if (test.difference > 0) == (sign > 0) else "worse"
        found[key] = Against(test.difference, test.p, p, test.n, word)
    return found


def as_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """All figures for the console: mean, 95 % interval and n; where official figures stand beside, these too."""
    table = Table(title="mean [95 % interval] n; p: paired permutation test against the first", title_justify="left")
    names = list(results)
    official = any("official" in result or "corrected" in result for result in results.values())
    table.add_column("axis")
    table.add_column("metric")
    for name in names:
        table.add_column(name)
        if official:
            kind = "corrected" if "corrected" in results[name] else "official script"
            table.add_column(f"{name}, {kind}")
    if len(names) > 1:
        table.add_column("against the first")
    against = compare(results)
    for axis, metric in rows(results):
        cells = []
        for name in names:
            cells.append(cell(results[name]["axes"].get(axis, {}).get(metric)))
            if official:
                other = results[name].get("official") or results[name].get("corrected") or {"axes": {}}
                cells.append(cell(other["axes"].get(axis, {}).get(metric), short=True))
        if len(names) > 1:
            found = [(name, against[name, axis, metric]) for name in names[1:] if (name, axis, metric) in against]
            cells.append("; ".join(f"{_of(name, names)}{_said(test)}" for name, test in found))
        table.add_row(axis, metric, *cells)
    return table


def _said(test: Against) -> str:
    return test.word if test.corrected is None else f"{test.word}, p {test.corrected:.3f}"


def _of(name: str, names: list[str]) -> str:
    return f"{name} " if len(names) > 2 else ""


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every (axis, metric) that some result has, in the order in which they first appear."""
    return list(dict.fromkeys((axis, m) for r in results.values() for axis, row in r["axes"].items() for m in row))


def cell(estimate: Mapping[str, float] | None, short: bool = False) -> str:
    """An estimate in a cell; `-` where there is none."""
    if estimate is None:
        return "-"
    if short:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] {estimate['n']}"
