import numpy as np
import pytest

from envs import ContextSchedule, InputError
from envs.frames import frame_at, frames_in, samples_in


def test_limit_rises_linearly_and_stays_within_the_training():
    schedule = ContextSchedule(max_seconds=30.0)
    assert [schedule.limit(p) for p in (-1.0, 0.0, 0.25, 1.0, 2.0)] == [0.0, 0.0, 7.5, 30.0, 30.0]
    assert ContextSchedule(max_seconds=30.0, schedule="constant").limit(0.0) == 30.0


def test_about_half_of_the_draws_get_context_within_the_limit():
    rng = np.random.default_rng(0)
    drawn = np.array([ContextSchedule().draw(rng, 0.5) for _ in range(2000)])
    # Binomial(2000, 0.5) has a standard deviation of 22; U[0, 15] has the mean 7.5 (standard error 0.14 of 1000).
    assert abs((drawn > 0).sum() - 1000) < 110
    assert drawn.max() <= 15.0
    assert abs(drawn[drawn > 0].mean() - 7.5) < 0.7


def test_the_stream_of_random_numbers_does_not_depend_on_the_outcome():
    never, always = np.random.default_rng(3), np.random.default_rng(3)
    ContextSchedule(probability=0.0).draw(never, 1.0)
    ContextSchedule(probability=1.0).draw(always, 1.0)
    assert never.random() == always.random()


def test_wrong_schedules_are_refused():
    with pytest.raises(InputError, match="context schedule 'cosine' is not known"):
        ContextSchedule(schedule="cosine")
    with pytest.raises(InputError, match="0 <= probability <= 1"):
        ContextSchedule(probability=1.5)


def test_frames_and_seconds():
    # 12.5 frames a second: 0.24 s are 3 frames (not 4 by rounding error); 0.25 s need a fourth.
    assert frames_in(0.24, 12.5) == 3
    assert frames_in(0.25, 12.5) == 4
    assert frame_at(0.24, 12.5) == 3
    assert frame_at(0.2399, 12.5) == 2
    assert samples_in(0.08, 24000) == 1920
