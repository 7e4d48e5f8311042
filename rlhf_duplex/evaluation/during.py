"""Evaluation during training: a part of the held-out suite after every so many updates, in the process itself."""

import time
from typing import Any

from rlhf_duplex.evaluation.metrics import axis_metrics, segment_values, write_results
from rlhf_duplex.evaluation.suite import play_suite


def evaluate_during(trainer: Any, update: int) -> dict[str, float]:
    """The metrics of the first `evaluation.every_limit` held-out segments of each axis, where it is their turn.

    Draws and users are those of the evaluation before and after, so that the figures of a run form a curve; what
    training draws is not touched. Writes `evaluation/update_NNNNNN.json`.

    Args:
        trainer: a `Trainer`.
        update: updates that are done.

    Returns:
        `evaluation/AXIS/METRIC`, and `time/evaluation` in seconds; empty where it is not their turn.
    """
    evaluation = trainer.config.evaluation
    if not evaluation.every or update % evaluation.every:
        return {}
    from rlhf_duplex.trainer import first_of_each

    started = time.perf_counter()
    segments = first_of_each(trainer.inputs.held_out, evaluation.every_limit)
    episodes, scores = play_suite(
        trainer.policy,
        trainer.env,
        trainer.inputs.reward_function,
        segments,
        1,
        evaluation.seed,
        trainer.config.rollout.batch_size,
    )
    trainer.inputs.reward_function.metrics()  # the judge's counts of this are not training's
    values = segment_values(episodes, scores, [*trainer.inputs.segments, *trainer.inputs.held_out])
    path = trainer.run_dir / "evaluation" / f"update_{update:06d}.json"
    extra = {"update": update, "lead_in_seconds": trainer.config.context.lead_in, "samples": 1}
    write_results(path, values, extra)
    figures = {
        f"evaluation/{axis}/{metric}": estimate.mean
        for axis, metrics in axis_metrics(values).items()
        for metric, estimate in metrics.items()
    }
    return figures | {"time/evaluation": time.perf_counter() - started}
