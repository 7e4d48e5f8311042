"""The pair format: what is written is read back, and every mistake is found with its line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from rlhf_duplex.data.pair import Pair, StreamFormat, read_pairs, shard_folder, stream_format, write_pairs

STREAMS = StreamFormat("tok", "mimi", 2, 2, 10, 20, 1)


def make(name="a", **changes):
    generator = torch.Generator().manual_seed(len(name))
    tokens = [torch.randint(0, 10, (5, frames), generator=generator) for frames in (4, 6, 3)]
    return replace(
        Pair(name, "interruption", "train", *tokens, (0, 6), (1, 3), {"recording": "x.wav", "reason": "é\u2028"}),
        **changes,
    )


def test_pairs_are_read_as_written(tmp_path):
    pairs = [make("a"), make("bb", kind="turn_taking", split="heldout", context=torch.zeros(5, 0, dtype=torch.long))]
    write_pairs(tmp_path / "pairs.jsonl", pairs, STREAMS)
    found = read_pairs(tmp_path / "pairs.jsonl", STREAMS)
    assert len(found) == 2
    for before, after in zip(pairs, found, strict=True):
        for part in ("context", "chosen", "rejected"):
            assert getattr(after, part).dtype == torch.long
            assert torch.equal(getattr(before, part), getattr(after, part))
        assert (before.id, before.kind, before.split) == (after.id, after.kind, after.split)
        assert (before.chosen_span, before.rejected_span) == (after.chosen_span, after.rejected_span)
        assert before.provenance == after.provenance


def test_writing_again_leaves_only_what_is_needed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [make("a")], STREAMS)
    write_pairs(path, [make("bb")], STREAMS)
    assert [p.id for p in read_pairs(path)] == ["bb"]
    assert len(list(shard_folder(path).iterdir())) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.shards"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "rude"}, "unknown kind 'rude'"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"chosen": torch.zeros(4, 6, dtype=torch.long)}, r"`chosen` must be whole numbers of shape \(5, frames\)"),
        ({"chosen": torch.full((5, 6), 10)}, "holds token 10 in stream 0, frame 0: the stream's tokens are 0 to 9"),
        ({"rejected_span": (1, 4)}, r"`rejected_span` \[1, 4\) is empty or lies outside its 3 frames"),
        ({"chosen_span": (2, 2)}, "`chosen_span`"),
        ({"chosen": make().rejected, "chosen_span": (0, 3)}, "same text stream"),
    ],
)
def test_a_wrong_pair_is_not_written(tmp_path, changes, message):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(InputError, match=f"pair 'a': .*{message}"):
        write_pairs(path, [make("a", **changes)], STREAMS)
    assert not list(tmp_path.iterdir())


def test_an_audio_code_may_be_missing_a_text_token_may_not(tmp_path):
    tokens = make().chosen.clone()
    tokens[1:, -1] = -1
    write_pairs(tmp_path / "pairs.jsonl", [make(chosen=tokens)], STREAMS)
    assert torch.equal(read_pairs(tmp_path / "pairs.jsonl")[0].chosen, tokens)
    tokens[0, -1] = -1
    with pytest.raises(InputError, match="holds token -1 in stream 0, frame 5"):
        write_pairs(tmp_path / "pairs.jsonl", [make(chosen=tokens)], STREAMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("frames"), "missing `frames`"),
        (lambda row: row.update(more=1), "unknown key `more`"),
        (lambda row: row.update(frames=[4, 7, 3]), r"`chosen` in .* has shape \(5, 6\), \(5, 7\) is announced"),
        (lambda row: row.update(chosen_span=[0, 1.5]), "`chosen_span` must be 2 whole numbers"),
        (lambda row: row.update(chosen_span=[0, 60]), "lies outside its 6 frames"),
        (lambda row: row.update(shard="pairs.shards/none.safetensors"), "cannot be read from"),
        (lambda row: row.update(id="c"), "tokens 'c/context' cannot be read"),
        (lambda row: row.update(id="\ud800"), r"tokens '.ud800/context' cannot be read"),
        (lambda row: row.update(id="a"), "id 'a' was already used on line 1"),
        (lambda row: row["streams"].update(max_delay="1"), "`streams.max_delay` must be of type int"),
        (lambda row: row["streams"].update(codec="other"), "its codec is other, the checkpoint's is mimi"),
        (lambda row: row["streams"].pop("codec"), "`streams` must be an object of tokenizer, codec"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, message):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [make("a"), make("bb")], STREAMS)
    first, second = path.read_text().split("\n")[:2]
    row = json.loads(second)
    change(row)
    path.write_text("\n".join([first, "", json.dumps(row)]))
    with pytest.raises(InputError, match=f"pairs.jsonl:3: .*{message}"):
        read_pairs(path, STREAMS)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(InputError, match="does not exist"):
        read_pairs(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="is empty: give at least one line"):
        read_pairs(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"pairs.jsonl:1: not valid JSON"):
        read_pairs(path)
    for line in ("[" * 100_000, "1" * 5_000):
        path.write_text(line)
        with pytest.raises(InputError, match=r"pairs.jsonl:1: not valid JSON"):
            read_pairs(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_pairs(path)
    write_pairs(path, [make("a")], STREAMS)
    shard = next(shard_folder(path).iterdir())
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"pairs.jsonl:1: tokens 'a/context' cannot be read"):
        read_pairs(path)


def test_the_format_of_nano(nano):
    streams = stream_format(nano)
    assert streams.streams == nano.lm.n_q + 1
    assert streams.max_delay == max(nano.lm.delays)
    assert streams == stream_format(nano)
    assert len({streams.tokenizer, streams.codec}) == 2


def test_tokens_that_are_no_whole_numbers(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [make("a")], STREAMS)
    shard = next(shard_folder(path).iterdir())
    save_file({name: value.float() + 0.7 for name, value in load_file(shard).items()}, shard)
    with pytest.raises(InputError, match=r"pairs.jsonl:1: `context` in .* must be of whole numbers"):
        read_pairs(path)
