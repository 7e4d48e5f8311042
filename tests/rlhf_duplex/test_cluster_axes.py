"""What axes say of their own work is the same in this process and on Ray's."""

import logging
import traceback

import pytest
import ray
from cluster_runs import metrics, updates, write_inputs

from rlhf_duplex.checkpoint import last_checkpoint
from rlhf_duplex.cluster.local import LocalCluster
from rlhf_duplex.cluster.processes import ClusterError
from rlhf_duplex.learner import NonFiniteError

pytestmark = pytest.mark.timeout(900)  # processes are started, on a machine that may be busy
AXIS = """
from rewards import LeftOut, RewardAxis, Score


class Shy(RewardAxis):
    name = "shy"

    def __init__(self):
        self.seen = self.spoken = 0

    def score_episode(self, episode):
        self.seen += 1
        self.spoken += 3 in episode.text_tokens
        return None

    def metrics(self):
        self.now = self.seen, self.spoken
        self.seen = self.spoken = 0
        return {"seen": self.now[0], "share": (self.now[1], self.now[0])}

    def left_out(self):
        return LeftOut(self.seen, self.seen, ("status 401",))
"""


def test_figures_and_what_was_left_out(tmp_path, nano_segments, caplog):
    write_inputs(tmp_path, nano_segments)
    (tmp_path / "shy.py").write_text(AXIS)
    options = {"rewards__shy__target": tmp_path / "shy.py", "rewards__shy__weight": 0}
    alone = updates(tmp_path, tmp_path / "alone", **options)
    assert not caplog.messages  # in this process an axis says it by itself
    with caplog.at_level(logging.WARNING, "rlhf_duplex"):
        try:
            shared = updates(tmp_path, tmp_path / "shared", cluster__workers=2, **options)
        finally:
            ray.shutdown()
    for one, other in zip(alone, shared, strict=True):
        assert {k: v for k, v in one.items() if "shy/" in k} == {k: v for k, v in other.items() if "shy/" in k}
        assert other["shy/seen"] == 4.0
        assert 0 < other["shy/share"] <= 1
    assert caplog.messages == ["shy: 4 of 4 episodes could not be judged and are left out (status 401)"] * 2


FAILING = """
from pathlib import Path

from rewards import RewardAxis, Score


class Failing(RewardAxis):
    name = "failing"

    def score_episode(self, episode):
        if episode.policy_version == 2 and Path(__file__).with_name("broken").exists():
            raise KeyError("what the axis forgot")
        return Score(0.0)
"""


@pytest.mark.parametrize(("workers", "every", "ahead"), [(0, 0, 0), (0, 2, 0), (1, 0, 0), (1, 0, 1)])
def test_what_an_axis_raises_loses_no_update(tmp_path, nano_segments, workers, every, ahead):
    write_inputs(tmp_path, nano_segments)
    # Ahead it raises while the learner is at work, for as long as twelve passes take.
    (tmp_path / "failing.py").write_text(FAILING.replace("== 2", "== 1") if ahead else FAILING)
    (tmp_path / "broken").touch()
    options = {"rewards__failing__target": tmp_path / "failing.py", "trainer__updates": 3, "checkpointing__every": 9}
    options |= {"evaluation__every": every, "evaluation__every_limit": 1, "cluster__workers": workers}
    options |= {"trainer__ahead": "true", "trainer__passes": 12} if ahead else {}
    run_dir = tmp_path / "run"
    try:
        with pytest.raises((KeyError, ClusterError)) as raised:
            updates(tmp_path, run_dir, **options)
        text = "".join(traceback.format_exception(raised.value))
        assert "in `score` of reward axis 'failing'" in text
        assert last_checkpoint(run_dir).name == "step_000002"
        assert len(metrics(run_dir)) == 2
        (tmp_path / "broken").unlink()
        with (tmp_path / "failing.py").open("a") as file:
            file.write("# mended\n")  # which is no reason to refuse the resume
        resumed = updates(tmp_path, run_dir, resume="true", **options)
        if not workers:
            whole = updates(tmp_path, tmp_path / "whole", **options)
            assert [line.keys() for line in resumed] == [line.keys() for line in whole]
            assert [line["kl"] for line in resumed] == pytest.approx([line["kl"] for line in whole], rel=1e-6)
    finally:
        ray.shutdown()
    assert len(resumed) == 3


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path, nano_segments, monkeypatch):
    def lost(self, advance=None):
        raise NonFiniteError("logits are nan")

    write_inputs(tmp_path, nano_segments)
    monkeypatch.setattr(LocalCluster, "played", lost)
    with pytest.raises(NonFiniteError):
        updates(tmp_path, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").name == "step_000000"
