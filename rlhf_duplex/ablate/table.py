"""The tidy table of an ablation: one row a trial and metric, as CSV and Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from envs.errors import InputError
from envs.files import replacing
from rlhf_duplex.ablate.plan import Plan, condition_values
from rlhf_duplex.ablate.trial import Record, read_record
from rlhf_duplex.evaluation.metrics import change_interval, read_results

FIRST = ["trial", "condition", "seed", "axis", "metric", "before", "after", "low", "high", "n"]
FIRST += ["difference", "difference_low", "difference_high"]


def trial_rows(name: str, condition: str, seed: int, overrides: Mapping[str, Any], evaluation: Path) -> list[dict]:
    """The rows of a finished trial.

    `before` and `after` are means over segments, `low` and `high` the 95 % interval of `after` over its `n` segments,
    `difference` after minus before, paired by segment. A key that varies is a column of its own.

    Raises:
        InputError: a result is damaged.
    """
    after = read_results(evaluation / "after.json")
    before_path = evaluation / "before.json"
    before = read_results(before_path) if before_path.is_file() else {"axes": {}}
    rows = []
    for axis, metrics in after["axes"].items():
        for metric, estimate in metrics.items():
            difference = change_interval(before, after, axis, metric)
            rows.append(
                {
                    "trial": name,
                    "condition": condition,
                    "seed": seed,
                    "axis": axis,
                    "metric": metric,
                    "before": before["axes"].get(axis, {}).get(metric, {}).get("mean"),
                    "after": estimate["mean"],
                    "low": estimate["low"],
                    "high": estimate["high"],
                    "n": estimate["n"],
                    "difference": difference.mean if difference else None,
                    "difference_low": difference.low if difference else None,
                    "difference_high": difference.high if difference else None,
                    **{key: _cell(value) for key, value in overrides.items()},
                }
            )
    return rows


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def make_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of all trials as a table; a column in which numbers and words are mixed holds words."""
    table = pd.DataFrame(list(rows)) if rows else pd.DataFrame(columns=FIRST)
    for column in table.columns[len(FIRST) :]:
        kinds = {type(value) for value in table[column] if not (value is None or value != value)}
        if len(kinds) > 1 and not kinds <= {int, float}:
            table[column] = [None if value is None or value != value else str(value) for value in table[column]]
    return table


def write_table(table: pd.DataFrame, folder: Path, name: str = "table") -> list[Path]:
    """Write NAME.csv and NAME.parquet, each whole or not at all."""
    paths = [folder / f"{name}.csv", folder / f"{name}.parquet"]
    for path in paths:
        try:
            with replacing(path) as temporary:
                if path.suffix == ".csv":
                    table.to_csv(temporary, index=False, errors="replace")
                else:
                    table.to_parquet(temporary, index=False)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error})") from error
    return paths


def plan_tables(plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of all finished trials, and one of all trials with what became of each."""
    values = condition_values(plan)
    rows, states = [], []
    for trial in plan.trials:
        record = read_record(plan.run_dir, trial.name)
        evaluation = Path(trial.config.run_dir) / "evaluation"
        finished = (evaluation / "after.json").is_file()
        name = trial.condition.name
        if finished:
            rows += trial_rows(trial.name, name, trial.seed, values[name], evaluation)
        states.append(_state(trial.name, name, trial.seed, record, finished))
    return make_table(rows), pd.DataFrame(states)


def _state(name: str, condition: str, seed: int, record: Record, finished: bool) -> dict[str, Any]:
    status = "done" if finished else "not run" if record.status in ("open", "done") else record.status
    why = f"{record.kind}: {record.why}" if record.kind and not finished else ""
    return {
        "trial": name,
        "condition": condition,
        "seed": seed,
        "status": status,
        "attempts": record.attempts,
        "minutes": round(record.seconds / 60, 2),
        "why": why,
    }
