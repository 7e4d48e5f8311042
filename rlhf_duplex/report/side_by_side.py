"""For the script of a comparison page: two of its runs side by side, all numbers as they are written."""

import json
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from rlhf_duplex.evaluation.effects import aligned, crossed_effect
from rlhf_duplex.report.comparable import scored_otherwise
from rlhf_duplex.report.effect_table import MIN_SEGMENTS, SCORED_OTHERWISE, TOO_FEW, Metric, effect_cell, metric_title
from rlhf_duplex.report.labels import label, number
from rlhf_duplex.report.runs import Comparison, Result, column_of, mean_of

ALL_PAIRS_RUNS = 60  # of more, all pairs would be megabytes of page and minutes of tests
BASELINE_RUNS = 10  # that every run of so many is held against


def script_data(comparison: Comparison, metrics: Sequence[Metric]) -> Markup:
    """By metric: its title, the mean of each card's run, and of each two cards the second minus the first.

    The test is that of the table of effects, so that two runs cannot differ there and not here: every pair is tested
    beforehand, and the script rounds nothing. `pairs[i][j]` is of the cards i < j (`report.cards.run_cards`), where
    `chosen_pairs` has them.
    """
    finished = comparison.finished
    results: list[Result] = [run.after for run in finished]
    results += [run.before for run in finished if run.before is not None][:1]
    pairs = chosen_pairs(comparison, len(results))
    otherwise = {(i, j): scored_otherwise([results[i]], [results[j]]) for i, j in pairs}
    rows = []
    for metric in metrics:
        means = [mean_of(result, *metric) for result in results]
        texts = ["\u2013" if mean is None else number(mean, label(*metric).unit) for mean in means]
        values = aligned([column_of(result, *metric) for result in results])
        found: dict[int, dict[int, list[str] | str]] = {}
        for i, j in pairs:
            apart = metric[1] == "reward" and metric[0] in otherwise[i, j]
            found.setdefault(i, {})[j] = SCORED_OTHERWISE if apart else _pair(metric, values[j] - values[i])
        rows.append({"title": metric_title(metric), "means": texts, "pairs": found})
    text = json.dumps(rows, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def chosen_pairs(comparison: Comparison, cards: int) -> list[tuple[int, int]]:
    """The cards i < j that are held against each other.

    All; of more than `ALL_PAIRS_RUNS` runs those with one of the baseline's (the first `BASELINE_RUNS` of them) or with
    the policy before training, so that the page and its making grow with the runs and not with their square.
    """
    finished = comparison.finished
    chosen = set(range(cards))
    if len(finished) > ALL_PAIRS_RUNS:
        base = [index for index, run in enumerate(finished) if run.condition == comparison.baseline]
        chosen = {*base[:BASELINE_RUNS], *range(len(finished), cards)}
    return [(i, j) for i in range(cards) for j in range(i + 1, cards) if i in chosen or j in chosen]


def untested(comparison: Comparison) -> str:
    """What stands in place of the difference of two runs that `chosen_pairs` leaves out; empty where it has all."""
    finished = comparison.finished
    if len(finished) <= ALL_PAIRS_RUNS:
        return ""
    base = len(comparison.of(comparison.baseline))
    which = comparison.baseline if base <= BASELINE_RUNS else f"{comparison.baseline}'s first {BASELINE_RUNS} runs"
    before = " or before training" if any(run.before is not None for run in finished) else ""
    return f"tested only against {which}{before}"


def _pair(metric: Metric, differences: np.ndarray) -> list[str] | str:
    """Difference, both ends of its interval, p, segments and verdict, as words; or why there is none."""
    shared = differences[np.isfinite(differences)]
    effect = crossed_effect(shared[None]) if len(shared) >= MIN_SEGMENTS else None
    if effect is None:
        return TOO_FEW
    cell = effect_cell(*metric, effect, effect.p)
    unit = label(*metric).unit
    ends = [number(end, unit, signed=True) for end in (effect.low, effect.high)]
    return [cell["difference"], *ends, cell["p"], cell["segments"], cell["verdict"]]
