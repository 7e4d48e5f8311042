"""What axes say of their own work is the same in this process and on Ray's."""

import logging

import pytest
import ray
from cluster_runs import updates, write_inputs

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
