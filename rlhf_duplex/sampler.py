"""Which segments an update trains on: a pure function of (seed, update), so that there is no state to save."""

from collections.abc import Sequence

import numpy as np

from envs.segments import Segment


def segments_of_update(
    segments: Sequence[Segment], update: int, groups: int, seed: int, axes: Sequence[str] = ()
) -> list[Segment]:
    """The segments of one update, one a group: axes in turn, within an axis every segment once before any twice.

    Args:
        segments: all that there are.
        update: number of the update, from 0.
        groups: how many to choose.
        seed: of the order.
        axes: those in turn; one that is named twice has twice the segments. Empty: all that there are, once each.
    """
    by_axis: dict[str, list[Segment]] = {}
    for segment in segments:
        by_axis.setdefault(segment.axis, []).append(segment)
    turns = sorted(axes or by_axis)
    known = sorted(set(turns))
    chosen = []
    for place in range(update * groups, (update + 1) * groups):
        cycle, turn = divmod(place, len(turns))
        axis = turns[turn]
        before = cycle * turns.count(axis) + turns[:turn].count(axis)
        rounds, index = divmod(before, len(by_axis[axis]))
        order = np.random.default_rng((seed, known.index(axis), rounds)).permutation(len(by_axis[axis]))
        chosen.append(by_axis[axis][order[index]])
    return chosen
