"""Evaluation during training: a part of the held-out suite after every so many updates, between two of them.

It is the first `evaluation.every_limit` held-out segments of each axis. Draws and users are those of the evaluation
before and after, so that the figures of a run form a curve; what training draws is not touched.
"""

from pathlib import Path

from rlhf_duplex.evaluation.metrics import axis_metrics, write_results


def record_during(
    run_dir: Path, update: int, values: dict[str, dict[str, dict[str, float]]], lead_in: float
) -> dict[str, float]:
    """Write `evaluation/update_NNNNNN.json`; gives `evaluation/AXIS/METRIC` for the log.

    Args:
        run_dir: of the run.
        update: updates that are done.
        values: of `segment_values`.
        lead_in: seconds of silence before the segments.
    """
    path = run_dir / "evaluation" / f"update_{update:06d}.json"
    write_results(path, values, {"update": update, "lead_in_seconds": lead_in, "samples": 1})
    return {
        f"evaluation/{axis}/{metric}": estimate.mean
        for axis, metrics in axis_metrics(values).items()
        for metric, estimate in metrics.items()
    }
