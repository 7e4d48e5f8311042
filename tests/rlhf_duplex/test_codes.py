import numpy as np
import pytest
import torch

from envs import InputError, SileroDetector
from envs.dialogues import UserSides, padded_user_audio
from rlhf_duplex.config import load_config
from rlhf_duplex.data.codes import CodeCache, cache_folder, codec_key, open_cache
from rlhf_duplex.policy.codec import MimiCodec


@pytest.fixture
def cache(tmp_path, nano):
    return CodeCache(tmp_path / "codes", nano.codec)


@pytest.fixture(scope="module")
def audio(nano, nano_segments):
    return padded_user_audio(nano_segments[0], nano.codec, 1.0)


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_codes_are_encoded_once_and_are_the_codecs_own(tmp_path, nano, cache, audio):
    true = nano.codec.encode(torch.from_numpy(audio)[None])[0]
    for _ in range(2):
        codes = cache.encode(nano.codec, audio)
        assert torch.equal(codes, true)
        assert codes.dtype == true.dtype
    assert (cache.encoded, cache.reused, cache.damaged) == (1, 1, 0)
    later = CodeCache(tmp_path / "codes", nano.codec)  # another run
    assert torch.equal(later.encode(nano.codec, audio), true)
    assert (later.encoded, later.reused) == (0, 1)
    assert len(entries(tmp_path)) == 1
    later.encode(nano.codec, audio + 1e-4)  # other content
    assert (later.encoded, len(entries(tmp_path))) == (1, 2)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def damage_empty(path):
    path.write_bytes(b"")


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_flip])
def test_a_damaged_entry_is_made_anew(tmp_path, nano, cache, audio, damage):
    true = cache.encode(nano.codec, audio)
    (path,) = entries(tmp_path)
    damage(path)
    assert torch.equal(cache.encode(nano.codec, audio), true)
    assert (cache.encoded, cache.reused, cache.damaged) == (2, 0, 1)
    later = CodeCache(tmp_path / "codes", nano.codec)
    assert torch.equal(later.encode(nano.codec, audio), true)
    assert (later.reused, later.damaged) == (1, 0)


def test_another_segments_entry_under_this_name_is_noticed(tmp_path, nano, cache, audio):
    cache.encode(nano.codec, audio)
    (path,) = entries(tmp_path)
    cache.encode(nano.codec, audio[::-1].copy())
    (other,) = (p for p in entries(tmp_path) if p != path)
    path.write_bytes(other.read_bytes())
    true = nano.codec.encode(torch.from_numpy(audio)[None])[0]
    assert torch.equal(cache.encode(nano.codec, audio), true)
    assert cache.damaged == 1


def test_another_codec_has_codes_of_its_own(tmp_path, nano, audio):
    from rlhf_duplex.policy.bundle import load_bundle

    other = load_bundle("nano").codec
    assert codec_key(other) == codec_key(nano.codec)
    with torch.no_grad():
        next(iter(other.mimi.parameters())).mul_(1.01)
    assert codec_key(other) != codec_key(nano.codec)
    fewer = MimiCodec(nano.mimi, nano.lm, nano.tokenizer)
    fewer.user_codebooks -= 1
    assert codec_key(fewer) != codec_key(nano.codec)


def test_users_are_read_from_the_cache_without_context(tmp_path, nano, nano_segments, cache):
    segments = [s for s in nano_segments if s.start > 0.3][:2]
    plain = UserSides(nano.codec, SileroDetector(), 1.0).get([(s, 0.0) for s in segments])
    users = UserSides(nano.codec, SileroDetector(), 1.0, store=cache).get([(s, 0.0) for s in segments])
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(plain, users, strict=True))
    again = UserSides(nano.codec, SileroDetector(), 1.0, store=cache).get([(s, 0.0) for s in segments])
    assert all(
        torch.equal(a.codes, b.codes) and np.array_equal(a.audio, b.audio) for a, b in zip(plain, again, strict=True)
    )
    assert (cache.encoded, cache.reused) == (2, 2)
    UserSides(nano.codec, SileroDetector(), 1.0, store=cache).get([(s, 0.3) for s in segments])
    assert (cache.encoded, cache.reused) == (2, 2)  # context is drawn anew every time


def test_where_the_cache_is(tmp_path, nano, monkeypatch):
    monkeypatch.setenv("RLHF_DUPLEX_CACHE", str(tmp_path / "own"))
    assert cache_folder("auto") == tmp_path / "own" / "codes"
    monkeypatch.delenv("RLHF_DUPLEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "rlhf_duplex" / "codes"
    assert cache_folder(str(tmp_path)) == tmp_path
    assert open_cache(load_config(None, ["codes_cache=none"]).codes_cache, nano.codec) is None
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"code cache .*file.* cannot be written"):
        open_cache(str(tmp_path / "file"), nano.codec)
