from dataclasses import replace
from pathlib import Path

import pytest

from envs import Segment
from rewards import LeftOut
from rlhf_duplex.cluster.roles import Played, all_left_out, make_units

SEGMENT = Segment("s", "turn_taking", Path("d.wav"), 1, 0.0, 8.0, {})


def groups_of(sizes, seconds=None):
    """Segments of groups of these sizes, the first is the longest."""
    return [
        replace(SEGMENT, id=f"s{group}", end=(seconds or 20.0 - group))
        for group, size in enumerate(sizes)
        for _ in range(size)
    ]


def units_of(sizes, batch_size, workers, seconds=None):
    segments = groups_of(sizes, seconds)
    count = len(segments)
    return make_units(segments, list(range(count)), [0.0] * count, batch_size, workers)


def sides(units):
    """How many user's sides are made in all, where each worker makes its own."""
    return sum(len({segment.id for segment in unit.segments}) for unit in units)


@pytest.mark.parametrize(
    ("sizes", "workers", "made"),
    [
        ([16] * 32, 32, 32),  # the paper's: a group a worker
        ([8] * 12, 2, 12),
        ([8] * 12, 8, 16),  # eight whole groups, and four in halves
        ([16] * 8, 32, 32),  # each group on four workers
        ([12] * 3, 1, 3),
    ],
)
def test_a_group_is_played_by_as_few_workers_as_keep_all_busy(sizes, workers, made):
    units = units_of(sizes, 0, workers)
    assert sides(units) == made
    assert {len(unit.places) for unit in units} == {sum(sizes) // workers}
    assert sorted(place for unit in units for place in unit.places) == list(range(sum(sizes)))


@pytest.mark.parametrize("sizes", [[12, 12, 12, 3], [1] * 7, [5], [3, 1, 1]])
@pytest.mark.parametrize("batch_size", [0, 1, 4, 16])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_episode_is_played_once_in_units_that_fit(sizes, batch_size, workers):
    units = units_of(sizes, batch_size, workers)
    assert sorted(place for unit in units for place in unit.places) == list(range(sum(sizes)))
    segments = groups_of(sizes)
    for unit in units:
        assert 0 < len(unit.places) <= (batch_size or -(-sum(sizes) // workers))
        assert [segments[place] for place in unit.places] == list(unit.segments)
        assert unit.seeds == unit.places


def test_what_workers_could_not_score_is_added_up():
    down, hurt = LeftOut(2, 4, ("status 401",)), LeftOut(1, 4, ("status 401", "no transcript"))
    played = [Played((), [], [], left_out=left) for left in ({"content": down}, {}, {"content": hurt})]
    assert str(all_left_out(played)["content"]) == (
        "3 of 8 episodes could not be judged and are left out (status 401; no transcript)"
    )
    assert not LeftOut(3, 100).many
    assert str(LeftOut(3, 100)).endswith("left out")


def test_workers_get_like_lengths_side_by_side():
    units = units_of([1] * 6, 0, 2)
    assert [[segment.end for segment in unit.segments] for unit in units] == [[20, 18, 16], [19, 17, 15]]


def test_groups_of_one_segment_with_other_contexts_are_apart():
    segments = [replace(SEGMENT, start=4.0)] * 4
    units = make_units(segments, [0, 1, 2, 3], [1.0, 1.0, 0.5, 0.5], 0, 2)
    assert [unit.contexts for unit in units] == [(1.0, 1.0), (0.5, 0.5)]
