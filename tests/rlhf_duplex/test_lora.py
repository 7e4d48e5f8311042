"""Adapters: both flavours stream, switch off, merge, and are read by Moshi's own loader."""

import json

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from torch import nn

from envs.errors import InputError
from rlhf_duplex.policy.bundle import NANO_FOLDER, load_bundle
from rlhf_duplex.policy.lora import (
    add_lora,
    export_moshi_lora,
    has_lora,
    lora_off,
    merge_into,
    merge_weights,
    merged_copy,
    part_of,
)
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling

FRAMES = 20


def stir(lm, scale=0.1):
    """Adapters that do something: B is 0 at the start."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lm.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def codes_of(bundle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randint(0, bundle.lm.card, (2, bundle.lm.n_q, FRAMES), generator=generator)
    text = torch.randint(0, 300, (2, 1, FRAMES), generator=generator)
    return torch.cat([text, audio], dim=1)


@pytest.mark.parametrize("flavour", ["moshi", "peft"])
class TestFlavours:
    def test_new_adapters_change_nothing_and_alone_are_trained(self, flavour):
        bundle = load_bundle("nano")
        codes = codes_of(bundle)
        with torch.no_grad():
            before = MoshiPolicy(bundle.lm).text_logits(codes)
            add_lora(bundle.lm, 4, 2.0, flavour)
            after = MoshiPolicy(bundle.lm).text_logits(codes)
        torch.testing.assert_close(after, before)
        trained = [name for name, p in bundle.lm.named_parameters() if p.requires_grad]
        assert trained
        assert all(part_of(name) == "lora" for name in trained)
        assert all(name.startswith(("transformer", "text_linear")) for name in trained)
        assert any(".in_projs." in name for name in trained) == (flavour == "moshi")

    def test_acting_frame_by_frame_agrees_with_evaluating_the_whole(self, flavour):
        bundle = load_bundle("nano")
        plain = MoshiPolicy(bundle.lm).text_logits(codes_of(bundle)).detach()
        add_lora(bundle.lm, 4, 2.0, flavour, parts=("temporal", "depth"))
        stir(bundle.lm)
        policy = MoshiPolicy(bundle.lm, Sampling(text_temperature=1.0))
        user = torch.randint(0, bundle.lm.card, (FRAMES, 2, 8), generator=torch.Generator().manual_seed(3))
        policy.begin([5, 6], FRAMES)
        for frame in user:
            policy.act(frame)
        trajectory = policy.trajectory()
        policy.end()
        with torch.no_grad():
            log_probs, _ = policy.evaluate_actions(trajectory.codes)
            changed = policy.text_logits(codes_of(bundle))
        torch.testing.assert_close(log_probs, trajectory.log_probs, rtol=0, atol=1e-4)
        assert (changed - plain).abs().max() > 0.1  # the adapters really are in the forward pass

    def test_every_layer_with_an_adapter_gets_a_gradient(self, flavour):
        bundle = load_bundle("nano")
        names = add_lora(bundle.lm, 2, 2.0, flavour)
        MoshiPolicy(bundle.lm).text_logits(codes_of(bundle)).square().mean().backward()
        with_gradient = {
            name.split(".lora_")[0]
            for name, p in bundle.lm.named_parameters()
            if ".lora_B" in name and p.grad is not None and p.grad.abs().sum() > 0
        }
        assert with_gradient == set(names)

    def test_off_is_the_base_and_merged_is_the_trained_model(self, flavour, tmp_path):
        bundle = load_bundle("nano")
        codes = codes_of(bundle)
        with torch.no_grad():
            base = MoshiPolicy(bundle.lm).text_logits(codes)
            add_lora(bundle.lm, 4, 2.0, flavour)
            stir(bundle.lm)
            trained = MoshiPolicy(bundle.lm).text_logits(codes)
            with lora_off(bundle.lm):
                off = MoshiPolicy(bundle.lm).text_logits(codes)
            on_again = MoshiPolicy(bundle.lm).text_logits(codes)
            bundle.save(tmp_path / "merged", weights=merge_weights(bundle.lm.state_dict(), 2.0))
            merged = load_bundle(str(tmp_path / "merged"))
            plain = MoshiPolicy(merged.lm).text_logits(codes)
        torch.testing.assert_close(off, base)
        torch.testing.assert_close(on_again, trained, rtol=0, atol=0)
        torch.testing.assert_close(plain, trained, rtol=1e-4, atol=1e-4)
        assert not has_lora(merged.lm)
        assert (trained - base).abs().max() > 0.1

    @pytest.mark.parametrize("fuse", [True, False])
    def test_moshis_own_loader_reads_the_exported_adapters(self, flavour, fuse, tmp_path):
        bundle = load_bundle("nano")
        add_lora(bundle.lm, 4, 2.0, flavour)
        stir(bundle.lm)
        codes = codes_of(bundle)
        path = export_moshi_lora(bundle.lm.state_dict(), bundle.lm, bundle.config, 4, 2.0, tmp_path / "lora")
        # What moshi.server does with --lora-weight and --config-path.
        info = CheckpointInfo.from_hf_repo(
            "owner/none",
            moshi_weights=NANO_FOLDER / "model.safetensors",
            mimi_weights=NANO_FOLDER / "mimi.safetensors",
            tokenizer=NANO_FOLDER / "tokenizer.model",
            mimi_config_path=NANO_FOLDER / "mimi_config.json",
            lora_weights=path,
            config_path=path.with_name("config.json"),
        )
        served = info.get_moshi(device="cpu", dtype=torch.float32, fuse_lora=fuse)
        with torch.no_grad():
            torch.testing.assert_close(
                MoshiPolicy(served).text_logits(codes), MoshiPolicy(bundle.lm).text_logits(codes), rtol=1e-4, atol=1e-4
            )
        assert json.loads(path.with_name("config.json").read_text())["lora_rank"] == 4


def test_merged_weight_is_w_plus_scaling_b_a():
    weights = {
        "a.frozen_W.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "a.lora_A.weight": torch.tensor([[1.0, -1.0]]),
        "a.lora_B.weight": torch.tensor([[0.5], [2.0]]),
        "b.weight": torch.tensor([7.0]),
    }
    merged = merge_weights(weights, 2.0)
    # 2 B A = [[1, -1], [4, -4]]
    assert merged["a.weight"].tolist() == [[2.0, 1.0], [7.0, 0.0]]
    assert set(merged) == {"a.weight", "b.weight"}
    assert merged["b.weight"].item() == 7.0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.layers.0.self_attn.in_projs.0.weight", "temporal"),
        ("out_norm.alpha", "temporal"),
        ("text_linear.weight", "temporal"),
        ("text_emb.weight", "embeddings"),
        ("emb.3.weight", "embeddings"),
        ("depformer_emb.0.weight", "embeddings"),
        ("depformer_in.0.weight", "depth"),
        ("depformer.layers.0.gating.1.linear_in.weight", "depth"),
        ("linears.0.weight", "depth"),
        ("text_linear.lora_A.weight", "lora"),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def test_every_parameter_of_nano_has_a_part(nano):
    assert {part_of(name) for name, _ in nano.lm.named_parameters()} == {"temporal", "depth", "embeddings"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flavour": "dora"}, "lora.flavour 'dora'"),
        ({"parts": ("temporal", "ears")}, "lora.parts"),
        ({"parts": ()}, "lora.parts"),
    ],
)
def test_wrong_arguments(arguments, message):
    lm = nn.ModuleDict({"transformer": nn.Linear(2, 2, bias=False)})
    with pytest.raises(InputError, match=message):
        add_lora(lm, 2, **arguments)


def test_adapters_are_not_put_on_adapters():
    bundle = load_bundle("nano")
    add_lora(bundle.lm, 2)
    with pytest.raises(InputError, match="merge them first"):
        add_lora(bundle.lm, 2)


@pytest.mark.parametrize("flavour", ["moshi", "peft"])
def test_a_merged_copy_acts_as_the_adapters_do_and_is_brought_up_to_date(flavour):
    bundle = load_bundle("nano")
    add_lora(bundle.lm, 4, 2.0, flavour)
    plain, codes = merged_copy(bundle.lm), codes_of(bundle)
    assert not has_lora(plain)
    own = {name for name, p in plain.named_parameters() if id(p) not in {id(q) for q in bundle.lm.parameters()}}
    assert own  # the adapted layers'
    assert all(name.startswith(("transformer", "text_linear")) for name in own)
    with torch.no_grad():
        before = MoshiPolicy(plain).text_logits(codes)
        stir(bundle.lm)
        trained = MoshiPolicy(bundle.lm).text_logits(codes)
        assert (trained - before).abs().max() > 0.1
        for _ in range(2):  # from the base each time: nothing adds up
            merge_into(plain, bundle.lm)
            torch.testing.assert_close(MoshiPolicy(plain).text_logits(codes), trained, rtol=1e-4, atol=1e-4)
        with lora_off(bundle.lm):
            torch.testing.assert_close(MoshiPolicy(bundle.lm).text_logits(codes), before)  # the base is untouched
