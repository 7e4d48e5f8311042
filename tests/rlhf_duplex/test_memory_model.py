"""What a model takes: counts held against real models, and sizes as they are when a checkpoint is loaded."""

import json
import shutil

import pytest
import torch

from envs.errors import InputError
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.memory_model import count_memory, gathered_bytes, meta_model, model_config, peak_bytes, saved_bytes
from rlhf_duplex.policy.bundle import NANO_FOLDER, load_bundle, local_info, meta_mimi
from rlhf_duplex.warmstart.config import load_warmstart_config, set_trained
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, stream_ids


def test_memory_of_nano_is_what_its_tensors_take():
    lm = load_bundle("nano").lm
    set_trained(lm, load_warmstart_config())
    memory = count_memory(lm, devices=1, sharded=False)
    assert sum(part.weights for part in memory.values()) == sum(4 * p.numel() for p in lm.parameters())
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = [s for p in trained for key, s in optimiser.state[p].items() if key != "step"]
    assert sum(part.gradients for part in memory.values()) == sum(p.grad.nbytes for p in trained)
    assert sum(part.optimiser for part in memory.values()) == sum(s.nbytes for s in states)
    assert memory["depth"].trained == 0
    quarter = count_memory(lm, devices=4, sharded=True)
    assert quarter["temporal"].total == pytest.approx(memory["temporal"].total / 4, rel=1e-3)


def test_what_the_meta_device_counts_is_what_a_real_forward_pass_keeps():
    bundle = load_bundle("nano")
    config = load_warmstart_config()
    tokens = [torch.randint(0, 200, (17, 12), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    pairs = [(Pair("p", "content", "train", *tokens, (0, 12), (0, 12)), None)] * 3
    batch = PairCollator(stream_ids(bundle.lm, "text"))(pairs)
    shadow = meta_model(model_config("nano").lm, torch.float32)
    found = []
    for lm, device in ((bundle.lm, "cpu"), (shadow, "meta")):
        set_trained(lm, config)
        model, inputs = PairModel(lm), {name: value.to(device) for name, value in batch.items()}
        with torch.device(device):
            found.append(saved_bytes(lambda m=model, i=inputs: m(**i), dict(lm.named_parameters())))
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert found[0] > 1e6


def test_saved_bytes_by_hand():
    weight = torch.ones(10, 10, requires_grad=True)
    inputs = torch.ones(3, 10)
    # x W keeps x (3 x 10 floats; W is a weight), its square keeps x W (3 x 10 floats).
    assert saved_bytes(lambda: (inputs @ weight).square().sum(), {"w": weight}) == 2 * 3 * 10 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_bytes_by_hand(device):
    inputs = torch.ones(3, 10, device=device)

    def function():
        wide = torch.cat([inputs] * 4)  # 480 bytes
        square = wide * wide  # and 480; a view of it takes nothing
        del wide
        return square.t().sum(dim=0) + 1  # 480, 48, and 48 more

    assert peak_bytes(function) == 960


def test_gathered_bytes_by_hand(nano):
    layers = [*nano.lm.transformer.layers, *nano.lm.depformer.layers]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in nano.lm.parameters()) - sum(sizes)
    assert gathered_bytes(nano.lm, 2) == 2 * (rest + 2 * max(sizes))


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("moshiko", {"model_type": "moshi"}, (4096, 16, 8, 17)),
        ("personaplex-7b-v1", {}, (4096, 16, 16, 17)),
        ("mine", {"model_type": "personaplex", "version": "7b-v1"}, (4096, 16, 16, 17)),
        ("personaplex-small", json.loads((NANO_FOLDER / "config.json").read_text()), (128, 16, 8, 17)),
    ],
)
def test_sizes_are_those_that_a_folder_is_loaded_with(tmp_path, name, config, expected):
    folder = shutil.copytree(NANO_FOLDER, tmp_path / name)
    (folder / "config.json").write_text(json.dumps(config))
    info, found = local_info(folder), model_config(str(folder))
    assert (found.lm, found.mimi) == (info.lm_config, info.mimi_config)
    assert found.lm.items() <= info.raw_config.items()  # what a trained copy will say
    assert "version" not in info.raw_config
    lm = meta_model(found.lm, torch.bfloat16)
    assert (lm.dim, lm.n_q, lm.dep_q, len(lm.delays)) == expected


def test_what_the_hub_says_goes_by_the_same_rule(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "personaplex", "mimi_config_name": "mimi.json"}')
    mimi = json.loads((NANO_FOLDER / "mimi_config.json").read_text())
    (tmp_path / "mimi.json").write_text(json.dumps(mimi))
    fetched = []

    def download(repository, name, **_):
        fetched.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", download)
    found = model_config("somebody/tuned")
    assert fetched == [("somebody/tuned", "config.json"), ("somebody/tuned", "mimi.json")]
    assert (found.lm["dim"], found.lm["dep_q"], found.mimi) == (4096, 16, mimi)
    # Of these the sizes are known: no network is asked.
    assert model_config("nvidia/personaplex-7b-v1").lm == found.lm
    assert model_config("kyutai/moshiko-pytorch-bf16").lm["dep_q"] == 8
    assert len(fetched) == 2

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("moshi.models.loaders.hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"config\.json of 'somebody/tuned' cannot be had .* \(offline"):
        model_config("somebody/tuned")


def test_a_wrong_mimi_configuration_is_one_line(tmp_path):
    sizes = json.loads((NANO_FOLDER / "mimi_config.json").read_text())
    for wrong in (sizes | {"frame_rate": 0}, {key: value for key, value in sizes.items() if key != "seanet"}):
        with pytest.raises(InputError, match=r"Mimi configuration of mine: (float division|missing key 'seanet')"):
            meta_mimi(wrong, "mine")
    (tmp_path / "config.json").write_text('{"mimi_config_name": "mimi.json"}')
    with pytest.raises(InputError, match=r"`mimi_config_name` names mimi\.json, which is not in"):
        model_config(str(tmp_path))
    (tmp_path / "mimi.json").write_text("[]")
    with pytest.raises(InputError, match=r"mimi\.json must hold a JSON object, found list"):
        model_config(str(tmp_path))
