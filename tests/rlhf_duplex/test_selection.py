from collections import Counter
from pathlib import Path

import pytest

from envs.errors import InputError
from rlhf_duplex.data.criteria import Candidate
from rlhf_duplex.data.recordings import Recording, Side
from rlhf_duplex.data.selection import Found, held_out_recordings, spread


def corpus(counts):
    """Candidates from (recording, user's speaker, how many)."""
    found = []
    for name, speaker, count in counts:
        recording = Recording(name, (Side(Path(name), 0, speaker), Side(Path(name), 1, "other")))
        found += [Found(recording, 0, Candidate("turn_taking", 10.0 * n, 10.0 * n + 5, {})) for n in range(count)]
    return found


COUNTS = [("r0", "ann", 50), ("r1", "ann", 2), ("r2", "bob", 3), ("r3", "eve", 1)]


def test_every_speaker_before_any_a_second_time_and_every_recording_of_theirs():
    chosen = spread(corpus(COUNTS), 3, seed=0)
    assert Counter(item.speaker for item in chosen) == {"ann": 1, "bob": 1, "eve": 1}
    chosen = spread(corpus(COUNTS), 9, seed=0)
    # 1 of eve, 3 of bob, the rest of ann: 2 of r1 and 3 of r0, taken in turn.
    assert Counter(item.recording.id for item in chosen) == {"r3": 1, "r2": 3, "r1": 2, "r0": 3}


def test_the_choice_depends_on_the_seed_and_on_nothing_else():
    found = corpus(COUNTS)
    ids = [item.id for item in spread(found, 9, seed=0)]
    assert ids == [item.id for item in spread(found[::-1], 9, seed=0)]
    assert len({tuple(item.id for item in spread(found, 9, seed=seed)) for seed in range(5)}) == 5
    assert sorted(item.id for item in spread(found, 1000, seed=3)) == sorted(item.id for item in found)


def test_the_choice_is_a_random_one():
    # Of 50 alike, each of 400 seeds takes one: all but a few are taken at some time (50 * (49/50)^400 = 0.02 missing).
    taken = {spread(corpus([("r0", "ann", 50)]), 1, seed=seed)[0].id for seed in range(400)}
    assert len(taken) >= 48


def test_no_recording_comes_twice_in_a_round_before_the_others_have_come():
    # Four speakers, two in each recording: of any two that are chosen, one is of each.
    items = []
    for name in ("r0", "r1"):
        recording = Recording(name, tuple(Side(Path(name), side, f"{name}-{side}") for side in (0, 1)))
        items += [Found(recording, side, Candidate("turn_taking", 1.0, 6.0, {})) for side in (0, 1)]
    for seed in range(10):
        assert {item.recording.id for item in spread(items, 2, seed)} == {"r0", "r1"}


def recordings_of(*speakers):
    return [
        Recording(f"r{number}", tuple(Side(Path(f"r{number}"), side, name) for side, name in enumerate(both)))
        for number, both in enumerate(speakers)
    ]


def test_nobody_is_a_user_on_both_sides():
    # r0 to r2 hang together by bob and eve, r3 and r4 stand alone.
    recordings = recordings_of(("ann", "bob"), ("bob", "eve"), ("eve", "dan"), ("kim", "lee"), ("mia", "noa"))
    seen = set()
    for seed in range(20):
        held = held_out_recordings(recordings, (0, 1), 0.2, seed)
        assert held in ({"r3"}, {"r4"})  # one of five: the three that hang together are too many
        assert held == held_out_recordings(recordings[::-1], (0, 1), 0.2, seed)
        seen.add(frozenset(held))
        assert held_out_recordings(recordings, (0, 1), 0.6, seed) in ({"r0", "r1", "r2"}, {"r3", "r4"})
    assert len(seen) == 2
    assert held_out_recordings(recordings[:4], (0, 1), 0.1, 0) == {"r3"}  # none fits: the smallest
    # Where only channel 0 is the user, eve of r1 is an agent.
    assert {len(held_out_recordings(recordings, (0,), 0.2, seed)) for seed in range(20)} == {1}


def test_recordings_that_all_share_a_user_cannot_be_parted():
    recordings = recordings_of(("ann", "clerk"), ("bob", "clerk"), ("eve", "clerk"))
    with pytest.raises(InputError, match=r"--heldout 0\.1: the 3 recordings cannot be parted"):
        held_out_recordings(recordings, (0, 1), 0.1, 0)
    assert len(held_out_recordings(recordings, (0,), 0.1, 0)) == 1
