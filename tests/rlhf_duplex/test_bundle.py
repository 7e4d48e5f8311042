"""Bundles: Moshi's own loader reads what we write, and what is wrong with one is said in a line."""

import errno
import json
import os
import shutil

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file, save_file

from envs.errors import InputError
from rlhf_duplex.policy.bundle import NANO_FOLDER, load_bundle


@pytest.fixture
def copy(tmp_path):
    """A copy of the nano bundle to damage."""
    return shutil.copytree(NANO_FOLDER, tmp_path / "bundle")


def names(folder):
    return json.loads((folder / "config.json").read_text())


def test_sizes_are_read_from_the_bundle(nano):
    config = names(NANO_FOLDER)
    codec = nano.codec
    assert codec.agent_codebooks == config["dep_q"]
    assert codec.user_codebooks == config["n_q"] - config["dep_q"]
    assert codec.frame_samples == codec.sample_rate / codec.frame_rate
    assert codec.sample_rate == nano.mimi_config["sample_rate"]


def test_nano_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in NANO_FOLDER.iterdir()) < 10e6


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(nano, copy, monkeypatch):
    def full(weights, path, *_):
        save_file({"some": torch.zeros(1)}, path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr("rlhf_duplex.policy.bundle.save_file", full)
    for folder in (copy, copy.with_name("new")):
        with pytest.raises(OSError, match="No space left"):
            nano.save(folder)
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


def test_save_and_load_are_exact_and_moshi_reads_it(nano, tmp_path):
    nano.save(tmp_path / "saved")
    again = load_bundle(str(tmp_path / "saved"))
    for ours, theirs in ((nano.lm, again.lm), (nano.mimi, again.mimi)):
        other = theirs.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in ours.state_dict().items())
    config = names(tmp_path / "saved")
    info = CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=tmp_path / "saved" / config["moshi_name"],
        mimi_weights=tmp_path / "saved" / config["mimi_name"],
        tokenizer=tmp_path / "saved" / config["tokenizer_name"],
        config_path=tmp_path / "saved" / "config.json",
        mimi_config_path=tmp_path / "saved" / config["mimi_config_name"],
    )
    lm = info.get_moshi(dtype=torch.float32)
    assert torch.equal(lm.text_linear.weight, nano.lm.text_linear.weight)
    assert info.get_mimi().frame_size == nano.codec.frame_samples
    assert info.get_text_tokenizer().vocab_size() == nano.tokenizer.vocab_size()


@pytest.mark.parametrize("key", ["moshi_name", "mimi_name", "tokenizer_name", "mimi_config_name"])
def test_missing_file(copy, key):
    name = names(copy)[key]
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"`{key}` names {name}, which is not in"):
        load_bundle(str(copy))


def test_missing_and_broken_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        load_bundle(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_bundle(str(copy))


def test_unknown_configuration_key(copy):
    config = names(copy) | {"dimension_of_nothing": 3}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json of .*dimension_of_nothing"):
        load_bundle(str(copy))


@pytest.mark.parametrize("name", ["hf://someone/else/x.safetensors", "lora.safetensors", 5])
def test_adapters_are_looked_for_nowhere(copy, name):
    (copy / "config.json").write_text(json.dumps(names(copy) | {"lora_name": name}))
    with pytest.raises(InputError, match="adapters are not read beside a model"):
        load_bundle(str(copy))


@pytest.mark.parametrize("which", ["moshi_name", "mimi_name"])
def test_keys_and_shapes_of_the_weights(copy, which):
    path = copy / names(copy)[which]
    weights = {name: value.clone() for name, value in load_file(path).items()}  # not mapped to the file we write
    key = sorted(weights)[0]
    for damage, message in (
        ({k: v for k, v in weights.items() if k != key}, f"key '{key}' is missing"),
        (weights | {"something.else": torch.zeros(1)}, "key 'something.else' is not known"),
        (weights | {key: torch.zeros(3, 5, 7)}, rf"size mismatch for {key}"),
    ):
        save_file(damage, path)
        with pytest.raises(InputError, match=message) as error:
            load_bundle(str(copy))
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["moshi_name", "mimi_name"])
def test_weights_that_are_no_numbers(copy, which):
    path = copy / names(copy)[which]
    weights = {name: value.clone() for name, value in load_file(path).items()}
    key = next(name for name, value in weights.items() if value.ndim == 2 and not name.startswith("quantizer"))
    weights[key][0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(InputError, match=rf"{path.name}: '{key}' holds numbers that are not finite"):
        load_bundle(str(copy))


def test_truncated_weights(copy):
    path = copy / names(copy)["moshi_name"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_bundle(str(copy))


def test_broken_tokenizer(copy):
    (copy / names(copy)["tokenizer_name"]).write_bytes(b"no tokenizer")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_bundle(str(copy))


def test_pickled_weights_are_not_read(copy):
    config = names(copy)
    torch.save({"model": {}}, copy / "model.pt")
    (copy / "config.json").write_text(json.dumps(config | {"moshi_name": "model.pt"}))
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        load_bundle(str(copy))


def test_a_checkpoint_that_is_nowhere():
    with pytest.raises(InputError, match="checkpoint 'nowhere' is no folder"):
        load_bundle("nowhere")


def test_silence_and_text_of_the_codec(nano):
    codec = nano.codec
    silence = codec.encode(torch.zeros(1, 10 * codec.frame_samples))
    assert silence.shape == (1, codec.user_codebooks, 10)
    assert codec.decode(silence[:, : codec.agent_codebooks]).abs().max() < 0.05
    word = nano.tokenizer.encode("okay")
    assert codec.decode_text([3, 3, 0, *word, 3, codec.text_cardinality, -1]) == "okay"


def test_words_of_the_text_stream_have_frames(nano):
    codec = nano.codec
    spelled = [codec.tokenizer.encode(f" {word}") for word in ("good", "question", "okay")]
    tokens, starts = [3, 3], []
    for pieces in spelled:
        starts.append(len(tokens))
        tokens += [*pieces, 3, 0]
    words = codec.decode_words(tokens)
    assert [word for word, _, _ in words] == ["good", "question", "okay"] == codec.decode_text(tokens).split()
    assert [(first, last) for _, first, last in words] == [
        (start, start + len(pieces)) for start, pieces in zip(starts, spelled, strict=True)
    ]
    assert codec.decode_words([3, 0, codec.text_cardinality, -1]) == []
    # Whatever a policy draws: the same words, in order, within the dialogue.
    drawn = torch.randint(0, codec.text_cardinality, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    assert "".join(word for word, _, _ in codec.decode_words(drawn)) == "".join(codec.decode_text(drawn).split())
