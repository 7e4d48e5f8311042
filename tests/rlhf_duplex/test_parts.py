"""Parts put together: nothing twice, split by dialogue, kinds balanced; and kept on disk between runs."""

from collections import Counter

import pytest
import torch

from rlhf_duplex.data.pair import Pair
from rlhf_duplex.data.parts import Part, PartStore, assemble, held_out


def pair(name, kind="interruption", content=None):
    tokens = torch.full((5, 6), len(name) if content is None else content)
    return Pair(name, kind, "train", tokens[:, :2], tokens + 1, tokens, (0, 6), (1, 6), {"why": name})


def parts(**pairs):
    return [(dialogue, Part(tuple(made))) for dialogue, made in pairs.items()]


def test_the_same_problem_is_kept_once():
    same = [pair("a", content=1), pair("b", content=1), pair("c", "content", content=1), pair("d", content=2)]
    kept, counts = assemble(parts(x=same[:1], y=same[1:]), ["x", "y"], 0.0, False, 0)
    assert [p.id for p in kept] == ["a", "c", "d"]
    assert counts == {"duplicate": 1}


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(10, 0.2, 2), (10, 0.0, 0), (3, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0)]
)
def test_so_many_dialogues_are_held_out(count, share, expected):
    names = [f"d{n}" for n in range(count)]
    held = held_out(names, share, 0)
    assert len(held) == expected
    assert held <= set(names)
    assert held_out(names[::-1], share, 0) == held


def test_a_dialogue_is_on_one_side_whatever_is_done_yet():
    names = [f"d{n}" for n in range(10)]
    made = {f"d{n}": [pair(f"d{n}-0", content=2 * n), pair(f"d{n}-1", content=2 * n + 1)] for n in range(10)}
    everything = parts(**made)
    kept, _ = assemble(everything, names, 0.3, False, 7)
    split = {p.id: p.split for p in kept}
    assert Counter(split.values()) == {"train": 14, "heldout": 6}
    assert all(split[f"{name}-0"] == split[f"{name}-1"] for name in names)
    partly, _ = assemble(everything[:4], names, 0.3, False, 7)
    assert all(split[p.id] == p.split for p in partly)


def test_kinds_are_cut_to_the_rarest():
    made = [pair(f"i{n}", content=n) for n in range(5)] + [pair(f"c{n}", "content", content=n) for n in range(2)]
    kept, counts = assemble(parts(x=made), ["x"], 0.0, True, 0)
    assert Counter(p.kind for p in kept) == {"interruption": 2, "content": 2}
    assert counts == {"cut for balance": 3}
    assert [p.id for p in kept] == [p.id for p in made if p in kept]  # in order
    again, _ = assemble(parts(x=made), ["x"], 0.0, True, 0)
    assert [p.id for p in again] == [p.id for p in kept]


def test_parts_are_kept_and_damaged_ones_made_again(tmp_path):
    store = PartStore(tmp_path / "pairs.jsonl", {"seed": 0})
    assert store.read("a") is None
    store.write("a", Part((pair("a\u2028é"),), Counter({"seen": 2}), ""))
    store.write("b", Part(error="no such file"))
    found = store.read("a")
    assert found.counts == {"seen": 2}
    assert found.pairs[0].id == "a\u2028é"
    assert found.pairs[0].chosen_span == (0, 6)
    assert torch.equal(found.pairs[0].chosen, pair("a\u2028é").chosen)
    assert store.read("b").error == "no such file"
    assert PartStore(tmp_path / "pairs.jsonl", {"seed": 1}).read("a") is None  # other options, other parts
    for path in store.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert store.read("a") is None
    store.remove()
    assert not list(tmp_path.iterdir())
