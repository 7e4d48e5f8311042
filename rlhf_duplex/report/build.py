"""`report.html` of a run folder: what was run, before and after on every axis, curves, and episodes to hear."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from omegaconf import OmegaConf

from envs.episode import Episode
from envs.errors import InputError
from envs.files import write_text
from envs.segments import SEGMENT_AXES
from rlhf_duplex.evaluation.metrics import change, direction, other_options, read_results, verdict
from rlhf_duplex.report.charts import interval_plot, line_chart
from rlhf_duplex.report.distributions import distribution_charts, during_charts
from rlhf_duplex.report.episodes import SavedEpisode, reward_options_of, saved_episodes
from rlhf_duplex.report.labels import axis_title, interval, label, number, ordered, with_options
from rlhf_duplex.report.preference import preference_charts, preference_rows
from rlhf_duplex.report.timeline import audio_uri, outcome, timeline_svg, user_words, words_are_cut
from rlhf_duplex.tracking import read_metrics

STAGES = ("before", "after")
EPISODES_PER_AXIS = 2
MAX_AUDIO_BYTES = 3_200_000
_SIGNS = {
    "better": "\u2713",
    "worse": "\u2717",
    "no change": "=",
    "changed": "\u2260",
    "not comparable": "\u2013",
    "too few segments": "?",
}


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write `report.html`, or `out`, from whatever the run folder holds so far; what is missing is named in the page.

    Reads `config.yaml`, `metrics.jsonl`, `evaluation/{before,after}.json` and the episodes in
    `evaluation/{before,after}/*/` (`Episode.save`, with `scores.json` beside). The page loads nothing from elsewhere.

    Raises:
        InputError: there is no such folder, it holds nothing of a run, or one of the files is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"run folder {run_dir} does not exist: give the folder that `rlhf-duplex train` wrote")
    config = _read_config(run_dir / "config.yaml")
    updates = read_metrics(run_dir / "metrics.jsonl")
    paths = {stage: run_dir / "evaluation" / f"{stage}.json" for stage in STAGES}
    results = {stage: read_results(path) if path.is_file() else None for stage, path in paths.items()}
    if not config and not updates and not any(results.values()):
        raise InputError(f"{run_dir} holds no config.yaml, metrics.jsonl or evaluation: is it a run folder?")
    examples, choice = _examples(run_dir / "evaluation")
    return write_page(
        out or run_dir / "report.html",
        "template.html",
        name=run_dir.resolve().name,
        facts=_facts(config, updates, results),
        missing=[stage for stage in STAGES if results[stage] is None],
        notes=_notes(results),
        summary=_summary(results),
        axes=_rows(results),
        has_after=results["after"] is not None,
        reward_charts=_reward_charts(updates),
        trained_on=_trained_on(config),
        during_charts=during_charts(updates),
        preference_charts=preference_charts(updates),
        preference_rows=preference_rows(updates),
        learning_charts=_learning_charts(updates),
        distributions=distribution_charts({stage: result for stage, result in results.items() if result}),
        examples=examples,
        choice=choice,
        stages=STAGES,
    )


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page from a template of this folder, whole or not at all; gives its path.

    Raises:
        InputError: it cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("rlhf_duplex.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(**values)
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"report {path} cannot be written ({error})") from error
    return path


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))  # as it is: no `${oc.env:...}`
    except Exception as error:  # YAML's and OmegaConf's errors share no base of their own
        raise InputError(f"{path} is not a configuration ({' '.join(str(error).split())})") from error
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _facts(config: Mapping, updates: Sequence[Mapping], results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as (name, value)."""

    def key(name: str) -> Any:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    before = results["before"] or results["after"] or {}
    lead_in = before.get("lead_in_seconds", key("context.lead_in"))
    unit = "Updates" if key("loss") is None else "Steps"
    seconds = sum(u["time/total"] for u in updates if _is_real(u.get("time/total")))
    planned = key("trainer.updates")
    facts = [
        ("Checkpoint", before.get("checkpoint", key("checkpoint"))),
        ("Algorithm", str(key("trainer.algorithm")).upper() if key("trainer.algorithm") else None),
        (unit, f"{len(updates)} of {planned}" if planned is not None else str(len(updates))),
        ("Groups an update", _times(key("trainer.groups"), key("trainer.group_size"))),
        ("Loss", _loss(key("loss"))),
        ("Pairs", key("pairs")),
        ("Pairs a step", key("training.batch_size")),
        ("Learning rate", key("optimiser.learning_rate") or _rates(key("optimiser.learning_rates"), key("lora.rank"))),
        ("Seed", key("seed")),
        ("Lead-in before each segment", None if lead_in is None else f"{lead_in} s of silence"),
        ("Time in updates", _duration(seconds) if seconds else None),
        ("Device", key("device")),
        ("Training segments", key("segments")),
        ("Evaluation", _suite(before)),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


_LOSS_NAMES = {"sigmoid_norm": "DPO-LN", "sigmoid": "DPO", "apo_zero": "APO-Zero", "simpo": "SimPO", "ipo": "IPO"}


def _loss(loss: Any) -> str | None:
    if not isinstance(loss, Mapping):
        return None
    name = _LOSS_NAMES.get(str(loss.get("name")), loss.get("name"))
    return (
        f"{name}, beta {loss.get('beta')}, {loss.get('streams')} stream{'' if loss.get('streams') == 'text' else 's'}"
    )


def _rates(rates: Any, rank: Any) -> str | None:
    if not isinstance(rates, Mapping):
        return None
    if rank:
        return f"{rates.get('lora')} (LoRA, rank {rank})"
    return ", ".join(f"{part} {rate:g}" for part, rate in rates.items() if part != "lora" and _is_real(rate))


def _times(groups: Any, size: Any) -> str | None:
    return None if groups is None or size is None else f"{groups} segments \u00d7 {size} episodes"


def _suite(result: Mapping[str, Any]) -> str | None:
    rows = {axis: metrics for axis, metrics in result.get("axes", {}).items() if axis in SEGMENT_AXES}
    counts = [max((e["n"] for e in metrics.values()), default=0) for metrics in rows.values()]
    if not counts:
        return None
    samples = result.get("samples", 1)
    return f"{sum(counts)} segments, {samples} episode{'s' if samples != 1 else ''} of each"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _trained_on(config: Mapping) -> str:
    """What the episodes of an update were, as the configuration has it."""
    if config.get("env") == "live":
        return "live dialogues with a user that reacts"
    context = config.get("context")
    known = context if isinstance(context, Mapping) else {}
    probability, most = known.get("probability"), known.get("max_seconds")
    if not _is_real(probability) or not _is_real(most):
        return "the training segments"
    before = f", with up to {most:g} s of context before some" if probability and most else ", without context"
    return f"the training segments{before}"


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    if any(result and result.get("on_training_segments") for result in results.values()):
        notes.append(
            "These figures were measured on the training segments, not on held-out ones: they say nothing of how well "
            "the change carries over. Set evaluation.segments to a manifest of other recordings."
        )
    elif any(result and result.get("segments_trained_on") for result in results.values()):
        count = max(result.get("segments_trained_on", 0) for result in results.values() if result)
        notes.append(f"{count} of the held-out segments are of audio that was trained on: these figures flatter.")
    before, after = results["before"], results["after"]
    if before and after and before.get("lead_in_seconds") != after.get("lead_in_seconds"):
        notes.append("Before and after were measured with different lead-ins, which alone moves these figures.")
    other = other_options(before, after) if before and after else []
    if other:
        names = ", ".join(axis_title(axis).lower() for axis in other)
        notes.append(f"Before and after scored the reward of {names} with other options: those are not compared.")
    return notes


def _summary(results: Mapping[str, Any]) -> str:
    """One sentence on the rewards of the axes."""
    before, after = results["before"], results["after"]
    if not before or not after:
        return ""
    found: dict[str, list[str]] = {}
    for axis in [axis for axis, metrics in before["axes"].items() if "reward" in metrics]:
        word = verdict(axis, "reward", change(before, after, axis, "reward"))
        found.setdefault(word, []).append(axis_title(axis).lower())
    texts = {
        "better": "improved on",
        "worse": "fell on",
        "no change": "no clear change on",
        "too few segments": "too few segments to tell on",
        "not comparable": "not comparable on",
    }
    parts = [f"{text} {', '.join(found[word])}" for word, text in texts.items() if word in found]
    return f"Reward: {'; '.join(parts)}." if parts else ""


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: for each axis its title and a row a metric."""
    before, after = results["before"], results["after"]
    known = {axis for result in (before, after) if result for axis in result["axes"]}
    axes = [a for a in SEGMENT_AXES if a in known] + sorted(known - set(SEGMENT_AXES))
    table = []
    for axis in axes:
        columns = [(result or {"axes": {}})["axes"].get(axis, {}) for result in (before, after)]
        rows = [_row(axis, metric, columns, before, after) for metric in ordered(columns[0] | columns[1])]
        table.append({"axis": axis, "title": axis_title(axis), "rows": rows})
    return table


def _row(axis: str, metric: str, columns: Sequence[Mapping], before: Any, after: Any) -> dict[str, Any]:
    words = label(axis, metric)
    told = with_options(reward_options_of(after or before or {}).get(axis, {})) if metric == "reward" else ""
    cells = [column.get(metric) for column in columns]
    difference = change(before, after, axis, metric) if before and after else None
    word = verdict(axis, metric, difference) if before and after else ""
    shown = [(e["mean"], e["low"], e["high"]) for e in cells if e]
    texts = [
        f"{stage} {number(e['mean'], words.unit)}, {interval(e['low'], e['high'], words.unit)}"
        for stage, e in zip(STAGES, cells, strict=True)
        if e
    ]
    both = cells[0] is not None and cells[1] is not None
    return {
        "name": words.name,
        "meaning": f"{words.meaning}; {told}" if told and words.meaning else told or words.meaning,
        "goal": {1: "higher is better", -1: "lower is better"}.get(direction(axis, metric), ""),
        "counts": " / ".join(dict.fromkeys(str(e["n"]) for e in cells if e)),
        "cells": [
            (number(e["mean"], words.unit), interval(e["low"], e["high"], words.unit)) if e else None for e in cells
        ],
        "plot": interval_plot(shown[0], shown[1], "; ".join(texts)) if both else "",
        "difference": (
            number(difference.mean, words.unit, signed=True),
            interval(difference.low, difference.high, words.unit, signed=True),
        )
        if difference
        else None,
        "verdict": word,
        "sign": _SIGNS.get(word, ""),
        "kind": word.split(" ")[0],
    }


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(updates: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    points = [(u["update"], u[key]) for u in updates if _is_real(u.get("update")) and _is_real(u.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def _keys(updates: Sequence[Mapping], prefix: str) -> list[str]:
    """Names behind a prefix, the four axes first."""
    names = {k.removeprefix(prefix) for u in updates for k in u if k.startswith(prefix)}
    return [a for a in SEGMENT_AXES if a in names] + sorted(names - set(SEGMENT_AXES))


def _reward_charts(updates: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    charts: list[tuple[str, Markup]] = []
    for axis in _keys(updates, "reward/"):
        unit = label(axis, "reward").unit
        title = "Weighted sum" if axis == "total" else axis_title(axis)
        curve = {axis: _curve(updates, f"reward/{axis}")}
        y_label = f"mean reward ({unit})" if unit else "mean reward"
        charts.append((title, line_chart(f"{title}, {y_label}", curve, y_label, f"r{len(charts)}")))
    return charts


_LEARNING = (
    ("kl", "KL to the reference", "nats a frame"),
    ("entropy", "Entropy of the text stream", "nats a frame"),
    ("loss", "Loss", "loss"),
    ("clip_fraction", "Clipped ratios", "share of frames"),
    ("ratio_max", "Largest ratio", "ratio"),
    ("grad_norm", "Gradient norm", "norm before clipping"),
)


def _learning_charts(updates: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    charts: list[tuple[str, Markup]] = []
    for key, title, unit in _LEARNING:
        curve = _curve(updates, key)
        if curve[0]:
            charts.append((title, line_chart(f"{title}, {unit}", {key: curve}, unit, f"l{len(charts)}")))
    groups = (
        ("frac_zero_std/", "Groups that teach nothing", "share with equal rewards"),
        ("time/", "Time of an update", "seconds"),
        ("time/worker_", "Within the rollout, mean of the workers", "seconds"),
        ("time/utilisation_", "Busy during an update", "share of its time"),
    )
    for prefix, title, unit in groups:
        # The total is that of the others, what workers do is part of the rollout, and a utilisation is no time.
        others = ("total", "worker_", "utilisation_") if prefix == "time/" else ()
        names = [name for name in _keys(updates, prefix) if not name.startswith(others)]
        curves = {axis_title(name): _curve(updates, prefix + name) for name in names}
        if curves:
            charts.append((title, line_chart(f"{title}, {unit}", curves, unit, f"l{len(charts)}")))
    return charts


def median_segments(rewards: Mapping[str, float], count: int) -> list[str]:
    """The `count` ids in the middle of the order by value (ties by id): neither the best nor the worst ones."""
    order = sorted(rewards, key=lambda segment: (rewards[segment], segment))
    first = max(0, (len(order) - count) // 2)
    return order[first : first + count]


def _examples(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The episodes that the page shows, and the sentence that says how they were chosen."""
    saved = {stage: saved_episodes(folder / stage) for stage in STAGES}
    both = bool(saved["before"]) and bool(saved["after"])
    pool = saved["before"] or saved["after"]
    rewards: dict[str, dict[str, float]] = {}
    for segment, first in pool.items():
        last = saved["after"].get(segment) if both else first
        if last is None or first.reward is None or last.reward is None:
            continue
        value = last.reward - first.reward if both else first.reward
        rewards.setdefault(first.axis, {})[segment] = value
    kept = sum(len(values) for values in rewards.values())
    if not kept:
        return [], ""
    quantity = "change in reward" if both else "reward"
    latest = saved["after"] or saved["before"]
    worst = {axis: min(values, key=lambda s: (latest[s].reward or 0.0, s)) for axis, values in rewards.items()}
    for count in range(EPISODES_PER_AXIS, 0, -1):
        chosen = [worst[axis] for axis in SEGMENT_AXES if axis in rewards]
        for axis in SEGMENT_AXES:
            others = {s: value for s, value in rewards.get(axis, {}).items() if s != worst[axis]}
            chosen += median_segments(others, count)
        examples = [_example(index, segment, saved) for index, segment in enumerate(chosen)]
        if sum(len(side["audio"]) for e in examples for side in e["sides"] if side) <= MAX_AUDIO_BYTES:
            break
    choice = (
        f"Of the {kept} segments whose episodes were kept: first the worst of each axis, then those nearest to the "
        f"median {quantity} of their axis, typical ones, not the best."
    )
    return examples, choice


def _example(index: int, segment: str, saved: Mapping[str, Mapping[str, SavedEpisode]]) -> dict[str, Any]:
    records = [saved[stage].get(segment) for stage in STAGES]
    episodes = [Episode.load(record.folder) if record else None for record in records]
    seconds = max(e.duration for e in episodes if e)
    sides: list[dict[str, Any] | None] = []
    for stage, record, episode in zip(STAGES, records, episodes, strict=True):
        if record is None or episode is None:
            sides.append(None)
            continue
        words = [("User", user_words(episode)), ("Agent", episode.text)]
        sides.append(
            {
                "stage": stage,
                "svg": timeline_svg(episode, record.scores, seconds, f"e{index}{stage}"),
                "audio": audio_uri(episode),
                "outcome": outcome(episode, record.scores),
                "words": [(who, text) for who, text in words if words_are_cut(text)],
            }
        )
    first = next(record for record in records if record)
    return {"segment": segment, "axis": axis_title(first.axis), "sides": sides}
