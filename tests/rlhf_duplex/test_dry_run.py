"""The dry run: counts held against real models, and the 7B's figures."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.dry_run import count_memory, dry_run, gathered_bytes, meta_model, model_config, peak_bytes, saved_bytes
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.warmstart.config import load_warmstart_config, set_trained
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, stream_ids

SEVEN_B = "kyutai/moshiko-pytorch-bf16"


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
    shadow = meta_model(model_config("nano")[0], torch.float32)
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


def test_seven_b_with_the_papers_settings(capsys):
    config = load_warmstart_config(Path(__file__).parents[2] / "configs" / "moshi_7b_dpo_ln.yaml")
    rates = config.optimiser.learning_rates
    assert (config.loss.name, config.loss.beta, config.loss.streams) == ("sigmoid_norm", 0.3, "text")
    assert (rates.temporal, rates.depth) == (5e-9, 1e-6)
    assert (config.training.batch_size, config.training.epochs, config.optimiser.schedule) == (16, 1, "cosine")
    found = dry_run(config, Console(quiet=True))
    assert found["steps"] == 5844  # 93,490 pairs, 16 a step
    memory = found["memory"]
    # 32 layers of 4096 wide with a gated feed-forward of 11,264, text logits of 32,000: 6.7 billion.
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11264 + 2 * 4096
    assert memory["temporal"].parameters == 32 * layer + 32000 * 4096 + 4096
    assert memory["temporal"].trained == memory["temporal"].parameters
    assert memory["depth"].trained == 0
    assert memory["temporal"].total == pytest.approx(memory["temporal"].parameters * 16 / 8, rel=1e-6)  # fp32, 8 GPUs
    assert 12 * 2**30 < found["total"] < 40 * 2**30


def test_adapters_on_the_seven_b_train_a_few_of_its_parameters():
    keys = ["lora.rank=32", f"checkpoint={SEVEN_B}", "dry_run.pairs=1000", "dtype=bfloat16", "training.microbatch=1"]
    found = dry_run(load_warmstart_config(None, keys), Console(quiet=True))
    memory = found["memory"]
    # A layer: in 4096 -> 12288, out 4096 -> 4096, gating 4096 -> 22528 and 11264 -> 4096; and the text logits.
    shapes = [(4096, 12288), (4096, 4096), (4096, 22528), (11264, 4096)]
    expected = 32 * 32 * sum(a + b for a, b in shapes) + 32 * (4096 + 32000)
    assert memory["lora"].parameters == memory["lora"].trained == expected
    assert memory["temporal"].trained == 0
    assert memory["temporal"].gradients == memory["temporal"].optimiser == 0


def test_mistakes(tmp_path, capsys):
    with pytest.raises(InputError, match="say what to reckon with"):
        dry_run(load_warmstart_config(None, [f"pairs={tmp_path / 'none.jsonl'}"]), Console(quiet=True))
    (tmp_path / "config.json").write_text('{"dim": 64, "wings": 2, "dep_q": 1}')
    assert main(["warmstart", f"checkpoint={tmp_path}", "dry_run.pairs=1", "--dry-run"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["warmstart", "training.batch_size=0", "--dry-run"]) == 2
    assert "training.batch_size must be above 0" in capsys.readouterr().err
