"""The update in little memory is the update: logits by chunks, layers anew, adapters off, bfloat16 weights."""

import math

import pytest
import torch

from rlhf_duplex.algorithms.losses import entropy, exact_kl, masked_mean, truncated_weights
from rlhf_duplex.algorithms.objectives import Objective
from rlhf_duplex.batch import Batch
from rlhf_duplex.config import OptimiserConfig, PpoConfig, TrainerConfig
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.lora import add_lora, is_fresh, without_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.policy.scoring import _drift, score_text

FRAMES = 12
SETTLED = OptimiserConfig(learning_rate=1e-4, schedule="constant", warmup_updates=0)


def some_codes(lm, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, lm.card, (batch, 1 + lm.n_q, FRAMES), generator=generator)
    codes[:, 0, ::2] = lm.text_padding_token_id
    return codes


def stirred(scale=0.02, dtype=torch.float32):
    """Nano with other weights."""
    lm = load_bundle("nano", dtype=dtype).lm
    generator = torch.Generator().manual_seed(1)
    for parameter in lm.parameters():
        parameter.data += (scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return lm


def a_mask(batch=3):
    mask = torch.zeros(batch, FRAMES, dtype=torch.bool)
    for row in range(batch):
        mask[row, 2 + row : 8 + row] = True
    return mask


@pytest.mark.parametrize("at_once", [2**26, 480 * 5, 1])
def test_scores_and_gradients_do_not_depend_on_how_many_logits_are_held(nano, at_once):
    policy = MoshiPolicy(stirred(), Sampling(text_temperature=0.7, text_top_k=20))
    reference = MoshiPolicy(nano.lm, Sampling(text_temperature=0.7))
    codes, mask = some_codes(nano.lm), a_mask()
    tokens, distribution = policy.evaluate_actions(codes)
    with torch.no_grad():
        _, others = reference.evaluate_actions(codes)
    kl, goal = exact_kl(distribution, others), Objective("onsets", onset_frames=2)
    # By hand: which word, given that there is one, weighted by how likely that is.
    said = [torch.cat([d[..., : goal.silent], d[..., goal.silent + 1 :]], dim=-1) for d in (distribution, others)]
    which = exact_kl(*(d - d.logsumexp(dim=-1, keepdim=True) for d in said))
    words = said[0].exp().sum(dim=-1) * which
    done = goal.log_probs(distribution, codes[:, 0])
    weight = policy.lm.transformer.layers[0].self_attn.in_projs[0].weight
    (expected,) = torch.autograd.grad((tokens - kl)[mask].sum(), weight)
    scores = score_text(policy, codes, mask, reference, goal, at_once=at_once, word_kl=True)
    for ours, theirs in (
        (scores.tokens, tokens),
        (scores.done, done),
        (scores.kl, kl),
        (scores.word_kl, words),
        (scores.entropy, entropy(distribution)),
    ):
        torch.testing.assert_close(ours[mask], theirs[mask])
        assert (ours[~mask] == 0).all()
    assert kl[mask].min() > 1e-4
    assert words[mask].max() > 1e-4
    assert not torch.allclose(done[mask], tokens[mask])
    (found,) = torch.autograd.grad((scores.tokens - scores.kl).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_more_logits_are_kept_than_are_held_at_once(nano):
    """What autograd keeps of a pass: with chunks, no tensor of all frames by all tokens."""
    policy, codes, mask = MoshiPolicy(nano.lm), some_codes(nano.lm), a_mask()
    rows = int(mask.sum())

    def kept(at_once):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            score_text(policy, codes, mask, at_once=at_once).tokens.sum()
        return {shape for shape in shapes if shape[-1:] == (480,) and len(shape) == 2}

    assert (rows, 480) in kept(2**26)
    assert kept(480 * 5) <= {(480, 128)}


def test_layers_computed_anew_give_the_same_update(nano):
    results = []
    for anew in (False, True):
        learner = Learner(MoshiPolicy(stirred(0)), TrainerConfig(minibatch=4, gradient_checkpointing=anew), SETTLED, 0)
        assert learner.policy.lm.transformer.checkpointing is anew
        assert not learner.reference.lm.transformer.checkpointing
        learner.update(a_batch(learner.policy, 4), 0)
        results.append({name: value.clone() for name, value in learner.policy.lm.state_dict().items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def a_batch(policy, rows, shift=0.0):
    codes, mask = some_codes(policy.lm, rows), a_mask(rows)
    with torch.no_grad():
        log_probs, _ = policy.evaluate_actions(codes)
    return Batch(codes, log_probs + shift, mask, torch.linspace(-1, 1, rows))


@pytest.mark.parametrize("flavour", ["moshi", "peft"])
def test_the_reference_of_adapters_is_the_model_with_them_off(flavour, nano):
    lm = load_bundle("nano").lm
    add_lora(lm, 4, 2.0, flavour)
    assert is_fresh(lm)
    learner = Learner(MoshiPolicy(lm), TrainerConfig(), SETTLED, 0)
    names = dict(learner.reference.lm.named_parameters())
    assert set(names) == {name for name, _ in nano.lm.named_parameters()}  # no adapter is computed
    ours = {id(parameter) for parameter in lm.parameters()}
    assert all(id(parameter) in ours for parameter in names.values())  # no second model in memory
    codes = some_codes(lm)
    learner.update(a_batch(learner.policy, 3), 0)
    assert not is_fresh(lm)
    with torch.no_grad():
        torch.testing.assert_close(learner.reference.text_logits(codes), MoshiPolicy(nano.lm).text_logits(codes))
        assert (learner.policy.text_logits(codes) - learner.reference.text_logits(codes)).abs().max() > 1e-4


def test_adapters_that_are_not_fresh_stay_in_the_reference():
    lm = load_bundle("nano").lm
    add_lora(lm, 4)
    for name, parameter in lm.named_parameters():
        if ".lora_B" in name:
            parameter.data += 0.05
    codes = some_codes(lm)
    learner = Learner(MoshiPolicy(lm), TrainerConfig(), SETTLED, 0)
    with torch.no_grad():
        torch.testing.assert_close(learner.reference.text_logits(codes), learner.policy.text_logits(codes))
        without_lora(lm)
        assert (MoshiPolicy(lm).text_logits(codes) - learner.reference.text_logits(codes)).abs().max() > 1e-2


class TestBfloat16:
    def test_small_steps_add_up_in_the_float32_copies(self):
        lm = load_bundle("nano", dtype=torch.bfloat16).lm
        optimiser = OptimiserConfig(learning_rate=1e-6, schedule="constant", warmup_updates=0)
        learner = Learner(MoshiPolicy(lm), TrainerConfig(minibatch=4), optimiser, 0)
        name = "text_linear.weight"
        before = learner.masters[name].detach().clone()
        assert before.dtype == torch.float32
        for update in range(3):
            result = learner.update(a_batch(learner.policy, 4), update)
            assert math.isfinite(result["loss"])
        moved = (learner.masters[name] - before).abs()
        # Adam's steps have the size of the rate; bfloat16 tells weights of 0.1 apart by 2^-12 = 2.4e-4.
        assert 1e-6 < moved.max() < 4e-6
        assert torch.equal(lm.text_linear.weight, learner.masters[name].to(torch.bfloat16))
        state = learner.state()
        assert state[f"exp_avg/{name}"].dtype == torch.float32
        again = Learner(MoshiPolicy(load_bundle("nano", dtype=torch.bfloat16).lm), TrainerConfig(), optimiser, 0)
        again.load_state(state)
        assert torch.equal(again.masters[name], learner.masters[name])

    def test_float32_weights_have_no_copy(self, nano):
        learner = Learner(MoshiPolicy(load_bundle("nano").lm), TrainerConfig(), SETTLED, 0)
        assert all(learner.masters[name] is parameter for name, parameter in learner.parameters.items())
        assert not learner.state()

    def test_log_probs_are_float32_and_near_those_of_float32_weights(self, nano):
        codes, mask = some_codes(nano.lm), a_mask()
        with torch.no_grad():
            half = score_text(MoshiPolicy(load_bundle("nano", dtype=torch.bfloat16).lm), codes, mask)
            whole = score_text(MoshiPolicy(nano.lm), codes, mask)
        assert half.tokens.dtype == torch.float32
        assert (half.tokens - whole.tokens).abs().max() < 0.3


class TestImportance:
    def test_by_hand(self):
        # Ratios 1/2, 3, 1 and, outside the mask, whatever: at most 2.
        trained, drawn = torch.tensor([[0.1, 0.6, 0.2, 0.9]]).log(), torch.tensor([[0.2, 0.2, 0.2, 0.01]]).log()
        mask = torch.tensor([[True, True, True, False]])
        torch.testing.assert_close(truncated_weights(trained, drawn, mask, 2.0), torch.tensor([[0.5, 2.0, 1.0, 1.0]]))

    def test_the_mismatch_is_measured_and_weighed_not_clipped_away(self):
        """Drawn at half the probability that they have now: a ratio of 2 everywhere, which plain GRPO clips."""
        results = {}
        for importance in ("none", "truncated"):
            config = TrainerConfig(minibatch=4, importance=importance, importance_cap=1.5, kl_beta=0.0)
            learner = Learner(MoshiPolicy(stirred(0)), config, SETTLED, 0)
            batch = a_batch(learner.policy, 4, shift=-math.log(2))
            # Of one sign, so that the loss tells the weight of a token.
            batch = Batch(batch.codes, batch.log_probs, batch.mask, torch.ones(4))
            results[importance] = learner.update(batch, 0)
        for result in results.values():
            assert result["mismatch/ratio_mean"] == pytest.approx(2, rel=1e-4)
            assert result["mismatch/ratio_max"] == pytest.approx(2, rel=1e-4)
            assert result["mismatch/kl"] == pytest.approx(1 - math.log(2), rel=1e-3)
        assert results["none"]["clip_fraction"] == pytest.approx(1)
        assert results["none"]["loss"] == pytest.approx(-1.2, rel=1e-4)  # min(2, 1.2): no gradient is left
        assert results["none"]["grad_norm"] == pytest.approx(0, abs=1e-7)
        assert results["truncated"]["clip_fraction"] == 0
        assert results["truncated"]["loss"] == pytest.approx(-1.5, rel=1e-4)  # 1 times the cap
        assert results["truncated"]["grad_norm"] > 1e-3
        assert results["truncated"]["ratio_first"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kl_beta": 0.5}, lambda scores, onsets: scores.kl),
        ({"sentence_kl_beta": 0.5}, lambda scores, onsets: scores.kl * ~onsets),
        ({"objective": "onsets", "opening_kl_beta": 0.5}, lambda scores, onsets: scores.word_kl * onsets),
        ({"audio_beta": 0.5}, lambda scores, onsets: scores.drift),
    ],
    ids=lambda value: next((name for name in value if name.endswith("beta")), "") if isinstance(value, dict) else "",
)
def test_penalties_are_in_the_loss_with_their_sign_and_weight(options, part):
    """Without any advantage the loss is half the mean distance to the reference, and steps reduce it."""
    config = TrainerConfig(**({"kl_beta": 0.0, "minibatch": 4, "onset_frames": 1} | options))
    learner = Learner(MoshiPolicy(load_bundle("nano").lm), config, SETTLED, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.policy.lm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    codes, mask = some_codes(learner.policy.lm, 4), a_mask(4)
    onsets = learner.objective.onsets(codes[:, 0])
    assert onsets[mask].any()
    assert not onsets[mask].all()

    def distance():
        with torch.no_grad():
            scores = score_text(
                learner.policy, codes, mask, learner.reference, learner.objective, drift=True, word_kl=True
            )
            return masked_mean(part(scores, onsets), mask).mean().item()

    with torch.no_grad():
        drawn = score_text(learner.policy, codes, mask).tokens
    before = distance()
    assert before > 1e-3
    losses = [learner.update(Batch(codes, drawn, mask, torch.zeros(4)), update)["loss"] for update in range(3)]
    assert losses[0] == pytest.approx(0.5 * before, rel=1e-3)
    assert distance() < before


def test_drift_by_hand(nano):
    # |(1, 2) - (1, 0)|^2 / |(1, 0)|^2 = 4; |(0, 3) - (3, 4)|^2 / 25 = 10 / 25.
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert _drift(ours, theirs).tolist() == pytest.approx([4.0, 0.4])


def test_ppo_raises_what_was_rewarded_and_learns_its_values():
    trainer = TrainerConfig(algorithm="ppo", minibatch=8, kl_beta=0.0)
    learner = Learner(MoshiPolicy(stirred(0)), trainer, SETTLED, 0, ppo=PpoConfig(value_learning_rate=1e-2))
    batch = a_batch(learner.policy, 8)
    rewards = torch.tensor([1.0, -1.0] * 4)
    batch = Batch(batch.codes, batch.log_probs, batch.mask, rewards)
    found = [learner.update(batch, update) for update in range(6)]
    with torch.no_grad():
        log_probs, _ = learner.policy.evaluate_actions(batch.codes)
    gain = torch.where(batch.mask, log_probs - batch.log_probs, 0.0).sum(dim=1)
    assert gain[rewards > 0].sum() > 0 > gain[rewards < 0].sum()
    assert found[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert found[-1]["explained_variance"] > 0.3


def test_a_gradient_is_clipped_to_the_norm_that_is_configured():
    moved = []
    for clip_norm in (1e9, 1e-9):  # far below Adam's eps of 1e-8: clipped, a step is hardly one
        optimiser = OptimiserConfig(
            learning_rate=1e-4, schedule="constant", warmup_updates=0, clip_norm=clip_norm, weight_decay=0.0
        )
        learner = Learner(MoshiPolicy(stirred(0)), TrainerConfig(minibatch=4), optimiser, 0)
        before = learner.policy.lm.text_linear.weight.clone()
        learner.update(a_batch(learner.policy, 4), 0)
        moved.append((learner.policy.lm.text_linear.weight - before).abs().max().item())
    assert moved[0] == pytest.approx(1e-4, rel=0.1)
    assert moved[1] < 1e-5


def test_values_are_of_their_own_frames(nano):
    policy, codes, mask = MoshiPolicy(nano.lm), some_codes(nano.lm), a_mask()
    with torch.no_grad():
        expected = policy.text_hidden(codes).sum(dim=-1)
        found = score_text(policy, codes, mask, critic=lambda hidden: hidden.sum(dim=-1)).values
    torch.testing.assert_close(found[mask], expected[mask])
    assert (found[~mask] == 0).all()
