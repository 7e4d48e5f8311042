"""The gate: what fails, what passes, and what must not pass unnoticed."""

import numpy as np
import pytest

from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.evaluation.gate import failures, parse_condition
from rlhf_duplex.evaluation.metrics import axis_metrics


def result(**columns):
    """A result whose `turn_taking` has these values by metric."""
    values = {"turn_taking": {m: {f"s{i}": float(v) for i, v in enumerate(c)} for m, c in columns.items()}}
    estimates = {a: {m: e._asdict() for m, e in row.items()} for a, row in axis_metrics(values).items()}
    return {"axes": estimates, "segments": values}


def fails(text, *results):
    return failures([parse_condition(text)], *results)


def test_thresholds():
    # The mean of 0.1 and 0.3 is 0.2; the interval is 0.1 to 0.3.
    found = result(latency=[0.1, 0.3])
    assert fails("turn_taking.latency > 0.2", found) == []
    assert fails("turn_taking.latency>=0.2", found) == [
        "turn_taking.latency>=0.2: turn_taking.latency is 0.200 (95 % [0.100, 0.300], n 2)"
    ]
    assert fails("turn_taking.latency < 2e-1", found) == []
    assert len(fails(" turn_taking.latency.high > 0.25 ", found)) == 1
    assert fails("turn_taking.latency.low > 0.15", found) == []


def test_worse_than_a_baseline():
    rng = np.random.default_rng(0)
    hard = rng.exponential(0.5, 40)
    base = result(latency=hard)
    (sentence,) = fails("turn_taking.latency worse", result(latency=hard + 0.1), base)
    assert "changed by +0.100 (p 0.000, n 40)" in sentence
    assert fails("turn_taking.latency worse", result(latency=hard - 0.1), base) == []  # better
    assert fails("turn_taking.latency worse", result(latency=hard), base) == []


def test_equal_systems_rarely_close_the_gate():
    """Both answers at stake: of 200 equal checkpoints at most 5 % are refused, though half of them are slower."""
    rng = np.random.default_rng(1)
    refused = slower = 0
    for _ in range(200):
        hard = rng.exponential(0.5, 20)
        first, second = (result(latency=hard + rng.normal(0, 0.1, 20)) for _ in range(2))
        refused += bool(fails("turn_taking.latency worse", second, first))
        slower += second["axes"]["turn_taking"]["latency"]["mean"] > first["axes"]["turn_taking"]["latency"]["mean"]
    assert refused / 200 <= 0.05
    assert 70 <= slower <= 130


def test_what_was_not_measured_does_not_pass():
    found = result(takeover_rate=[0.0, 0.0])  # no turn taken: there is no latency
    assert fails("turn_taking.latency > 0.2", found) == ["turn_taking.latency > 0.2: turn_taking.latency has no value"]
    # An agent that says no word has no axis of words; neither direction of a floor-transfer offset is better.
    for text in ("words.known < 0.9", "live.floor_transfer_offset > 0.5"):
        assert fails(text, found) == [f"{text}: {text.split()[0]} has no value"]
    found["axes"]["turn_taking"]["latency"] = {"mean": float("nan"), "low": 0.0, "high": 1.0, "n": 3}
    assert fails("turn_taking.latency > 0.2", found) == ["turn_taking.latency > 0.2: turn_taking.latency has no value"]
    other = {"axes": result(latency=[1.0])["axes"], "segments": {"turn_taking": {"latency": {"else": 1.0}}}}
    assert "shares no segment" in fails("turn_taking.latency worse", result(latency=[1.0]), other)[0]


def test_a_comparison_that_nothing_can_fail_does_not_pass():
    """Five segments or fewer: whatever happens, p is at least 2 / 2^5."""
    for count in (1, 5, 6):
        long, short = (result(latency=[value] * count) for value in (10.0, 1.0))
        (sentence,) = fails("turn_taking.latency worse", long, short)
        assert "changed by +9.0" in sentence
        assert ("too few shared segments to tell" in sentence) == (count < 6)
        assert fails("turn_taking.latency worse", short, long) == fails("turn_taking.latency worse", long, long) == []
    first, second = (
        result(reward=[value] * 9) | {"rewards": {"turn_taking": {"tolerance": value}}} for value in (1, 2)
    )
    assert "other options of the reward" in fails("turn_taking.reward worse", second, first)[0]
    assert fails("turn_taking.reward worse", first, first) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turn_taking > 0.2", "is no condition"),
        ("turn_taking.latency", "is no condition"),
        ("turn_taking.latency > fast", "is no condition"),
        ("turn_taking.latency > 0.2.1", "is no condition"),
        ("turn_taking.delay > 0.2", "no metric turn_taking.delay"),
        ("pause.latency > 0.2", "no axis 'pause'"),
        ("turn_taking.latency worse", "needs --baseline"),
    ],
)
def test_conditions_that_cannot_be_asked(text, message):
    with pytest.raises(InputError, match=message):
        fails(text, result(latency=[0.1]))


def test_a_mistyped_metric_is_said_before_anything_is_played(capsys):
    assert main(["evaluate", "checkpoint=nano", "--fail-if", "turn_taking.latncy > 0.2"]) == 2
    error = capsys.readouterr().err
    assert "no metric turn_taking.latncy: there are barge_in_rate, latency, reward, takeover_rate" in error


def test_neither_direction_is_worse():
    with pytest.raises(InputError, match="neither direction is worse"):
        fails("backchannel.frequency worse", result(latency=[0.1]), result(latency=[0.1]))


def test_gate_of_the_held_out_suite(tmp_path, capsys):
    """The whole command on nano: closed with code 3 and a reason, open with code 0, and against itself."""
    arguments = ["evaluate", "checkpoint=nano", "evaluation.limit=1", "context.lead_in=0.4", "evaluation.episodes=1"]
    gate = ["--fail-if", "turn_taking.takeover_rate >= 0", "--fail-if", "turn_taking.takeover_rate > 1"]
    assert main([*arguments, f"run_dir={tmp_path / 'one'}", *gate]) == 3
    error = capsys.readouterr().err
    assert "one fails: turn_taking.takeover_rate >= 0: turn_taking.takeover_rate is" in error
    assert "> 1" not in error
    baseline = ["--baseline", str(tmp_path / "one" / "evaluation" / "before.json")]
    worse = ["--fail-if", "turn_taking.takeover_rate worse"]
    assert main([*arguments, f"run_dir={tmp_path / 'two'}", *baseline, *worse]) == 0
    assert "1 condition(s) of --fail-if pass" in capsys.readouterr().out
    assert main([*arguments, f"run_dir={tmp_path / 'three'}", *worse]) == 2  # nothing was played for it
    assert not (tmp_path / "three").exists()


def test_the_gate_closes_at_five_percent():
    # Some worse by as much, the others equal: p is 2 / 2^5 = 0.063 of five that move, 2 / 2^6 = 0.031 of six.
    for count, closed in ((5, False), (6, True)):
        base, worse = result(latency=[0.0] * 8), result(latency=[0.1] * count + [0.0] * (8 - count))
        assert bool(fails("turn_taking.latency worse", worse, base)) is closed
