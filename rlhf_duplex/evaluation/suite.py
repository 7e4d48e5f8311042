"""Playing the held-out segments: episodes and their scores, the same user and the same seeds for every policy."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.episode import Episode
from envs.files import file_name, replacing, write_text
from envs.segments import Segment
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import EarlyScores, RewardFunction
from rewards.axis import Score
from rewards.details import finite
from rlhf_duplex.config import Config, EvaluationConfig
from rlhf_duplex.evaluation.distributions import backchannel_timing
from rlhf_duplex.evaluation.metrics import read_results, segment_values, write_results
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import episode_seed, rollout

Scores = Mapping[str, Score | None]


def suite_episodes(
    segments: Sequence[Segment], samples: int = 1, seed: int = 1, part: Sequence[Segment] | None = None
) -> tuple[list[Segment], list[int], list[float]]:
    """What the suite plays: `samples` episodes of every segment, without context, as segments, seeds and contexts.

    A segment's episodes depend on (seed, place in the suite, sample) alone, so that two policies meet the same draws,
    and so does a `part` of the suite that is played by itself.
    """
    places = {segment.id: place for place, segment in enumerate(segments)}
    played = segments if part is None else part
    chosen = [segment for segment in played for _ in range(samples)]
    seeds = [episode_seed(seed, places[segment.id], sample) for segment in played for sample in range(samples)]
    return chosen, seeds, [0.0] * len(chosen)


def play_suite(
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    reward_function: RewardFunction,
    segments: Sequence[Segment],
    samples: int = 1,
    seed: int = 1,
    batch_size: int = 256,
    on_frame: Callable[[int], None] | None = None,
) -> tuple[list[Episode], list[Scores]]:
    """The episodes of `suite_episodes`, and what each axis says of them."""
    chosen, seeds, contexts = suite_episodes(segments, samples, seed)
    scores = EarlyScores(reward_function)
    episodes = rollout(
        policy, env, chosen, seeds, contexts, batch_size=batch_size, on_frame=on_frame, on_batch=scores.add
    )
    return episodes, list(scores.finish())


def evaluate_policy(
    run_dir: Path,
    name: str,
    policy: MoshiPolicy,
    env: DuplexDialogueVectorEnv,
    reward_function: RewardFunction,
    segments: Sequence[Segment],
    evaluation: EvaluationConfig,
    batch_size: int,
    extra: Mapping[str, Any],
    on_frame: Callable[[int], None] | None = None,
    recorded: Sequence[Segment] = (),
) -> dict[str, Any]:
    """Play the suite, and `record_suite`."""
    episodes, scores = play_suite(
        policy, env, reward_function, segments, evaluation.samples, evaluation.seed, batch_size, on_frame
    )
    figures = reward_function.metrics()
    return record_suite(run_dir, name, episodes, scores, evaluation, figures, extra, recorded)


def record_suite(
    run_dir: Path,
    name: str,
    episodes: Sequence[Episode],
    scores: Sequence[Scores],
    evaluation: EvaluationConfig,
    figures: Mapping[str, float],
    extra: Mapping[str, Any],
    recorded: Sequence[Segment] = (),
) -> dict[str, Any]:
    """Write `evaluation/NAME.json` (with `extra` in it) and the episodes that the report shows.

    `recorded` are segments whose agents' words are held to be words, see `segment_values`.
    """
    folder = run_dir / "evaluation"
    extra = {**extra, "samples": evaluation.samples, "timing": backchannel_timing(episodes)}
    extra |= {"figures": dict(figures)} if figures else {}
    save_examples(folder / name, episodes, scores, evaluation.episodes)
    # Last: where this file is, the evaluation is whole.
    return write_results(folder / f"{name}.json", segment_values(episodes, scores, recorded), extra)


def take_before(config: Config, run_dir: Path) -> dict[str, Any]:
    """The result `evaluation.before` and the episodes beside it, copied to the run folder in place of playing them.

    That it is a result of the same is checked by `rlhf_duplex.inputs.load_inputs`.
    """
    source = Path(config.evaluation.before or "")
    record = read_results(source)
    folder = run_dir / "evaluation"
    if source.with_suffix("").is_dir():
        shutil.copytree(source.with_suffix(""), folder / "before", dirs_exist_ok=True)
    with replacing(folder / "before.json") as temporary:  # last, and whole: it says that the evaluation is there
        shutil.copyfile(source, temporary)
    return record


def put_aside(run_dir: Path, name: str) -> None:
    """Name a result of an earlier end, and its episodes, after the update that it is of: the run goes on.

    Where `evaluate` has measured that update since, its result stands for both.
    """
    result = run_dir / "evaluation" / f"{name}.json"
    if not result.is_file():
        return
    update = int(read_results(result).get("update", 0))
    episodes, new = result.with_suffix(""), result.with_name(f"step_{update:06d}.json")
    if new.exists():
        shutil.rmtree(episodes, ignore_errors=True)
        result.unlink()
        return
    if episodes.is_dir():
        shutil.rmtree(new.with_suffix(""), ignore_errors=True)
        os.rename(episodes, new.with_suffix(""))
    os.rename(result, new)  # last: until then it is done again


def save_examples(folder: Path, episodes: Sequence[Episode], scores: Sequence[Scores], per_axis: int) -> None:
    """The first `per_axis` segments' episodes of every axis, each in a folder of its id with `scores.json` beside."""
    shutil.rmtree(folder, ignore_errors=True)
    kept: dict[str, set[str]] = {}
    for episode, row in zip(episodes, scores, strict=True):
        ids = kept.setdefault(episode.segment.axis, set())
        if episode.segment.id in ids or len(ids) >= per_axis:
            continue
        ids.add(episode.segment.id)
        place = folder / file_name(episode.segment.id)
        episode.save(place)
        record = {axis: {"value": s.value, "details": finite(s.details)} for axis, s in row.items() if s is not None}
        write_text(place / "scores.json", json.dumps(record, ensure_ascii=False, allow_nan=False))
