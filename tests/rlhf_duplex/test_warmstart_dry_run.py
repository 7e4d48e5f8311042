"""The dry run of a warm start, with the 7B's figures."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.policy.bundle import NANO_FOLDER
from rlhf_duplex.warmstart.config import load_warmstart_config
from rlhf_duplex.warmstart.dry_run import dry_run

SEVEN_B = "kyutai/moshiko-pytorch-bf16"


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


def test_frames_are_counted_at_the_rate_of_the_checkpoints_mimi(tmp_path):
    folder = shutil.copytree(NANO_FOLDER, tmp_path / "bundle")

    def frames(seconds, checkpoint=folder):
        keys = [f"checkpoint={checkpoint}", f"pairs={tmp_path / 'none'}", "dry_run.pairs=1"]
        return dry_run(load_warmstart_config(None, [*keys, f"dry_run.seconds={seconds}"]), Console(quiet=True))[
            "frames"
        ]

    # 2.32 s are 29 frames of 0.08 s, a part of one more is a 30th; 7B: Moshi's own Mimi.
    assert (frames(2.32), frames(2.33), frames(2.32, SEVEN_B)) == (29, 30, 29)
    mimi = json.loads((folder / "mimi_config.json").read_text()) | {"frame_rate": 25.0}
    (folder / "mimi_config.json").write_text(json.dumps(mimi))
    assert frames(2.33) == 59


def test_a_folder_whose_configuration_has_no_sizes_is_a_seven_b(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "personaplex"}')
    keys = [f"checkpoint={tmp_path}", f"pairs={tmp_path / 'none'}", "dry_run.pairs=1", "dry_run.seconds=2"]
    assert main(["warmstart", *keys, "--dry-run"]) == 0
    assert "a frame has 17 streams" in capsys.readouterr().out
