"""The page of `evaluate`: checkpoints side by side, their distributions, and the worst cases to look at and hear."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from envs.errors import InputError
from envs.files import write_text
from rlhf_duplex.evaluation.cases import Case, load_cases
from rlhf_duplex.evaluation.comparison import compare, rows
from rlhf_duplex.evaluation.full_duplex_bench.leaderboard import columns, leaderboard
from rlhf_duplex.report.distributions import distribution_charts
from rlhf_duplex.report.labels import axis_title, interval, label, number
from rlhf_duplex.report.timeline import audio_uri, timeline_svg, user_words, words_are_cut

MAX_AUDIO_BYTES = 6_000_000
_SIGNS = {"better": "\u2713", "worse": "\u2717", "no change": "=", "changed": "\u2260", "too few segments": "?"}
_TITLES = {
    "fdb-v1": "Full-Duplex-Bench v1",
    "fdb-v1.5": "Full-Duplex-Bench v1.5",
    "live": "Live dialogues",
    "questions": "Spoken questions",
    "safety": "Safety",
}


def build_systems_page(out: Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `out/report.html` from results by system and the cases in `out/cases/NAME/`; it loads nothing from
    elsewhere.

    Raises:
        InputError: a case is damaged, or the page cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("rlhf_duplex.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    suite = next(iter(results.values())).get("suite", "")
    page = environment.get_template("systems.html").render(
        name=f"{_TITLES.get(suite, suite)}: {', '.join(results)}",
        facts=_facts(results),
        notes=_notes(results),
        systems=list(results),
        official=_official_title(results),
        axes=_axes(results),
        leaderboard=leaderboard(results) if suite == "fdb-v1" else [],
        leaderboard_columns=columns(results) if suite == "fdb-v1" else [],
        charts=distribution_charts(results),
        cases=_cases(out, list(results)),
    )
    path = out / "report.html"
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"report {path} cannot be written ({error})") from error
    return path


def _facts(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    facts = []
    for name, result in results.items():
        source = result.get("checkpoint") or result.get("outputs") or ""
        lead_in = result.get("lead_in_seconds")
        said = "" if lead_in is None else f", lead-in {lead_in:g} s"
        facts.append((name, f"{source}{said}"))
    first = next(iter(results.values()))
    keys = (("Data", "data"), ("Samples", "samples"), ("Transcripts", "transcripts"))
    facts += [(title, str(first[key])) for title, key in keys if first.get(key) is not None]
    judge = first.get("judge")
    return [*facts, ("Judge", str(judge["model"]))] if judge else facts


def _notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    lead_ins = {r.get("lead_in_seconds") for r in results.values() if r.get("lead_in_seconds") is not None}
    if len(lead_ins) > 1:
        notes.append("The systems were played with different lead-ins, which alone moves these figures.")
    if any(result.get("human_timing") is False for result in results.values()):
        notes.append("There is no JS distance: people's backchannel timing (icc_gt_distribution.json) was not given.")
    return notes


def _official_title(results: Mapping[str, Mapping[str, Any]]) -> str:
    if any("corrected" in result for result in results.values()):
        return "corrected"
    return "as the official scripts have it" if any("official" in result for result in results.values()) else ""


def _axes(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table: for each axis its title and a row a metric, with a cell a system."""
    against = compare(results)
    table: dict[str, list[dict[str, Any]]] = {}
    names = list(results)
    for axis, metric in rows(results):
        words = label(axis, metric)
        cells = []
        for name in names:
            estimate = results[name]["axes"].get(axis, {}).get(metric)
            beside = (results[name].get("official") or results[name].get("corrected") or {"axes": {}})["axes"]
            other = beside.get(axis, {}).get(metric)
            test = against.get((name, axis, metric))
            cells.append(
                {
                    "mean": number(estimate["mean"], words.unit) if estimate else "\u2013",
                    "interval": interval(estimate["low"], estimate["high"], words.unit) if estimate else "",
                    "n": str(estimate["n"]) if estimate else "",
                    "other": number(other["mean"], words.unit) if other else "",
                    "word": test.word if test else "",
                    "sign": _SIGNS.get(test.word, "") if test else "",
                    "kind": test.word.split(" ")[0] if test else "",
                    "p": _p(test.corrected if test else None),
                    "difference": number(test.difference, words.unit, signed=True) if test else "",
                }
            )
        table.setdefault(axis, []).append({"name": words.name, "meaning": words.meaning, "cells": cells})
    return [{"title": axis_title(axis), "rows": found} for axis, found in table.items()]


def _p(corrected: float | None) -> str:
    """`, p 0.012`; empty where there was no test."""
    if corrected is None:
        return ""
    return ", p < 0.001" if corrected < 0.001 else f", p {corrected:.3f}"


def _cases(out: Path, names: list[str]) -> list[dict[str, Any]]:
    """The worst cases of every system, those of an axis together, the worst first, as many as the page can hold.

    Where not all have room, the worst of every system and axis come before the second worst of any.
    """
    found = [(name, case) for name in names for case in load_cases(out / "cases" / name)]
    axes = list(dict.fromkeys(case.axis for _, case in found))
    found.sort(key=lambda pair: (axes.index(pair[1].axis), -pair[1].badness, pair[1].name))
    before: Counter[tuple[str, str]] = Counter()
    ranks = []
    for name, case in found:
        ranks.append(before[name, case.axis])
        before[name, case.axis] += 1
    shown: dict[int, dict[str, Any]] = {}
    size = 0
    for index in sorted(range(len(found)), key=lambda index: ranks[index]):
        record = _case(index, *found[index])
        size += len(record["audio"])
        if size > MAX_AUDIO_BYTES:
            break
        shown[index] = record
    return [shown[index] for index in sorted(shown)]


def _case(index: int, system: str, case: Case) -> dict[str, Any]:
    episode = case.episode
    words = [("User", user_words(episode)), ("Agent", episode.text)]
    return {
        "axis": axis_title(case.axis),
        "name": case.name,
        "system": system,
        "why": case.why,
        "svg": timeline_svg(episode, {}, episode.duration, f"c{index}"),
        "audio": audio_uri(episode),
        "words": [(who, text) for who, text in words if words_are_cut(text)],
    }
