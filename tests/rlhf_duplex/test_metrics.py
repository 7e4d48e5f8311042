"""Metrics on timelines worked by hand. The segment is 20-30 s of its recording, after 2 s of lead-in."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import SEGMENT_AXES, Segment
from envs.speech import Interval
from rewards import Score
from rlhf_duplex.evaluation import metrics
from rlhf_duplex.evaluation.statistics import Difference, paired_difference
from rlhf_duplex.run_folder import make_console

EVENTS = {
    "pause_handling": {"pauses": [[22.0, 22.5]]},
    "turn_taking": {"user_turn_end": 25.0},  # 7.0 s in episode time
    "backchannel": {"true_backchannels": [[23.0, 23.3]]},  # 5.0 to 5.3 s
    "user_interruption": {"interruption": [24.0, 26.0]},  # 6.0 to 8.0 s
}


def episode(axis, *speech, segment_id="s", events=None):
    """An episode of 12 s whose agent speaks in the given intervals (episode time)."""
    segment = Segment(segment_id, axis, Path("a.flac"), 1, 20.0, 30.0, EVENTS[axis] if events is None else events)
    silence = np.zeros(12 * 1000, dtype=np.float32)
    return Episode(segment, silence, silence, 1000, [], [Interval(*s) for s in speech], 12.0, 2.0)


@pytest.mark.parametrize(
    ("speech", "expected"),
    [
        ([], 0.0),
        ([(4.0, 5.0)], 0.0),  # exactly a second
        ([(4.0, 5.01)], 1.0),
        ([(4.0, 4.6), (4.7, 5.3)], 1.0),  # 0.1 s of silence does not part units: 1.3 s
        ([(4.0, 4.6), (4.9, 5.5)], 0.0),  # 0.3 s does: 0.6 s each
        ([(0.0, 1.9)], 0.0),  # in the lead-in, not scored
        ([(0.5, 2.9)], 0.0),  # runs 0.9 s into the window
    ],
)
def test_pause_takeover(speech, expected):
    assert metrics.episode_metrics(episode("pause_handling", *speech)) == {"takeover_rate": expected}


@pytest.mark.parametrize(
    ("speech", "takeover", "barge_in", "latency"),
    [
        ([], 0, 0, None),
        ([(7.4, 9.0)], 1, 0, 0.4),
        ([(7.0, 8.5)], 1, 0, 0.0),  # at the turn end itself
        ([(7.4, 8.3)], 0, 0, None),  # 0.9 s take no turn
        ([(7.2, 7.8), (8.5, 9.0)], 1, 0, 0.2),  # 0.7 s of silence stay inside an utterance: 7.2 to 9.0 s
        ([(5.0, 6.5), (7.9, 9.5)], 1, 1, 0.9),  # barges in, is silent for 1.4 s, then takes the turn
        ([(6.5, 9.0)], 0, 1, None),  # talks on over the turn end
    ],
)
def test_turn_taking(speech, takeover, barge_in, latency):
    found = metrics.episode_metrics(episode("turn_taking", *speech))
    expected = {"takeover_rate": takeover, "barge_in_rate": barge_in}
    assert found == pytest.approx(expected | ({} if latency is None else {"latency": latency}))


@pytest.mark.parametrize(
    ("speech", "takeover", "latency"),
    [
        ([], 0, None),
        ([(4.0, 8.5)], 0, None),  # speech that runs through the interruption is no answer to it
        ([(4.0, 6.5), (8.3, 8.5)], 1, 0.3),
        ([(8.0, 9.0)], 1, 0.0),
    ],
)
def test_user_interruption(speech, takeover, latency):
    found = metrics.episode_metrics(episode("user_interruption", *speech))
    assert found == pytest.approx({"takeover_rate": takeover} | ({} if latency is None else {"latency": latency}))


def test_backchannel_frequency_and_takeover():
    # Two short intervals in the 10 s of the segment; one of 2 s is a takeover.
    found = metrics.episode_metrics(episode("backchannel", (3.0, 3.4), (5.0, 5.5), (8.0, 10.0)))
    assert found["frequency"] == pytest.approx(0.2)
    assert found["takeover_rate"] == 1.0


def test_timing_divergence():
    # Bins of 0.2 s: 5.0-5.3 s touches those from 5.0 and from 5.2, half of the mass each.
    true = [Interval(5.0, 5.3)]
    assert metrics.timing_divergence(true, true, 2.0, 12.0) == pytest.approx(0.0, abs=1e-6)
    assert metrics.timing_divergence([], true, 2.0, 12.0) == 1.0
    # Nothing in common: JS divergence ln 2, distance its root.
    assert metrics.timing_divergence([Interval(9.0, 9.3)], true, 2.0, 12.0) == pytest.approx(
        math.sqrt(math.log(2)), abs=1e-4
    )
    # 5.25-5.5 s touches the bins from 5.2 and 5.4. P = (1/2, 1/2, 0), Q = (0, 1/2, 1/2), M = (1/4, 1/2, 1/4):
    # KL(P|M) = 1/2 ln 2 = KL(Q|M), so the divergence is ln 2 / 2.
    assert metrics.timing_divergence([Interval(5.25, 5.5)], true, 2.0, 12.0) == pytest.approx(
        math.sqrt(math.log(2) / 2), abs=1e-4
    )


def test_metrics_without_their_event_are_absent():
    assert metrics.episode_metrics(episode("turn_taking", (7.4, 9.0), events={})) == {}
    assert metrics.episode_metrics(episode("user_interruption", (8.4, 9.0), events={})) == {}
    assert "jsd" not in metrics.episode_metrics(episode("backchannel", (3.0, 3.4), events={"true_backchannels": []}))


def results(tmp_path, name, latencies):
    """A file of results: one turn-taking episode a latency."""
    episodes = [episode("turn_taking", (7 + d, 9.5 + d), segment_id=f"s{i}") for i, d in enumerate(latencies)]
    scores = [{"turn_taking": Score(-d), "politeness": Score(0.5), "backchannel": None} for d in latencies]
    metrics.write_results(tmp_path / name, metrics.segment_values(episodes, scores), {"checkpoint": "nano"})
    return metrics.read_results(tmp_path / name)


def test_segment_values_average_within_a_segment():
    episodes = [episode("turn_taking", (7.2, 9.0)), episode("turn_taking", (7.6, 9.0)), episode("turn_taking")]
    values = metrics.segment_values(episodes, [{"turn_taking": Score(v)} for v in (-0.2, -0.6, -5.0)])
    # Two of three turns are taken, after 0.2 and 0.6 s; the third has no latency, and is not counted as 0.
    assert values["turn_taking"]["takeover_rate"]["s"] == pytest.approx(2 / 3)
    assert values["turn_taking"]["latency"]["s"] == pytest.approx(0.4)
    assert values["turn_taking"]["reward"]["s"] == pytest.approx(-5.8 / 3)


def test_scores_that_are_none_are_left_out():
    values = metrics.segment_values([episode("turn_taking", (7.2, 9.0))], [{"turn_taking": None}])
    assert "reward" not in values["turn_taking"]
    assert "latency" in values["turn_taking"]


def test_results_file_has_the_fixed_format(tmp_path):
    record = results(tmp_path, "before.json", [0.2, 0.4, 0.6])
    assert record["checkpoint"] == "nano"
    latency = record["axes"]["turn_taking"]["latency"]
    assert set(latency) == {"mean", "low", "high", "n"}
    assert latency["mean"] == pytest.approx(0.4)
    assert latency["n"] == 3
    assert record["axes"]["politeness"] == {"reward": {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3}}
    assert "backchannel" not in record["axes"]
    assert record["segments"]["turn_taking"]["latency"]["s1"] == pytest.approx(0.4)
    assert json.loads((tmp_path / "before.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["before.json"]  # no temporary file is left


@pytest.mark.parametrize("content", [None, "", "[]", '{"axes": 3}'])
def test_damaged_results_are_named(tmp_path, content):
    path = tmp_path / "before.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"before\.json is no result"):
        metrics.read_results(path)


@pytest.mark.parametrize(
    ("axis", "metric", "low", "high", "n", "p", "expected"),
    [
        ("turn_taking", "reward", 0.1, 0.3, 9, 0.01, "better"),
        ("turn_taking", "reward", -0.3, -0.1, 9, 0.01, "worse"),
        ("turn_taking", "latency", -0.3, -0.1, 9, 0.01, "better"),
        ("turn_taking", "takeover_rate", 0.1, 0.3, 9, 0.01, "better"),
        ("pause_handling", "takeover_rate", 0.1, 0.3, 9, 0.01, "worse"),
        ("backchannel", "frequency", 0.1, 0.3, 9, 0.01, "changed"),
        ("turn_taking", "reward", -0.1, 0.3, 9, 0.01, "no change"),
        ("turn_taking", "reward", 0.0, 0.3, 9, 0.01, "no change"),
        ("turn_taking", "reward", 0.1, 0.3, 5, 0.0625, "too few segments"),
        ("turn_taking", "reward", 0.1, 0.3, 6, 0.04, "better"),
        ("turn_taking", "reward", 0.1, 0.3, 9, 0.06, "no change"),  # the interval alone is too narrow
    ],
)
def test_verdict(axis, metric, low, high, n, p, expected):
    assert metrics.verdict(axis, metric, Difference((low + high) / 2, low, high, n, p)) == expected
    assert metrics.verdict(axis, metric, None) == "not comparable"


def test_equal_policies_are_seldom_called_better_or_worse():
    """Skewed values (a turn reward: mostly half a second, now and then five) of 8 segments, the same policy twice."""
    rng = np.random.default_rng(7)

    def column():
        late = rng.random(8) < 0.15
        return {f"s{i}": -float(v) for i, v in enumerate(np.where(late, rng.uniform(3, 6, 8), rng.uniform(0.2, 1, 8)))}

    found = []
    for _ in range(600):
        difference = paired_difference(column(), column())
        assert difference.clear <= (not difference.low <= 0 <= difference.high)
        found.append(metrics.verdict("turn_taking", "reward", difference) in ("better", "worse"))
    assert np.mean(found) <= 0.07


def test_names_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    made = results(tmp_path, "before.json", [1.2, 1.4, 1.9, 1.1, 1.3])
    made["axes"]["a[/b] [red]:bug:"] = made["axes"].pop("turn_taking")
    console = make_console()
    console.print(metrics.format_table(made, made))
    console.print("wrote runs/[v1]/[/x]/after.json")
    shown = capsys.readouterr().out
    assert "a[/b] [red]:bug:" in shown
    assert "wrote runs/[v1]/[/x]/after.json" in shown


def test_table_names_what_changed(tmp_path):
    before = results(tmp_path, "before.json", [1.2, 1.4, 1.9, 1.1, 1.3, 1.38])
    after = results(tmp_path, "after.json", [0.2, 0.4, 0.6, 0.2, 0.3, 0.34])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(metrics.format_table(before, after))
    rows = [line for line in console.export_text().splitlines() if "turn_taking" in line]
    # Latency: (1.2 + 1.4 + 1.9 + 1.1 + 1.3 + 1.38) / 6 = 1.38 before, 2.04 / 6 = 0.34 after.
    latency = next(row for row in rows if "latency" in row)
    assert "+1.380" in latency
    assert "+0.340" in latency
    assert "-1.040" in latency
    assert "better" in latency
    assert "no change" in next(row for row in rows if "takeover_rate" in row)
    console.print(metrics.format_table(before, None))
    assert "difference" not in console.export_text()


def test_what_is_better_for_every_timing_metric():
    lower = {
        ("pause_handling", "takeover_rate"),
        ("turn_taking", "latency"),
        ("turn_taking", "barge_in_rate"),
        ("backchannel", "takeover_rate"),
        ("backchannel", "jsd"),
        ("user_interruption", "latency"),
    }
    higher = {
        ("turn_taking", "takeover_rate"),
        ("backchannel", "f1"),
        ("user_interruption", "takeover_rate"),
        *((axis, "reward") for axis in SEGMENT_AXES),
    }
    more = Difference(0.2, 0.1, 0.3, 9, 0.01)
    assert {m for m in lower | higher if metrics.verdict(*m, more) == "worse"} == lower
    assert {m for m in lower | higher if metrics.verdict(*m, more) == "better"} == higher
    named = {m for m in metrics.DIRECTION if m[0] in SEGMENT_AXES and metrics.DIRECTION[m]}
    assert named >= (lower | higher) - {(axis, "reward") for axis in SEGMENT_AXES}


def test_f1_of_a_segment_without_true_backchannels():
    nothing = {"true_backchannels": []}
    assert metrics.episode_metrics(episode("backchannel", events=nothing))["f1"] == 1.0
    assert metrics.episode_metrics(episode("backchannel", (3.0, 3.4), events=nothing))["f1"] == 0.0
