"""Parts side by side on the cores."""

import threading

import pytest
import torch

from envs.cores import cores, map_on_cores, one_core_operations

CPU = torch.device("cpu")


def test_results_come_in_the_order_of_the_parts_from_as_many_threads_as_cores(monkeypatch):
    monkeypatch.setattr("envs.cores.cores", lambda: 2)
    both = threading.Barrier(2, timeout=60)  # passed only where two parts are under way at once
    seen = set()

    def work(part):
        if part < 2:
            both.wait()
        seen.add(threading.get_ident())
        return part * 10, torch.get_num_threads()

    assert list(map_on_cores(work, range(5), CPU)) == [(part * 10, 1) for part in range(5)]
    assert len(seen) == 2


def test_an_error_in_a_part_reaches_the_caller_and_threads_are_put_back(monkeypatch):
    monkeypatch.setattr("envs.cores.cores", lambda: 2)
    before = torch.get_num_threads()

    def work(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        list(map_on_cores(work, [0, 1], CPU))
    with one_core_operations(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("wanted", "expected"), [("1", 1), ("0", None), ("many", None), ("", None), ("9999", None)])
def test_omp_num_threads_lowers_the_number_of_cores(monkeypatch, wanted, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    available = cores()
    assert available >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert cores() == (expected or available)
