"""RL from a warm start: its checkpoint is the policy and the reference, with adapters and without."""

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from envs.errors import InputError
from envs.segments import write_manifest
from rlhf_duplex.checkpoint import last_checkpoint
from rlhf_duplex.config import OptimiserConfig, TrainerConfig, load_config
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.lora import add_lora, merged_weights, part_of
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.run import train
from rlhf_duplex.tracking import read_metrics

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The run folder of a warm start: two checkpoints that are not nano."""
    folder = tmp_path_factory.mktemp("warm")
    bundle = load_bundle("nano")
    generator = torch.Generator().manual_seed(0)
    for step in (4, 9):
        for parameter in bundle.lm.parameters():
            # A little: far from nano it only babbles, all its rewards are equal, and nothing is learnt.
            parameter.data += 0.005 * torch.randn(parameter.shape, generator=generator)
        bundle.save(folder / "checkpoints" / f"step_{step:06d}")
    return folder


def codes_of(lm):
    return torch.randint(0, 256, (2, 17, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_warm_start_and_stays_it(warm, rank):
    bundle = load_bundle(str(warm))
    newest = load_bundle(str(warm / "checkpoints" / "step_000009"))
    assert torch.equal(bundle.lm.text_linear.weight, newest.lm.text_linear.weight)
    if rank:
        add_lora(bundle.lm, rank)
    learner = Learner(MoshiPolicy(bundle.lm), TrainerConfig(), OptimiserConfig(), seed=0)
    assert {part_of(name) == "lora" for name in learner.parameters} == {bool(rank)}
    for parameter in learner.parameters.values():
        parameter.data += 0.05
    codes = codes_of(bundle.lm)
    with torch.no_grad():
        reference = learner.reference.text_logits(codes)
        torch.testing.assert_close(reference, MoshiPolicy(newest.lm).text_logits(codes))
        assert (reference - MoshiPolicy(load_bundle("nano").lm).text_logits(codes)).abs().max() > 0.1  # not the base
        assert (reference - learner.policy.text_logits(codes)).abs().max() > 0.1  # nor what is trained


def test_weights_that_are_not_trained_are_shared_with_the_reference(warm):
    bundle = load_bundle(str(warm))
    add_lora(bundle.lm, 2)
    learner = Learner(MoshiPolicy(bundle.lm), TrainerConfig(), OptimiserConfig(), seed=0)
    shared = {id(value) for name, value in bundle.lm.named_parameters() if name not in learner.parameters}
    assert {id(value) for value in learner.reference.lm.parameters()} == shared


def configuration(warm, folder, one_of_each, *extra):
    write_manifest(folder / "segments.jsonl", one_of_each)
    return load_config(
        None,
        [
            f"checkpoint={warm}",
            f"segments={folder / 'segments.jsonl'}",
            f"run_dir={folder / 'run'}",
            "trainer.updates=2",
            "trainer.groups=1",
            "trainer.group_size=2",
            "trainer.minibatch=2",
            "checkpointing.every=1",
            "checkpointing.keep=9",
            "context.lead_in=0.4",
            "evaluation.limit=1",
            "evaluation.episodes=0",
            "optimiser.warmup_updates=0",
            *extra,
        ],
    )


@pytest.mark.parametrize("flavour", ["moshi", "peft"])
def test_a_run_with_adapters_begins_at_the_warm_start_and_resumes(warm, tmp_path, one_of_each, flavour):
    lora = ["lora.rank=4", f"lora.flavour={flavour}", "optimiser.learning_rate=0.01"]
    segment = [s for s in one_of_each if s.axis == "turn_taking"]
    run_dir = train(configuration(warm, tmp_path, segment, *lora), QUIET)
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert lines[0]["frac_zero_std/turn_taking"] == 0  # there is something to learn in the first update
    assert lines[0]["ratio_first"] == pytest.approx(1, abs=1e-4)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)  # to the reference, before any step: the policy is it
    assert lines[1]["kl"] > 1e-6
    start, end = (load_file(run_dir / "checkpoints" / f"step_00000{n}" / "model.safetensors") for n in (0, 2))
    newest = load_bundle(str(warm)).lm.state_dict()
    assert start.keys() == newest.keys()
    assert all(torch.equal(start[name], newest[name]) for name in newest)
    assert not torch.equal(end["text_linear.weight"], newest["text_linear.weight"])
    assert torch.equal(end["text_emb.weight"], newest["text_emb.weight"])
    # Cut back to the first update and gone on with: the same end, to the bit.
    (run_dir / "checkpoints" / "step_000002").rename(tmp_path / "straight")
    train(configuration(warm, tmp_path, segment, *lora, "resume=true"), QUIET)
    for name in ("model.safetensors", "lora.safetensors", "optimiser.safetensors"):
        straight, resumed = load_file(tmp_path / "straight" / name), load_file(last_checkpoint(run_dir) / name)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
    # On another model than the one it began from, adapters are refused.
    config = configuration(warm, tmp_path, segment, *lora, "resume=true", "trainer.updates=3")
    bundle = load_bundle(str(warm))
    bundle.lm.text_linear.weight.data += 1
    bundle.save(warm / "checkpoints" / "step_000010")
    try:
        with pytest.raises(InputError, match="is not what it was when this run began"):
            train(config, QUIET)
        (run_dir / "provenance.json").unlink()  # as an older version left it
        with pytest.raises(InputError, match="began from another model"):
            train(config, QUIET)
    finally:
        for path in sorted((warm / "checkpoints" / "step_000010").iterdir()):
            path.unlink()
        (warm / "checkpoints" / "step_000010").rmdir()


def test_merged_weights_of_a_plain_model_are_its_own(nano):
    weights = nano.lm.state_dict()
    merged = merged_weights(nano.lm)
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], weights[name]) for name in weights)
