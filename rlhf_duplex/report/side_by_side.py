"""For the script of a comparison page: two of its runs side by side, all numbers as they are written."""

import json
from collections.abc import Sequence

from markupsafe import Markup

from rlhf_duplex.evaluation.effects import crossed_effect, paired_table
from rlhf_duplex.report.comparable import scored_otherwise
from rlhf_duplex.report.effect_table import MIN_SEGMENTS, SCORED_OTHERWISE, TOO_FEW, Metric, effect_cell, metric_title
from rlhf_duplex.report.labels import label, number
from rlhf_duplex.report.runs import Comparison, Result, column_of, mean_of


def script_data(comparison: Comparison, metrics: Sequence[Metric]) -> Markup:
    """By metric: its title, the mean of each card's run, and of each two cards the second minus the first.

    The test is that of the table of effects, so that two runs cannot differ there and not here: every pair is tested
    beforehand, and the script rounds nothing. `pairs[i][j - i - 1]` is of the cards i < j (`report.cards.run_cards`).
    """
    finished = comparison.finished
    results: list[Result] = [run.after for run in finished]
    results += [run.before for run in finished if run.before is not None][:1]
    rows = []
    for metric in metrics:
        means = [mean_of(result, *metric) for result in results]
        texts = ["\u2013" if mean is None else number(mean, label(*metric).unit) for mean in means]
        pairs = [[_pair(metric, left, right) for right in results[i + 1 :]] for i, left in enumerate(results)]
        rows.append({"title": metric_title(metric), "means": texts, "pairs": pairs})
    text = json.dumps(rows, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _pair(metric: Metric, left: Result, right: Result) -> list[str] | str:
    """Difference, both ends of its interval, p, segments and verdict, as words; or why there is none."""
    axis, name = metric
    if name == "reward" and axis in scored_otherwise([left], [right]):
        return SCORED_OTHERWISE
    table = paired_table({0: column_of(right, *metric)}, {0: column_of(left, *metric)})
    effect = crossed_effect(table) if table.shape[1] >= MIN_SEGMENTS else None
    if effect is None:
        return TOO_FEW
    cell = effect_cell(axis, name, effect, effect.p)
    unit = label(*metric).unit
    ends = [number(end, unit, signed=True) for end in (effect.low, effect.high)]
    return [cell["difference"], *ends, cell["p"], cell["segments"], cell["verdict"]]
