"""Backchannel: does the agent say its "mm-hm" where the recorded person did, and no more?"""

from collections.abc import Sequence
from dataclasses import dataclass

from envs.episode import Episode
from envs.errors import InputError
from envs.speech import Interval
from rewards.axis import RewardAxis, Score, register_axis
from rewards.timing import ROUNDING_SECONDS, agent_units, as_pairs, check_options, longer


@register_axis
@dataclass
class Backchannel(RewardAxis):
    """F1 of the agent's backchannels against the true ones (arXiv 2606.11167, section 3, rewards).

        r = 2 TP / (2 TP + FP + FN)

    - A generated speech interval (an inter-pausal unit of the agent, silences < 0.2 s joined) of at most
      `backchannel_seconds` is a backchannel; a longer one is a takeover and counts as a false positive.
    - A generated and a true backchannel match if their *starts* are at most `tolerance` seconds apart (inclusive; the
      paper says "within 1 s" and not of what). Matching is one to one, greedy in time order.
    - TP: matched pairs; FP: unmatched backchannels and takeovers; FN: unmatched true ones.
    - Nothing true and nothing generated: 1; one of the two sides empty: 0 (the paper does not say).

    The true ones are the event `true_backchannels`, which `envs.complete_events` reads off the recording where the
    manifest lacks it.

    Details: `takeover`, counts `true_positives`, `false_positives`, `false_negatives`, and `[[start, end], ...]` of
    the generated intervals: `matched`, `unmatched`, `takeovers`.

    Attributes:
        backchannel_seconds: the longest backchannel (paper: 1 s).
        tolerance: the largest distance of two matching starts (paper: 1 s).
    """

    backchannel_seconds: float = 1.0
    tolerance: float = 1.0

    name = "backchannel"
    applies_to = ("backchannel",)

    def __post_init__(self) -> None:
        check_options(self)

    def score_episode(self, episode: Episode) -> Score:
        true = episode.event_intervals("true_backchannels")
        if true is None:
            raise InputError(
                f"reward axis '{self.name}': segment '{episode.segment.id}' has no event `true_backchannels`: "
                "add it to the manifest, or let envs.complete_events find it in the recording"
            )
        units = agent_units(episode)
        takeovers = [unit for unit in units if longer(unit, self.backchannel_seconds)]
        short = [unit for unit in units if unit not in takeovers]
        matched = match_in_time_order(short, true, self.tolerance)
        hits, false_alarms, missed = len(matched), len(units) - len(matched), len(true) - len(matched)
        counted = 2 * hits + false_alarms + missed
        details = {
            "takeover": bool(takeovers),
            "true_positives": hits,
            "false_positives": false_alarms,
            "false_negatives": missed,
            "matched": as_pairs(matched),
            "unmatched": as_pairs(unit for unit in short if unit not in matched),
            "takeovers": as_pairs(takeovers),
        }
        return Score(2 * hits / counted if counted else 1.0, details)


def match_in_time_order(generated: Sequence[Interval], true: Sequence[Interval], tolerance: float) -> list[Interval]:
    """The generated intervals that have a true one of their own with a start at most `tolerance` seconds away.

    Walking both in time order and pairing the earliest two that fit gives the largest possible number of pairs.
    """
    matched = []
    waiting = sorted(true)
    for interval in sorted(generated):
        while waiting and waiting[0].start < interval.start - tolerance - ROUNDING_SECONDS:
            waiting.pop(0)  # too early for this one, and so for all that come later
        if waiting and waiting[0].start <= interval.start + tolerance + ROUNDING_SECONDS:
            waiting.pop(0)
            matched.append(interval)
    return matched
