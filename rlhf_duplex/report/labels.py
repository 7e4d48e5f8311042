"""What axes and metrics are called in the report, what they mean, and how their numbers are written."""

from collections.abc import Mapping
from typing import NamedTuple


class Label(NamedTuple):
    """A metric in words: its name, its unit (empty for a pure number) and what it measures."""

    name: str
    unit: str
    meaning: str


AXIS_TITLES: dict[str, str] = {
    "pause_handling": "Pause handling",
    "turn_taking": "Turn-taking",
    "backchannel": "Backchannel",
    "user_interruption": "User interruption",
    "content": "Content",
    "overlap": "Overlap",
    "repetition": "Repetition",
    "words": "Words",
    "pause_handling_candor": "Pause handling, Candor",
    "pause_handling_synthetic": "Pause handling, synthetic",
    "user_backchannel": "User's backchannel",
    "talking_to_other": "Talking to somebody else",
    "background_speech": "Background speech",
    "speech_quality": "Speech quality",
    "live": "Live dialogues",
    "questions": "Spoken questions",
    "safety": "Safety",
    "fluency": "Fluency",
}

_LABELS: dict[tuple[str, str], Label] = {
    ("pause_handling", "reward"): Label("reward", "", "\u22121 for agent speech longer than 1 s, else 0"),
    ("pause_handling", "takeover_rate"): Label("takeover rate", "%", "episodes with agent speech longer than 1 s"),
    ("turn_taking", "reward"): Label("reward", "s", "minus the distance of the agent's turn from the user's turn end"),
    ("turn_taking", "takeover_rate"): Label("takeover rate", "%", "episodes where the agent takes the turn at its end"),
    ("turn_taking", "latency"): Label("latency", "s", "from the user's turn end to the agent's turn, where taken"),
    ("turn_taking", "barge_in_rate"): Label("barge-in rate", "%", "episodes where the agent takes the turn too early"),
    ("backchannel", "reward"): Label("reward", "", "F1 of the agent's backchannels against the true ones"),
    ("backchannel", "takeover_rate"): Label("takeover rate", "%", "episodes with agent speech longer than 1 s"),
    ("backchannel", "f1"): Label("F1", "", "backchannels within 1 s of a true one, one to one"),
    ("backchannel", "frequency"): Label("frequency", "/s", "backchannels a second; neither direction is better"),
    ("backchannel", "jsd"): Label("JS distance", "", "of their timing to the true ones', 0.2 s bins; 1 for none"),
    ("user_interruption", "reward"): Label("reward", "s", "minus the time from the interruption's end to the answer"),
    ("user_interruption", "takeover_rate"): Label("answer rate", "%", "episodes with an answer after the interruption"),
    ("user_interruption", "latency"): Label("latency", "s", "from the interruption's end to the answer, if any"),
    ("pause_handling_candor", "takeover_rate"): Label("takeover rate", "%", "samples in which the agent takes over"),
    ("pause_handling_synthetic", "takeover_rate"): Label("takeover rate", "%", "samples in which the agent takes over"),
    ("user_interruption", "rating"): Label("rating", "", "0 to 5 by a language model, where the turn was taken"),
    ("user_interruption", "stop_latency"): Label("stop latency", "s", "length of the overlaps of user and agent"),
    ("user_interruption", "response_latency"): Label("response latency", "s", "from the user's end to the agent"),
    ("speech_quality", "mos"): Label("predicted MOS", "", "1 to 5, of the agent's speech without its silences"),
    ("fluency", "reward"): Label("reward", "s", "minus the seconds a turn that the user waits or is talked over"),
    ("live", "answer_rate"): Label("turns answered", "%", "of the user's turns, before the user goes on"),
    ("live", "barge_in_rate"): Label("barge-ins", "", "agent turns that begin within a turn of the user, a turn"),
    ("live", "seconds_lost"): Label("seconds lost", "s", "a turn: waiting for an answer, or talked over"),
    ("live", "gap"): Label("gap", "s", "from the user's end to the answer, where it comes after it"),
    ("live", "floor_transfer_offset"): Label("floor-transfer offset", "s", "answer minus end; below 0 an overlap"),
    ("live", "overlap"): Label("overlap", "%", "of the user's speech, under agent turns"),
    ("live", "backchannels_per_minute"): Label("backchannels", "/min", "a minute of the user's speech"),
    ("live", "yield_rate"): Label("yields", "%", "interrupted, the agent is silent within 1 s"),
    ("live", "stop_seconds"): Label("time to stop", "s", "from the interruption to the agent's silence"),
    ("live", "user_yields"): Label("the user gives up", "", "times a dialogue, talked over for 1.2 s"),
    ("questions", "accuracy"): Label("accuracy", "%", "an accepted answer stands in what is said"),
    ("questions", "answered"): Label("answered", "%", "something was said"),
    ("safety", "refusal_rate"): Label("refusal rate", "%", "of the requests that were answered, by the judge"),
    ("safety", "answered"): Label("answered", "%", "something was said"),
    ("words", "known"): Label("known words", "%", "the agent's words that recorded agents say"),
    ("words", "known_pairs"): Label("known pairs", "%", "its neighbouring words that are neighbours there too"),
    ("words", "repeated_4grams"): Label("repeated 4-grams", "%", "of its words, in one episode"),
}

_ORDER = ("reward", "takeover_rate", "barge_in_rate", "latency", "f1", "frequency", "jsd")


def axis_title(axis: str) -> str:
    """The axis as a heading; an axis that is not built in keeps its own name."""
    return AXIS_TITLES.get(axis, axis)


def label(axis: str, metric: str) -> Label:
    """The words for a metric; one that is not known keeps its own name."""
    return _LABELS.get((axis, metric), Label(metric.replace("_", " "), "", ""))


def ordered(metrics: Mapping[str, object]) -> list[str]:
    """Metric names, the reward first, unknown ones last."""
    return sorted(metrics, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def with_options(options: Mapping[str, object]) -> str:
    """`with barge_in_seconds 4, prompt_seconds 0.4`; empty where there are none."""
    return "with " + ", ".join(f"{key} {value}" for key, value in options.items()) if options else ""


def number(value: float, unit: str = "", signed: bool = False) -> str:
    """A value with its unit: two decimals (three for pure numbers), a true minus sign, shares as percent.

    A difference of shares (`signed`) is in percentage points.
    """
    if unit == "%":
        text = f"{100 * value:+.0f}" if signed else f"{100 * value:.0f}"
        unit = unit if not signed else "point" if abs(float(text)) == 1 else "points"
    else:
        digits = 2 if unit == "s" else 3
        text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    suffix = "" if not unit else f" {unit}" if unit != "/s" else "/s"
    return text.replace("-", "\u2212") + suffix


def interval(low: float, high: float, unit: str = "", signed: bool = False) -> str:
    """`low to high`, with the unit once."""
    bare = number(low, unit, signed).removesuffix("/s").partition(" ")[0]
    return f"{bare} to {number(high, unit, signed)}"
