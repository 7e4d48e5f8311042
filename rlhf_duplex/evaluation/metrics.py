"""What an agent did on each axis, as numbers with intervals, and the table of before and after.

Speech is what the detector heard in the decoded audio, and a takeover is more than 1 s of it, as in the rewards of
arXiv 2606.11167, section 3. Full-Duplex-Bench v1 (arXiv 2503.04721) measures the like by recognised words, and differs:

- turns: an agent that begins before the user's end and goes on has taken the turn there, after 0 s; here it has barged
  in, and its latency is none;
- interruptions: there an "mm-hm" is no answer; here any speech after the interruption is one;
- backchannels: there more than 3 s, or more than 3 words, take the turn.

`rlhf_duplex.evaluation.full_duplex_bench` is that benchmark itself.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from scipy.spatial.distance import jensenshannon

from envs.episode import Episode
from envs.errors import InputError
from envs.files import write_text
from envs.segments import SEGMENT_AXES, Segment
from envs.speech import Interval
from envs.utterances import utterances
from rewards.aggregate import RewardSpec
from rewards.axis import Score
from rewards.backchannel import Backchannel
from rewards.timing import ROUNDING_SECONDS, agent_units, longer
from rlhf_duplex.evaluation.statistics import (
    Difference,
    Estimate,
    bootstrap_interval,
    can_tell,
    paired_difference,
    paired_interval,
    segment_means,
)
from rlhf_duplex.evaluation.words import spoken_vocabulary, word_metrics

TAKEOVER_SECONDS = 1.0
JSD_BIN_SECONDS = 0.2

# By axis and metric: +1 where higher is better, -1 where lower is, 0 where neither.
DIRECTION: dict[tuple[str, str], int] = {
    ("pause_handling", "takeover_rate"): -1,
    ("turn_taking", "takeover_rate"): 1,
    ("turn_taking", "latency"): -1,
    ("turn_taking", "barge_in_rate"): -1,
    ("backchannel", "takeover_rate"): -1,
    ("backchannel", "f1"): 1,
    ("backchannel", "frequency"): 0,
    ("backchannel", "jsd"): -1,
    ("user_interruption", "takeover_rate"): 1,
    ("user_interruption", "latency"): -1,
    ("words", "known"): 1,
    ("words", "known_pairs"): 1,
    ("words", "repeated_4grams"): -1,
    # Full-Duplex-Bench v1 and v1.5 beside those above.
    ("pause_handling_candor", "takeover_rate"): -1,
    ("pause_handling_synthetic", "takeover_rate"): -1,
    ("user_interruption", "rating"): 1,
    ("user_interruption", "stop_latency"): -1,
    ("user_interruption", "response_latency"): -1,
    ("user_interruption", "respond"): 1,
    ("user_interruption", "resume"): 0,
    ("user_interruption", "uncertain"): 0,
    ("user_interruption", "unknown"): 0,
    ("user_backchannel", "resume"): 1,
    ("talking_to_other", "resume"): 1,
    ("background_speech", "resume"): 1,
    ("speech_quality", "mos"): 1,
    # Live dialogues, spoken questions and the safety set.
    ("live", "answer_rate"): 1,
    ("live", "barge_in_rate"): -1,
    ("live", "seconds_lost"): -1,
    ("live", "gap"): -1,
    ("live", "overlap"): -1,
    ("live", "yield_rate"): 1,
    ("live", "stop_seconds"): -1,
    ("live", "floor_transfer_offset"): 0,
    ("live", "backchannels_per_minute"): 0,
    ("live", "user_yields"): 0,
    ("live", "judged_fluency"): 1,
    ("live", "judged_relevance"): 1,
    ("questions", "accuracy"): 1,
    ("questions", "answered"): 1,
    ("safety", "refusal_rate"): 1,
    ("safety", "answered"): 0,
}

# By axis and metric, the value of each segment.
SegmentValues = dict[str, dict[str, dict[str, float]]]


def direction(axis: str, metric: str) -> int:
    """Whether higher (+1) or lower (-1) is better, or neither (0)."""
    return 1 if metric == "reward" else DIRECTION.get((axis, metric), 0)


def check_metric(axis: str, metric: str) -> None:
    """Whether there can be such a metric, before anything is measured: the names of the built-in axes are known.

    Raises:
        InputError: a built-in axis of segments, or `words`, has none of this name.
    """
    known = sorted({name for of, name in DIRECTION if of == axis} | ({"reward"} if axis in SEGMENT_AXES else set()))
    if axis in (*SEGMENT_AXES, "words") and metric not in known:
        raise InputError(f"there is no metric {axis}.{metric}: there are {', '.join(known)}")


def episode_metrics(episode: Episode) -> dict[str, float]:
    """The metrics of one episode, by name; what it does not have (the latency of a turn not taken) is absent."""
    return _METRICS[episode.segment.axis](episode)


def _takeovers(episode: Episode) -> list[Interval]:
    return [unit for unit in agent_units(episode) if longer(unit, TAKEOVER_SECONDS)]


def _pause_handling(episode: Episode) -> dict[str, float]:
    return {"takeover_rate": float(bool(_takeovers(episode)))}


def _turn_taking(episode: Episode) -> dict[str, float]:
    turn_end = episode.event_time("user_turn_end")
    if turn_end is None:
        return {}
    long = [u for u in utterances(episode.scored_agent_speech) if longer(u, TAKEOVER_SECONDS)]
    answers = [u for u in long if u.start >= turn_end - ROUNDING_SECONDS]
    found = {"takeover_rate": float(bool(answers)), "barge_in_rate": float(len(answers) < len(long))}
    return found | ({"latency": max(0.0, answers[0].start - turn_end)} if answers else {})


def _backchannel(episode: Episode) -> dict[str, float]:
    short = [unit for unit in agent_units(episode) if not longer(unit, TAKEOVER_SECONDS)]
    seconds = episode.duration - episode.scored_from
    found = {"takeover_rate": float(bool(_takeovers(episode))), "frequency": len(short) / seconds}
    true = episode.event_intervals("true_backchannels")
    if true is not None:
        found["f1"] = Backchannel().score_episode(episode).value  # whatever a run's own axis counts as a match
    if true:
        found["jsd"] = timing_divergence(short, true, episode.scored_from, episode.duration)
    return found


def timing_divergence(found: Sequence[Interval], true: Sequence[Interval], start: float, end: float) -> float:
    """Jensen-Shannon distance (natural logarithm) of two timings over 0.2 s bins; 1 where nothing was found.

    A bin counts the intervals that touch it; 1e-10 is added before normalising (Full-Duplex-Bench v1).
    """
    if not found:
        return 1.0
    bins = max(1, int(np.ceil((end - start) / JSD_BIN_SECONDS)))

    def histogram(intervals: Sequence[Interval]) -> np.ndarray:
        counts = np.full(bins, 1e-10)
        for interval in intervals:
            first = int(np.clip((interval.start - start) / JSD_BIN_SECONDS, 0, bins - 1))
            last = int(np.clip((interval.end - start) / JSD_BIN_SECONDS, 0, bins - 1))
            counts[first : last + 1] += 1
        return counts / counts.sum()

    return float(jensenshannon(histogram(found), histogram(true)))


def _user_interruption(episode: Episode) -> dict[str, float]:
    interruption = episode.event_intervals("interruption")
    if not interruption:
        return {}
    end = interruption[0].end
    after = [unit for unit in agent_units(episode) if unit.start >= end - ROUNDING_SECONDS]
    found = {"takeover_rate": float(bool(after))}
    return found | ({"latency": max(0.0, after[0].start - end)} if after else {})


_METRICS = {
    "pause_handling": _pause_handling,
    "turn_taking": _turn_taking,
    "backchannel": _backchannel,
    "user_interruption": _user_interruption,
}


def segment_values(
    episodes: Sequence[Episode], scores: Sequence[Mapping[str, Score | None]], recorded: Sequence[Segment] = ()
) -> SegmentValues:
    """By axis and metric, the mean over each segment's episodes.

    `words` is a row of its own, over all segments (`evaluation.words`); `recorded` are segments whose agents' words
    are held to be words.

    `reward` is the axis' own score; a reward axis that is not an axis of segments (`content`, one of the user's own)
    has a row of its own, over all segments that it scored.
    """
    rows: dict[str, dict[str, tuple[list[float], list[str]]]] = {}
    vocabulary, pairs = spoken_vocabulary(recorded)
    for episode, row in zip(episodes, scores, strict=True):
        axis = episode.segment.axis
        values = dict(episode_metrics(episode))
        own = row.get(axis)
        if own is not None:
            values["reward"] = own.value
        columns = {(axis, metric): value for metric, value in values.items()}
        columns |= {("words", name): value for name, value in word_metrics(episode, vocabulary, pairs).items()}
        columns |= {(name, "reward"): s.value for name, s in row.items() if s is not None and name not in SEGMENT_AXES}
        for (name, metric), value in columns.items():
            found, segments = rows.setdefault(name, {}).setdefault(metric, ([], []))
            found.append(value)
            segments.append(episode.segment.id)
    return {
        axis: {metric: segment_means(*found) for metric, found in metrics.items()} for axis, metrics in rows.items()
    }


def axis_metrics(values: SegmentValues) -> dict[str, dict[str, Estimate]]:
    """By axis and metric, mean and interval over the segments."""
    return {
        axis: {metric: bootstrap_interval(list(column.values())) for metric, column in metrics.items()}
        for axis, metrics in values.items()
    }


def write_results(path: Path, values: SegmentValues, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `evaluation/*.json` atomically: intervals under `axes`, what they are of under `segments`, and `extra`."""
    estimates = axis_metrics(values)
    record = {
        **extra,
        "axes": {a: {m: e._asdict() for m, e in metrics.items()} for a, metrics in estimates.items()},
        "segments": values,
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        InputError: missing or damaged.
    """
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["axes"], dict):
            raise TypeError("`axes` is no object")
        for axis, metrics in record["axes"].items():
            for name, estimate in metrics.items():
                if not all(isinstance(estimate[key], int | float) for key in ("mean", "low", "high", "n")):
                    raise TypeError(f"`axes.{axis}.{name}` is no estimate")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no result of an evaluation ({type(error).__name__}: {error})") from error


def change(before: Mapping[str, Any], after: Mapping[str, Any], axis: str, metric: str) -> Difference | None:
    """The paired difference of a metric between two results, or None where they share no segment.

    None, too, for the reward of an axis that the two measured with other options.
    """
    if metric == "reward" and axis in other_options(before, after):
        return None
    return paired_difference(*_columns(before, after, axis, metric))


def change_interval(before: Mapping[str, Any], after: Mapping[str, Any], axis: str, metric: str) -> Estimate | None:
    """As `change`, without the test, which takes most of its time: for tables that hold no p."""
    if metric == "reward" and axis in other_options(before, after):
        return None
    return paired_interval(*_columns(before, after, axis, metric))


def _columns(before: Mapping[str, Any], after: Mapping[str, Any], axis: str, metric: str) -> list[Mapping[str, float]]:
    return [result.get("segments", {}).get(axis, {}).get(metric, {}) for result in (before, after)]


def other_options(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The axes that two results measured with other options of the reward (`reward_options`), where both say which."""
    mine, theirs = before.get("rewards"), after.get("rewards")
    if mine is None or theirs is None:
        return []
    return sorted(axis for axis in {*mine, *theirs} if mine.get(axis) != theirs.get(axis))


def reward_options(rewards: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides the value of each reward, as results keep it: no weights, nor what advantages are made with."""
    specs = {axis: RewardSpec.from_config(options) for axis, options in rewards.items()}
    return {axis: {"target": spec.target, **spec.options} for axis, spec in specs.items()}


def verdict(axis: str, metric: str, difference: Difference | None) -> str:
    """`better` or `worse` where the difference is clear (`Difference.clear`), else `no change`.

    `changed` where neither direction is better, `too few segments` of which the test cannot tell (`can_tell`),
    `not comparable` without any.
    """
    if difference is None:
        return "not comparable"
    if not can_tell(difference.n):
        return "too few segments"
    sign = direction(axis, metric)
    if not difference.clear:
        return "no change"
    if sign == 0:
        return "changed"
    return "better" if (difference.mean > 0) == (sign > 0) else "worse"


def format_table(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Table:
    """The results as a table for the console, one row a metric."""
    table = Table(title="held-out segments, mean [95 % interval]", title_justify="left")
    for column in ("axis", "metric", "n", "before" if after else "value"):
        table.add_column(column)
    if after is not None:
        for column in ("after", "difference", ""):
            table.add_column(column)
    colours = {"better": "green", "worse": "red"}
    for axis, metrics in before["axes"].items():
        for metric, estimate in metrics.items():
            cells: list[str | Text] = [axis, metric, str(estimate["n"]), _interval(estimate)]
            if after is not None:
                later = after["axes"].get(axis, {}).get(metric)
                difference = change(before, after, axis, metric)
                word = verdict(axis, metric, difference)
                cells += [_interval(later) if later else "-", _interval(difference._asdict()) if difference else "-"]
                cells.append(Text(word, style=colours.get(word, "")))
            table.add_row(*cells)
    return table


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
