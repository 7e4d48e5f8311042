"""The dry run of `train` and the model of the step, worked out by hand."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from envs.dialogues import padded_user_audio
from envs.segments import read_manifest, write_manifest
from rlhf_duplex.cli import main
from rlhf_duplex.config import load_config
from rlhf_duplex.inputs import NANO_DATA
from rlhf_duplex.policy.bundle import NANO_FOLDER
from rlhf_duplex.step_model import Machine, Size, rollout_seconds, sync_seconds, update_seconds
from rlhf_duplex.train_dry_run import dry_run_training, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = Size(temporal=1000, depth=100, trained=500, read_bytes=2000, cache_bytes=10, sync_bytes=800, gathered_bytes=2200)
MACHINE = Machine(
    bandwidth=1000.0,
    flops=1e6,
    read_share=0.5,
    compute_share=0.5,
    frame_overhead=0.25,
    near=400.0,
    far=100.0,
    node=4,
)


def test_a_rollout_by_hand():
    # 3 frames read 3 * 2000 bytes of weights and 2 * 10 * (1 + 2 + 3) of keys and values, at 500 a second; 0.75 beside.
    assert rollout_seconds(SIZE, MACHINE, 2, 3) == pytest.approx((6000 + 120) / 500 + 0.75)
    # So many episodes that products take longer than reading: 2 * 1100 * 5000 * 3 at 500,000 a second.
    wide = replace(MACHINE, bandwidth=1e6)
    assert rollout_seconds(SIZE, wide, 5000, 3) == pytest.approx(2 * 1100 * 15000 / 5e5 + 0.75)


def test_an_update_by_hand():
    # Forward 2, reference 2, backward 2 + 2 * 500 / 1000 for half the weights: 7 operations a weight and token.
    assert update_seconds(SIZE, MACHINE, 100, 1) == (pytest.approx(7 * 1000 * 100 / 5e5), 0.0)
    computing, moving = update_seconds(SIZE, MACHINE, 100, 4, passes=2, forwards_before=1, recompute=True, steps=3)
    assert computing == pytest.approx((2 * 9 + 2) * 1000 * 100 / 4 / 5e5)
    assert moving == pytest.approx(2 * 3 * 2 * 4 * 500 * 3 / 4 / 400)  # an all-reduce of float32 a step, within a node
    _, hidden = update_seconds(SIZE, MACHINE, 100, 8, sharded=True, microbatches=2)
    moved = 2 * (3 * 2200 + 4 * 500) * 7 / 8 / 100  # between nodes, beside 7 * 1000 * 100 / 8 / 5e5 of computing
    assert hidden == pytest.approx(moved - 0.175)


def test_weights_on_their_way_by_hand():
    assert sync_seconds(SIZE, MACHINE, 8, "shared") == 0.0
    assert sync_seconds(SIZE, MACHINE, 8, "broadcast") == pytest.approx(800 / 100 + 800 / 400)
    assert sync_seconds(SIZE, MACHINE, 8, "object_store") == pytest.approx(2 * 800 / 100 + 4 * 800 / 400)


def test_placement():
    plan = make_plan(load_config(None, ["cluster.workers=3", "cluster.learners=2", "rollout.batch_size=50"]))
    # 12 groups of 16 on 3 workers: 64 episodes each, 50 at once; 3 minibatches of 64 in 8 microbatches, on 2 learners.
    assert (plan.episodes, plan.rounds, plan.microbatches) == (50, 2, 12)
    assert (plan.workers, plan.learners, plan.colocated) == (3, 2, False)


def test_the_papers_run():
    found = dry_run_training(load_config(CONFIGS / "moshi_7b_paper.yaml"), Console(quiet=True))
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11264 + 2 * 4096
    temporal = 32 * layer + 32000 * 4096 + 4096
    # float32 weight, gradient and two moments, cut over 32.
    assert found["learner"]["temporal (weights, gradients, optimiser)"] == pytest.approx(temporal * 16 / 32, rel=1e-6)
    assert found["worker"]["policy that acts"] > 2 * temporal  # bfloat16, whole, with the depth transformer
    # 0.52 MB a frame and episode.
    assert found["worker"]["keys and values of 16 episodes"] == 16 * 750 * 2 * 32 * 4096 * 2
    assert found["plan"].microbatches == 16
    assert found["fits"]
    assert len(found["totals"]) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*_7b_*.yaml") if "dpo" not in path.name))
def test_every_large_configuration_has_a_dry_run(name):
    found = dry_run_training(load_config(CONFIGS / name), Console(quiet=True))
    assert found["plan"].episodes >= 1
    assert found["plan"].episodes * found["plan"].rounds * found["plan"].workers >= 1


def test_as_many_episodes_at_once_as_there_is_room_for():
    def run(gpu_gib):
        return dry_run_training(
            load_config(CONFIGS / "moshi_7b_lora_1gpu.yaml", ["rollout.batch_size=0", f"dry_run.gpu_gib={gpu_gib}"]),
            Console(quiet=True),
        )

    little, much = run(30), run(2000)
    assert 1 <= little["plan"].episodes < much["plan"].episodes
    config = load_config(CONFIGS / "moshi_7b_lora_1gpu.yaml")
    assert much["plan"].episodes == config.trainer.groups * config.trainer.group_size
    assert little["plan"].episodes * little["plan"].rounds >= much["plan"].episodes


def test_bfloat16_weights_that_are_trained_have_float32_copies():
    keys = ["checkpoint=nano", "optimiser.learning_rate=1e-5"]
    configs = [load_config(None, [*keys, f"dtype={name}"]) for name in ("float32", "bfloat16")]
    whole, half = (dry_run_training(config, Console(quiet=True)) for config in configs)
    name = "float32 copies of what is trained"
    assert name not in whole["learner"]
    trained = sum(size for part, size in half["learner"].items() if "optimiser" in part and "depth" not in part)
    # bfloat16: weights 2, gradient 2 and two moments 2 each are counted; 10 more make the 18 that there are.
    assert half["learner"][name] <= trained * 10 / 8 + 1
    assert half["learner"][name] > 0


def test_adapters_on_one_gpu_share_the_weights():
    found = dry_run_training(load_config(CONFIGS / "moshi_7b_lora_1gpu.yaml"), Console(quiet=True))
    assert found["worker"]["policy that acts"] == 0
    assert found["learner"]["lora (weights, gradients, optimiser)"] > 0
    assert found["learner"]["reference"] == 0  # the same model with its adapters off
    assert found["fits"]
    assert found["seconds"]["sync"] == 0.0


def test_on_the_command_line(capsys):
    assert main(["train", "--dry-run", "trainer.algorithm=ppo", "cluster.workers=2", "device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "2 rollout workers" in said
    assert "value head" in said
    assert "nothing was loaded or written" in " ".join(said.split())
    assert main(["train", "--dry-run", "trainer.ahead=true"]) == 2
    assert "trainer.ahead needs rollout workers" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "depth"), [("moshi", 8), ("personaplex", 16)])
def test_a_folder_whose_configuration_has_no_sizes_is_a_seven_b(tmp_path, capsys, kind, depth):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "version": "7b-v1"}))
    config = CONFIGS / {"moshi": "moshi_7b_grpo.yaml", "personaplex": "personaplex_7b_grpo.yaml"}[kind]
    assert main(["train", str(config), f"checkpoint={tmp_path}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint {tmp_path}: {tmp_path / 'config.json'}" in said.replace("\n", "")
    rows = dict(re.findall(r"│ (\w+) \(weights, gradients, optimiser\)\s+│\s+([\d.]+) │", said))
    assert rows["temporal"] == "12.49"
    # bfloat16: the attention and feed-forward of 6 layers, what goes in and the logits, for each codebook.
    codebook = 6 * (4 * 1024 * 1024 + 3 * 1024 * 2816) + 4096 * 1024 + 1024 * 2048
    assert float(rows["depth"]) == pytest.approx(2 * depth * codebook / 2**30, rel=0.01)


def test_frames_are_those_that_are_played(tmp_path, nano):
    def frames(*keys):
        found = dry_run_training(load_config(None, [*keys, "rollout.batch_size=1"]), Console(quiet=True))
        return found["worker"]["keys and values of 1 episodes"] // (2 * 4 * 128 * 4)  # nano's 4 layers, float32

    # Parts are filled up to whole frames apart from one another: 0.3 s are 4 frames, 2.5 s are 32.
    assert frames("env=live", "live.lead_in=0.3", "live.seconds=2.5") == 4 + 32
    none = f"segments={tmp_path / 'none.jsonl'}"
    assert frames(none, "dry_run.seconds=2.32") == 29
    context = ["context.lead_in=0.3", "context.probability=1", "context.max_seconds=3"]
    segments = read_manifest(NANO_DATA / "train" / "segments.jsonl")[:8]
    write_manifest(tmp_path / "segments.jsonl", segments)
    played = []
    for segment in segments:
        before = int(min(3.0, segment.start) * 12.5 + 1e-6)
        played.append(len(padded_user_audio(segment, nano.codec, 0.3, before)) // nano.codec.frame_samples)
    assert frames(*context, f"segments={tmp_path / 'segments.jsonl'}") == max(played)
    folder = shutil.copytree(NANO_FOLDER, tmp_path / "bundle")
    mimi = json.loads((folder / "mimi_config.json").read_text()) | {"frame_rate": 25.0}
    (folder / "mimi_config.json").write_text(json.dumps(mimi))
    assert frames(none, "dry_run.seconds=2.33", f"checkpoint={folder}") == 59


def test_it_does_not_wait_for_what_only_a_warm_start_needs():
    code = "import sys, rlhf_duplex.train_dry_run; print({'trl', 'transformers', 'peft'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parent)
    assert found.stdout.strip() == "set()"
