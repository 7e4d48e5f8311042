"""Whole runs of the warm start: what they leave, resume, kills, stops, and mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback
from warmstart_pairs import KINDS, config_of, make_pairs, run

from envs.errors import InputError
from rlhf_duplex.cli import main
from rlhf_duplex.data.pair import read_pairs, stream_format, write_pairs
from rlhf_duplex.learner import NonFiniteError
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.run_folder import check_data, claimed
from rlhf_duplex.tracking import read_metrics
from rlhf_duplex.warmstart.run import references_of, split_pairs
from rlhf_duplex.warmstart.trainer import PairDataset, PreferenceTrainer


class Gradients(TrainerCallback):
    """Keeps the gradient of a step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def folder(tmp_path, nano):
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(nano.lm), stream_format(nano))
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, nano):
    """A folder with pairs and a whole run on them, to be read only."""
    folder = tmp_path_factory.mktemp("finished")
    write_pairs(folder / "pairs.jsonl", make_pairs(nano.lm), stream_format(nano))
    run(folder)
    return folder


class TestRun:
    def test_what_a_run_leaves(self, finished):
        folder = finished
        lines = read_metrics(folder / "run" / "metrics.jsonl")
        assert [line["update"] for line in lines] == [1, 2, 3]
        assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # before any step: the reference itself
        by_kind = [v for k, v in lines[-1].items() if k.startswith("eval_rewards/accuracies/")]
        assert lines[-1]["eval_rewards/accuracies"] == sum(by_kind) / 2  # a pair of each
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "eval_logps/chosen"):
            assert math.isfinite(lines[-1][name])
        held_out = {k.rpartition("/")[2] for k in lines[-1] if k.startswith("eval_rewards/accuracies/")}
        assert held_out == {KINDS[3 % 3], KINDS[7 % 3]}
        assert load_bundle(str(folder / "run")).folder == folder / "run" / "checkpoints" / "step_000003"
        page = (folder / "run" / "report.html").read_text()
        assert "DPO-LN, beta 0.3, text stream" in page
        for title in ("Preference pairs", "Pair accuracy", "Held-out accuracy by kind", "<dt>Steps</dt><dd>3</dd>"):
            assert title in page
        assert "Rewards during training" not in page  # those of RL
        accuracy = lines[-1]["eval_rewards/accuracies"]
        assert f'<th scope="row">All held-out pairs</th><td>{100 * accuracy:.0f} %</td>' in page

    def test_held_out_means_do_not_depend_on_batches(self, tmp_path):
        bundle, values = load_bundle("nano"), []
        pairs = make_pairs(bundle.lm, 5)
        references = torch.linspace(-90, -70, 10).reshape(5, 2)  # far enough from nano's own for losses of any size
        for size in (1, 2, 5):
            config = config_of(training__microbatch=size, training__batch_size=10)
            data = PairDataset(pairs, references)
            values.append(PreferenceTrainer(bundle, config, data, data, tmp_path).evaluate())
        assert {"eval_loss", "eval_rewards/margins/pause_handling", "eval_logps/chosen"} <= values[0].keys()
        for other in values[1:]:
            assert other == pytest.approx(values[0], rel=1e-3, abs=1e-4)

    def test_gradients_do_not_depend_on_microbatches(self, tmp_path):
        found = []
        for size in (8, 4):  # the five pairs of the epoch's one step, at once or as four and one
            bundle = load_bundle("nano")
            references = torch.linspace(-90, -70, 10).reshape(5, 2)
            config = config_of(training__microbatch=size, training__batch_size=8, optimiser__clip_norm=1e9)
            data, kept = PairDataset(make_pairs(bundle.lm, 5), references), Gradients()
            PreferenceTrainer(bundle, config, data, None, tmp_path / str(size), [kept]).train()
            found.append(kept.gradient)
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))

    @pytest.mark.parametrize("lora", [0, 2])
    def test_resumed_is_the_uninterrupted_run_to_the_bit(self, folder, lora):
        keys = {"training__epochs": 2, "lora__rank": lora}  # six steps, the cut lies inside the second epoch
        run(folder, **keys, run_dir=folder / "straight")
        shutil.copytree(folder / "straight", folder / "run")
        for later in ("step_000005", "step_000006"):
            os.rename(folder / "run" / "checkpoints" / later, folder / later)
        run(folder, **keys, resume="true")
        ends = [folder / name / "checkpoints" / "step_000006" for name in ("straight", "run")]
        names = ["model.safetensors", "optimiser.safetensors"] + (["lora.safetensors"] if lora else [])
        for name in names:
            straight, resumed = (load_file(end / name) for end in ends)
            assert straight.keys() == resumed.keys()
            assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
        logs = [read_metrics(folder / name / "metrics.jsonl") for name in ("straight", "run")]
        assert logs[0] == logs[1]

    def test_adapters_are_merged_in_the_checkpoint_and_exported(self, folder):
        run(folder, lora__rank=2, optimiser__learning_rates__lora=0.01, checkpointing__every=3)
        assert not any("lora" in name for name in load_file(folder / "run/checkpoints/step_000003/model.safetensors"))
        base, merged = load_bundle("nano").lm.state_dict(), load_bundle(str(folder / "run")).lm.state_dict()
        assert not torch.equal(base["text_linear.weight"], merged["text_linear.weight"])
        assert torch.equal(base["text_emb.weight"], merged["text_emb.weight"])
        assert json.loads((folder / "run" / "lora" / "config.json").read_text())["lora"] is True

    def test_stale_references_are_noticed(self, finished, tmp_path, nano, capsys):
        shutil.copy(finished / "run" / "reference.safetensors", tmp_path / "kept.safetensors")
        train, held_out = split_pairs(read_pairs(finished / "pairs.jsonl"))
        found = []
        for span in ("pair", "reply"):
            config = config_of(reference__cache=tmp_path / "kept.safetensors", loss__span=span)
            found.append(references_of(config, tmp_path, nano, [*train, *held_out], Console(width=300)))
            assert ("computed anew" in capsys.readouterr().out) == (span == "reply")
        assert (found[1] < found[0]).all()  # a reply has more frames than the pair's span

    def test_simpo_needs_no_reference(self, folder):
        run(folder, loss__name="simpo", loss__beta=2.0, checkpointing__every=3)
        assert not (folder / "run" / "reference.safetensors").exists()
        assert len(read_metrics(folder / "run" / "metrics.jsonl")) == 3

    def test_without_held_out_pairs(self, tmp_path, nano):
        pairs = [replace(pair, split="train") for pair in make_pairs(nano.lm)]
        write_pairs(tmp_path / "pairs.jsonl", pairs, stream_format(nano))
        run(tmp_path, loss__name="simpo", loss__beta=2.0, checkpointing__every=99)
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert not any(key.startswith("eval_") for line in lines for key in line)
        assert (tmp_path / "run" / "checkpoints" / f"step_{len(lines):06d}").is_dir()
        assert (tmp_path / "run" / "report.html").is_file()

    def test_a_loss_that_is_not_finite_stops_the_run_unsaved(self, folder):
        keys = {"optimiser__learning_rates__temporal": 1e30, "optimiser__clip_norm": 1e30}
        with pytest.raises(NonFiniteError, match="nothing of this step is saved"):
            run(folder, **keys)
        saved = sorted((folder / "run" / "checkpoints").glob("step_*"))
        assert [path.name for path in saved] == ["step_000001"]  # whose loss was finite: the next one is not

    def test_another_configuration_is_not_resumed(self, finished):
        with pytest.raises(InputError, match=r"loss.beta was 0.3 and is 0.5"):
            run(finished, resume="true", loss__beta=0.5)

    def test_one_at_a_time_and_resumed_with_the_same_pairs(self, folder):
        with claimed(folder / "run"), pytest.raises(InputError, match="another run is writing to"):
            run(folder)
        (folder / "run").mkdir()
        check_data(folder / "run", False, "nano", {"pairs": folder / "pairs.jsonl"})
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        (folder / "pairs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        with pytest.raises(InputError, match=r"pairs\.jsonl is not what it was when this run began"):
            run(folder, resume="true")


def arguments_of(folder):
    """Of a run of fifteen steps with a checkpoint every second one."""
    return [
        "warmstart",
        f"pairs={folder / 'pairs.jsonl'}",
        f"run_dir={folder / 'run'}",
        "training.batch_size=2",
        "training.microbatch=1",
        "training.epochs=5",
        "evaluation.segments=null",
        "evaluation.every=0",
        "checkpointing.every=2",
    ]


class Interrupting(Console):
    """A terminal whose user asks the process to stop when the first step is reported."""

    def print(self, *objects, **keys):
        if objects and str(objects[0]).startswith("step 1/"):
            signal.raise_signal(signal.SIGTERM)
        super().print(*objects, **keys)


def test_a_request_to_stop_leaves_a_checkpoint_of_the_step_under_way(folder, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_duplex.warmstart.run.make_console", lambda: Interrupting(width=300))
    assert main(arguments_of(folder)) == 0
    assert "resume=true" in capsys.readouterr().out
    done = read_metrics(folder / "run" / "metrics.jsonl")[-1]["update"]
    assert done < 15
    last = sorted((folder / "run" / "checkpoints").glob("step_*"))[-1]
    assert last.name == f"step_{done:06d}"
    load_bundle(str(last))  # whole
    assert load_file(last / "optimiser.safetensors")


def test_a_killed_process_loses_at_most_one_interval(folder):
    command = [sys.executable, "-m", "rlhf_duplex.cli", *arguments_of(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "run" / "checkpoints" / "step_000004").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = read_metrics(folder / "run" / "metrics.jsonl")[-1]["update"]
    last = sorted((folder / "run" / "checkpoints").glob("step_*"))[-1]
    assert 0 <= done - int(last.name.removeprefix("step_")) <= 2
    load_bundle(str(last))  # whole
    assert load_file(last / "optimiser.safetensors")
    assert main([*arguments_of(folder), "resume=true"]) == 0
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, 16))
    assert not list((folder / "run" / "checkpoints").glob(".*"))


class TestMistakes:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"lora__rank": 4, "lora__parts": "[depth]"}, "a loss about text alone teaches only temporal ones"),
            ({"checkpointing__best": "-eval_loss"}, "checkpointing.best is of `train`"),
            ({"evaluation__before": "x.json"}, "evaluation.before is of `train`"),
            ({"device": "cuda:1"}, "takes the first GPU; set CUDA_VISIBLE_DEVICES"),
            ({"loss__name": "dpo"}, "loss.name 'dpo' is not known: choose sigmoid_norm"),
            ({"loss__beta": 0}, "loss.beta must be above 0"),
            ({"sampling__text_temperature": math.nan}, "sampling.text_temperature must be a number of at least 0"),
            ({"loss__streams": "all"}, "loss.streams 'all'"),
            ({"training__batch_size": 3, "training__microbatch": 2}, "no multiple of training.microbatch 2"),
            ({"reference__mode": "lora_off"}, "needs adapters"),
            ({"loss__label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
            ({"optimiser__learning_rates__temporal": 0, "optimiser__learning_rates__embeddings": 0}, "nothing is left"),
            ({"optimiser__learning_rates__temporal": -1}, "learning_rates.temporal must be a number of at least 0"),
            ({"loss__gamma": 1}, "unknown configuration key 'loss.gamma'"),
            ({"lora__rank": 2, "lora__flavour": "dora"}, "lora.flavour 'dora'"),
        ],
    )
    def test_configuration(self, keys, message):
        with pytest.raises(InputError, match=message):
            config_of(**keys)

    def test_pairs_that_are_not_there(self, tmp_path):
        with pytest.raises(InputError, match="make them with rlhf-duplex pairs"):
            run(tmp_path)
        assert not (tmp_path / "run").exists()

    def test_no_training_pair(self, nano):
        held_out = [pair for pair in make_pairs(nano.lm) if pair.split == "heldout"]
        with pytest.raises(InputError, match="nothing to learn from"):
            split_pairs(held_out)

    def test_limit_of_held_out_pairs_is_by_kind(self, nano):
        train, held_out = split_pairs(make_pairs(nano.lm, 24), limit=1)
        assert len(train) == 18
        assert sorted(pair.kind for pair in held_out) == sorted(KINDS)

    def test_at_most_so_many_of_a_kind(self, nano):
        pairs = make_pairs(nano.lm, 24)
        whole, _ = split_pairs(pairs)
        train, held_out = split_pairs(pairs, at_most={"pause_handling": 2, "turn_taking": 99})
        assert [pair.kind for pair in train].count("pause_handling") == 2
        assert [p for p in train if p.kind != "pause_handling"] == [p for p in whole if p.kind != "pause_handling"]
        pauses = [pair for pair in whole if pair.kind == "pause_handling"]
        assert [pair for pair in train if pair.kind == "pause_handling"] == [pauses[0], pauses[len(pauses) // 2]]
        assert len(held_out) == 6

    def test_a_limit_on_a_kind_that_no_pair_has_is_kept(self, nano):
        pairs = make_pairs(nano.lm)
        assert split_pairs(pairs, at_most={"backchannel": 2}) == split_pairs(pairs)

    def test_a_limit_that_leaves_nothing(self, nano):
        with pytest.raises(InputError, match="leaves no training pair"):
            split_pairs(make_pairs(nano.lm), at_most=dict.fromkeys(KINDS, 0))

    def test_a_limit_on_what_is_no_kind(self):
        with pytest.raises(InputError, match=r"training\.at_most\.pause is not a kind of pair: choose "):
            config_of(training__at_most__pause=2)
