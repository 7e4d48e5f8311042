"""The decoder of matrix products against Mimi's own."""

import pytest
import torch
from moshi.modules.conv import StreamingConv1d, StreamingConvTranspose1d
from moshi.modules.seanet import SEANetDecoder
from torch import nn

from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.codec import shared_beginnings
from rlhf_duplex.policy.decoder import SeanetDecoder, UnknownLayerError, _layer


class Holder(nn.Module):
    """What `SeanetDecoder` reads of a Mimi."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
def test_audio_is_mimis_own(nano, frames):
    generator = torch.Generator().manual_seed(frames)
    codes = torch.randint(0, nano.codec.audio_cardinality, (3, nano.codec.agent_codebooks, frames), generator=generator)
    with torch.no_grad():
        expected = nano.mimi.decode(codes)[:, 0]
    ours = nano.codec.decode(codes)
    assert expected.abs().max() > 0.01
    assert ours.shape == expected.shape == (3, frames * nano.codec.frame_samples)
    assert (ours - expected).abs().max() < 1e-5


def test_parts_of_a_batch_are_the_batch(nano, monkeypatch):
    """As on a GPU, where memory for the way to audio bounds what is decoded at once."""
    codes = torch.randint(0, nano.codec.audio_cardinality, (5, nano.codec.agent_codebooks, 20))
    sizes, decode = [], nano.mimi.decode
    monkeypatch.setattr(nano.mimi, "decode", lambda part: sizes.append(len(part)) or decode(part))
    monkeypatch.setattr("rlhf_duplex.policy.codec.DECODED_FRAMES", 45)
    audio = nano.codec._decode_in_parts(codes)
    assert sizes == [2, 2, 1]
    assert (audio - nano.codec.decode(codes)).abs().max() < 1e-5
    monkeypatch.setattr("rlhf_duplex.policy.codec.DECODED_FRAMES", 5)  # less than one dialogue has
    assert nano.codec._decode_in_parts(codes).shape == audio.shape


def test_a_dialogues_audio_does_not_depend_on_its_neighbours(nano):
    codes = torch.randint(0, nano.codec.audio_cardinality, (4, nano.codec.agent_codebooks, 20))
    assert torch.equal(nano.codec.decode(codes)[2:3], nano.codec.decode(codes[2:3]))


def test_a_decoder_of_the_released_mimis_shape():
    # The 24 kHz Mimi: ratios 8, 6, 5, 4, kernel 7; here with fewer channels, and with two dilated residual layers.
    torch.manual_seed(0)
    decoder = SEANetDecoder(
        dimension=16, n_filters=4, n_residual_layers=2, ratios=[8, 6, 5, 4], causal=True, pad_mode="constant",
        true_skip=True, kernel_size=7, last_kernel_size=3,
    )  # fmt: skip
    latent = torch.randn(1, 16, 9)
    with torch.no_grad():
        expected = decoder(latent)[0, 0]
        ours = SeanetDecoder(Holder(decoder))
        whole, ends = ours(latent[0]), {since: ours(latent[0], since) for since in range(9)}
    assert whole.shape == expected.shape == (9 * 960,)
    assert (whole - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    for since, end in ends.items():
        assert end.shape == ((9 - since) * 960,)
        assert (end - expected[since * 960 :]).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


def test_what_the_end_of_a_dialogue_has_heard_is_no_more_than_it_is_given(nano):
    decoder = SeanetDecoder(nano.mimi)
    latent = torch.randn(128, 60, generator=torch.Generator().manual_seed(0))
    longer, shorter = decoder._past, decoder._past - 1
    whole = decoder(latent)[40 * 320 :]
    assert torch.allclose(decoder(latent[:, 40 - longer :])[longer * 320 :], whole, atol=1e-6)
    assert not torch.allclose(decoder(latent[:, 40 - shorter :])[shorter * 320 :], whole, atol=1e-6)
    assert torch.allclose(decoder(latent, 40), whole, atol=1e-6)


def test_shared_beginnings_by_hand():
    a, b, c = [1, 1, 1, 1], [1, 1, 2, 1], [1, 1, 2, 2]
    codes = torch.tensor([[a, a], [b, b], [a, c], [a, a], [b, c]])
    assert shared_beginnings(codes) == ([0, 0, 0, 0, 1], [0, 2, 2, 4, 3])


def test_a_beginning_that_dialogues_share_is_decoded_once(nano, monkeypatch):
    codec = nano.codec
    codes = torch.randint(0, 256, (4, 8, 30), generator=torch.Generator().manual_seed(0))
    codes[1, :, :20] = codes[0, :, :20]  # a dialogue that goes another way
    codes[2] = codes[0]  # the same one
    alone = torch.cat([codec.decode(row[None]) for row in codes])
    lengths = []
    decoder = codec._decoder

    def counting(latent, since):
        lengths.append(latent.shape[1] - since)
        return decoder(latent, since)

    monkeypatch.setattr(codec, "_decoder", counting)
    assert torch.allclose(codec.decode(codes), alone, atol=1e-6)
    assert sorted(lengths) == [20, 60, 60]  # latents: two a frame


@pytest.mark.parametrize(
    "module",
    [
        StreamingConv1d(4, 4, 3, causal=True, groups=2),
        StreamingConv1d(4, 4, 3, causal=True, norm="weight_norm"),
        StreamingConv1d(4, 4, 3, causal=True, pad_mode="replicate"),
        StreamingConvTranspose1d(4, 4, 6, 2, causal=True),
        nn.ELU(alpha=0.5),
        nn.GELU(),
    ],
)
def test_a_layer_without_an_equal_is_named_and_mimi_then_decodes_itself(module):
    with pytest.raises(UnknownLayerError, match=type(module).__name__):
        _layer(module)


def test_an_unknown_decoder_is_left_to_mimi():
    bundle = load_bundle("nano")
    codes = torch.randint(0, bundle.codec.audio_cardinality, (2, bundle.codec.agent_codebooks, 5))
    expected = bundle.codec.decode(codes)
    bundle.mimi.decoder.model[1] = nn.GELU()
    codec = bundle.codec
    assert codec._decoder is None
    with torch.no_grad():
        assert torch.allclose(codec.decode(codes), bundle.mimi.decode(codes)[:, 0], atol=1e-6)
    assert not torch.allclose(codec.decode(codes), expected, atol=1e-3)
