import math
from typing import ClassVar

import numpy as np
import pytest

from envs import InputError
from rewards import EarlyScores, RewardAxis, RewardFunction, RewardSpec
from rewards.aggregate import added_up


def test_the_sum_leaves_out_axes_without_a_score(episode):
    function = RewardFunction({"turn_taking": RewardSpec(2.0), "pause_handling": RewardSpec(0.5)})
    episodes = [
        episode("turn_taking", [(10.3, 12)], user_turn_end=10.0),
        episode("pause_handling", [(5, 7)]),
        episode("user_interruption"),
    ]
    scores = function(episodes)
    assert scores[0]["pause_handling"] is None
    # 2.0 x -0.3; 0.5 x -1; no axis at all.
    assert [function.total(row) for row in scores] == pytest.approx([-0.6, -0.5, 0.0])
    values = function.values(scores)
    np.testing.assert_allclose(values["turn_taking"], [-0.3, math.nan, math.nan])
    np.testing.assert_allclose(values["pause_handling"], [math.nan, -1.0, math.nan])
    assert function([]) == []


def test_the_mean_total_leaves_out_what_was_not_judged(episode):
    function = RewardFunction({"turn_taking": RewardSpec(2.0), "repetition": RewardSpec(1.0)})
    episodes = [episode("turn_taking", [(10.3, 12)], user_turn_end=10.0), episode("pause_handling"),
                episode("turn_taking", [(10.5, 12)], user_turn_end=10.0)]  # fmt: skip
    scores = function(episodes)
    # Turns -0.3 and -0.5, twice; no axis says anything of the pause but repetition (0).
    assert function.mean_total(episodes, scores) == pytest.approx(-1.6 / 3)
    assert function.mean_total(episodes, scores) == pytest.approx(np.mean([function.total(row) for row in scores]))
    scores[2]["turn_taking"] = None  # could not be judged
    assert function.mean_total(episodes, scores) == pytest.approx(-1.2 / 3)
    assert function.mean_total([], []) == 0.0


def test_a_spec_reads_options_beside_weight_and_target():
    spec = RewardSpec.from_config({"weight": 0.5, "yield_weight": 1.0, "advantage_eps": 0.3})
    assert spec == RewardSpec(0.5, None, {"yield_weight": 1.0}, 0.3)
    function = RewardFunction({"user_interruption": spec, "turn_taking": RewardSpec()})
    assert function.axes["user_interruption"].yield_weight == 1.0
    assert function.advantage_eps == {"user_interruption": 0.3, "turn_taking": 1e-4}
    assert RewardSpec.from_config(None) == RewardSpec()


def test_wrong_configurations():
    with pytest.raises(InputError, match="no reward axis is configured"):
        RewardFunction({})
    with pytest.raises(InputError, match="unknown reward axis 'humour'"):
        RewardFunction({"humour": RewardSpec()})
    for weight in ("much", math.nan, True):
        with pytest.raises(InputError, match="'backchannel': `weight` must be a finite number"):
            RewardFunction({"backchannel": RewardSpec(weight)})
    for eps in (0, "little", math.inf):
        with pytest.raises(InputError, match="'backchannel': `advantage_eps` must be a positive number"):
            RewardFunction({"backchannel": RewardSpec(advantage_eps=eps)})


def test_scores_that_come_in_batches_go_to_their_own_places(episode):
    function = RewardFunction({"turn_taking": RewardSpec()})
    episodes = [episode("turn_taking", [(10.0 + 0.1 * i, 12.0)], user_turn_end=10.0) for i in range(4)]
    early = EarlyScores(function)
    for rows in ([3, 0], [2, 1]):  # long dialogues first, as `rollout` plays them
        early.add(rows, [episodes[row] for row in rows])
    assert [row["turn_taking"].value for row in early.finish()] == pytest.approx([0.0, -0.1, -0.2, -0.3])


@pytest.mark.parametrize("where", ["begin", "score"])
def test_what_an_axis_raises_says_whose_it_is(where, episode):
    def forgotten(self, episodes):
        raise KeyError("x")

    function = RewardFunction({"turn_taking": RewardSpec()})
    function.axes = {"mine": type("Mine", (RewardAxis,), {"name": "mine", where: forgotten})()}
    with pytest.raises(KeyError) as raised:
        function([episode("turn_taking")])
    assert raised.value.__notes__ == [f"in `{where}` of reward axis 'mine'"]


def test_figures_are_added_up_and_means_weighted():
    class Counting(RewardAxis):
        name = "counting"
        given: ClassVar = {"calls": np.int64(2), "share": (np.float32(1.0), 4), "none": (0, 0)}

        def metrics(self):
            return self.given

    function = RewardFunction({"turn_taking": RewardSpec()})
    function.axes["counting"] = Counting()
    other = {"counting/calls": 3.0, "counting/share": (4.0, 4.0), "counting/rate": (2.0, 1.0)}
    found = added_up([function.figures(), {}, other])
    assert found == {"counting/calls": 5.0, "counting/share": 0.625, "counting/rate": 2.0}
    assert function.metrics() == {"counting/calls": 2.0, "counting/share": 0.25}
    assert all(type(value) is float for value in function.metrics().values())
    for wrong in ("many", None, (1, 2, 3), [1, 2]):
        Counting.given = {"share": wrong}
        with pytest.raises(
            ValueError, match="reward axis 'counting': the figure 'share' of `metrics` must be a number"
        ):
            function.metrics()
