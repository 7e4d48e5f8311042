"""Parity of the policy: acting, evaluating, and moshi's own classes must agree."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMGen, LMModel
from safetensors.torch import load_file

from envs.errors import InputError
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling, draw, log_distribution

MOSHI_ASSET = Path(__file__).parents[2].parent / "shared" / "data" / "moshi_lm"
GREEDY = Sampling(text_temperature=0.0, audio_temperature=0.0)


def small_model(delays, dep_q, seed=0, text_card=30, **changes):
    """A random LMModel of the real class with any delays."""
    torch.manual_seed(seed)
    arguments = {
        "delays": delays,
        "n_q": len(delays) - 1,
        "dep_q": dep_q,
        "card": 20,
        "text_card": text_card,
        "dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "hidden_scale": 2,
        "norm": "rms_norm_f32",
        "gating": "silu",
        "positional_embedding": "rope",
        "context": 64,
        "depformer_dim": 16,
        "depformer_dim_feedforward": 32,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_multi_linear": True,
        "depformer_weights_per_step": True,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
    }
    return LMModel(**{**arguments, **changes}).eval()


def user_codes(model, agent, batch, frames, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.card, (batch, model.n_q - agent, frames), generator=generator)


def act_all(policy, codes, seeds=None):
    """Actions `(B, T, 1 + agent)` and the trajectory of a whole dialogue."""
    batch, _, frames = codes.shape
    policy.begin(seeds or list(range(batch)), frames)
    actions = torch.stack([policy.act(codes[:, :, t]) for t in range(frames)], dim=1)
    trajectory = policy.trajectory()
    policy.end()
    return actions, trajectory


def stock_greedy(model, codes):
    """What stock LMGen answers, frame by frame: None until its delay is over."""
    generator = LMGen(model, use_sampling=False)
    with torch.no_grad(), generator.streaming(codes.shape[0]):
        outputs = [generator.step(codes[:, :, t : t + 1]) for t in range(codes.shape[-1])]
    model.set_streaming_detached(False)  # LMGen detaches the model from its container; put it back
    return outputs


@pytest.mark.parametrize(("delays", "dep_q"), [([0, 0, 1, 0, 1], 2), ([0, 0, 0, 0, 0], 2), ([0, 0, 2, 1, 3], 2)])
def test_greedy_act_is_stock_lmgen_token_for_token(delays, dep_q):
    model = small_model(delays, dep_q)
    codes = user_codes(model, dep_q, batch=3, frames=20)
    expected = stock_greedy(model, codes)
    actions, _ = act_all(MoshiPolicy(model, GREEDY), codes)
    answered = [t for t, output in enumerate(expected) if output is not None]
    assert answered == list(range(max(delays), 20))
    for t in answered:
        assert torch.equal(actions[:, t], expected[t][:, :, 0])
    for t in range(max(delays)):  # nothing yet: the values beyond the vocabularies
        assert (actions[:, t, 0] == model.text_card).all()
        assert (actions[:, t, 1:] == model.card).all()


def test_greedy_act_of_nano_is_stock_lmgen_token_for_token(nano):
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, batch=2, frames=40)
    expected = stock_greedy(nano.lm, codes)
    actions, _ = act_all(MoshiPolicy(nano.lm, GREEDY), codes)
    for t in range(1, 40):
        assert torch.equal(actions[:, t], expected[t][:, :, 0])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(text_temperature=1.3, text_top_k=5), Sampling(text_temperature=0.0)]
)
def test_streaming_and_teacher_forced_log_probs_agree(nano, sampling):
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, batch=4, frames=50)
    policy = MoshiPolicy(nano.lm, sampling)
    _, trajectory = act_all(policy, codes)
    with torch.no_grad():
        log_probs, distribution = policy.evaluate_actions(trajectory.codes)
    assert (log_probs - trajectory.log_probs).abs().max() < 1e-4
    assert (log_probs - trajectory.log_probs).exp().sub(1).abs().max() < 1e-4  # the ratio at step 0
    assert torch.allclose(distribution.exp().sum(-1), torch.ones(4, 50), atol=1e-5)


@pytest.mark.parametrize("delays", [[0, 0, 1, 0, 1], [0, 0, 2, 1, 3]])
def test_agreement_with_other_delays(delays):
    model = small_model(delays, 2)
    policy = MoshiPolicy(model, Sampling())
    _, trajectory = act_all(policy, user_codes(model, 2, batch=3, frames=25))
    with torch.no_grad():
        log_probs, _ = policy.evaluate_actions(trajectory.codes)
    assert (log_probs - trajectory.log_probs).abs().max() < 1e-4


def test_text_logits_are_those_of_the_whole_forward(nano):
    _, trajectory = act_all(MoshiPolicy(nano.lm), user_codes(nano.lm, nano.codec.agent_codebooks, 2, 30))
    with torch.no_grad():
        ours = MoshiPolicy(nano.lm).text_logits(trajectory.codes)
        whole = nano.lm(trajectory.codes)
    assert whole.text_mask.all()
    assert torch.equal(ours, whole.text_logits[:, 0])


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small_model([0, 0, 1, 0, 1], 2, gradient_checkpointing=checkpointing)
        codes = torch.randint(0, 20, (2, 5, 12), generator=torch.Generator().manual_seed(3))
        MoshiPolicy(model).evaluate_actions(codes)[0].sum().backward()
        gradients.append(model.transformer.layers[0].self_attn.in_projs[0].weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_text_logits_against_moshis_own_asset():
    if not MOSHI_ASSET.is_dir():
        pytest.skip("moshi's parity asset (../shared/data/moshi_lm) is not here: an extra to the tests above")
    model = LMModel(
        delays=[0, 1, 2, 4],
        n_q=3,
        dep_q=3,
        card=32,
        text_card=48,
        dim=16,
        num_layers=2,
        num_heads=1,
        hidden_scale=1,
        depformer_dim=16,
        depformer_multi_linear=True,
        depformer_weights_per_step=True,
        depformer_weights_per_step_schedule=[0, 1, 1],
        depformer_low_rank_embeddings=8,
        depformer_num_heads=1,
        depformer_gating="silu",
        context=4,
    )
    model.load_state_dict(load_file(MOSHI_ASSET / "test_lm_model.safetensors"))
    codes = load_file(MOSHI_ASSET / "test_lm_codes.safetensors")["codes"]
    expected = load_file(MOSHI_ASSET / "test_lm_out.safetensors")
    with torch.no_grad():
        ours = MoshiPolicy(model.eval()).text_logits(codes)
    mask = expected["text_mask"][:, 0]
    assert mask.any()
    assert torch.allclose(ours[mask], expected["text_logits"][:, 0][mask], atol=1e-5)


def unbounded_greedy(model, codes):
    """Tokens and text log-probabilities of stock LMGen, whose cache holds the model's whole context."""
    logits = []
    generator = LMGen(model, use_sampling=False, on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].float()))
    tokens = []
    with torch.no_grad(), generator.streaming(codes.shape[0]):
        capacity = model.transformer.layers[0].self_attn._streaming_state.kv_cache.capacity
        for t in range(codes.shape[-1]):
            tokens.append(generator.step(codes[:, :, t : t + 1]))
    model.set_streaming_detached(False)
    return tokens, torch.stack(logits, dim=1).log_softmax(-1), capacity


def test_a_cache_of_the_episodes_length_equals_an_unbounded_one(nano):
    frames = 60
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, 3, frames)
    tokens, expected, capacity = unbounded_greedy(nano.lm, codes)
    assert capacity == nano.lm.context > frames  # stock attends over more than there is
    policy = MoshiPolicy(nano.lm, GREEDY)
    actions, trajectory = act_all(policy, codes)
    delay = policy.max_delay
    assert all(torch.equal(actions[:, t], tokens[t][:, :, 0]) for t in range(delay, frames))
    text = trajectory.codes[:, 0]
    difference = trajectory.log_probs - expected.gather(-1, text[..., None])[..., 0]
    assert difference.abs().max() < 1e-4
    policy.begin([0, 1, 2], frames)
    assert policy._stream.step.temporal._layers[0]._cache.shape[3] == frames
    policy.end()


def test_dialogues_that_end_change_nothing_for_the_others_and_are_not_computed(nano):
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, 4, 30)
    policy = MoshiPolicy(nano.lm, Sampling())
    together, whole = act_all(policy, codes, [7, 8, 9, 10])
    lengths = [30, 12, 20, 5]
    policy.begin([7, 8, 9, 10], lengths)
    actions = torch.stack([policy.act(codes[:, :, t]) for t in range(30)], dim=1)
    trajectory = policy.trajectory()
    computed = policy._stream.going
    policy.end()
    # The second row goes along while the third, which stands after it, still has frames.
    assert computed == [4] * 5 + [3] * 15 + [1] * 10
    for row, length in enumerate(lengths):
        assert torch.equal(actions[row, :length], together[row, :length])
        assert torch.equal(trajectory.codes[row, 0, :length], whole.codes[row, 0, :length])
        assert torch.allclose(trajectory.log_probs[row, :length], whole.log_probs[row, :length], atol=1e-5)
    assert (actions[3, 8:, 0] == nano.lm.text_card).all()
    assert (actions[3, 8:, 1:] == nano.lm.card).all()
    assert (trajectory.codes[3, :, 8:] == -1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer_norm", "gating": "none", "positional_embedding": "sin", "layer_scale": 0.3},
        {"positional_embedding": "rope_concat", "kv_repeat": 2, "norm": "rms_norm"},
        {"depformer_multi_linear": False, "depformer_pos_emb": "sin", "depformer_norm": "layer_norm"},
        {"context": 4},
        {"depformer_weights_per_step_schedule": [0, 1, 1], "depformer_low_rank_embeddings": 8, "norm_emb": True},
    ],
)
def test_every_kind_of_layer_acts_and_is_evaluated_as_in_stock_moshi(changes):
    model = small_model([0, 0, 1, 1, 0, 1, 1], 3, **changes)
    codes = user_codes(model, 3, batch=3, frames=15)
    expected = stock_greedy(model, codes)
    policy = MoshiPolicy(model, GREEDY)
    actions, trajectory = act_all(policy, codes)
    assert all(torch.equal(actions[:, t], expected[t][:, :, 0]) for t in range(1, 15))
    with torch.no_grad():
        whole = model(trajectory.codes)
        assert torch.allclose(policy.text_logits(trajectory.codes), whole.text_logits[:, 0], atol=1e-5)


def test_a_context_shorter_than_the_episode_is_kept():
    model = small_model([0, 0, 1, 0, 1], 2, context=8)
    codes = user_codes(model, 2, 2, 30)
    expected = stock_greedy(model, codes)
    actions, _ = act_all(MoshiPolicy(model, GREEDY), codes)
    assert all(torch.equal(actions[:, t], expected[t][:, :, 0]) for t in range(1, 30))


def test_an_episode_is_the_same_in_any_order_and_batch(nano):
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, 4, 30)
    policy = MoshiPolicy(nano.lm, Sampling())
    together, trajectory = act_all(policy, codes, [7, 8, 9, 10])
    swapped, _ = act_all(policy, codes[[2, 0]], [9, 7])
    alone, lone = act_all(policy, codes[1:2], [8])
    assert torch.equal(together[[2, 0]], swapped)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(trajectory.codes[1:2], lone.codes)


def test_acting_needs_a_dialogue_and_ends_with_it(nano):
    policy = MoshiPolicy(nano.lm)
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, 1, 2)
    with pytest.raises(RuntimeError, match="call begin first"):
        policy.act(codes[:, :, 0])
    policy.begin([0], 1)
    policy.act(codes[:, :, 0])
    with pytest.raises(RuntimeError, match="used up"):
        policy.act(codes[:, :, 1])
    policy.end()


def test_a_delayed_text_stream_is_refused():
    with pytest.raises(InputError, match="delayed by 1 frames"):
        MoshiPolicy(small_model([1, 0, 0, 0, 0], 2))


def test_drawing_inverts_the_cumulative_distribution():
    # p = 0.2, 0.3, 0.5: the cumulative distribution is 0.2, 0.5, 1.0
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(5, 3)
    uniform = torch.tensor([0.1, 0.19, 0.21, 0.49, 0.99])
    assert draw(logits, uniform, 1.0).tolist() == [0, 0, 1, 1, 2]
    # temperature 0.5 squares: 0.04, 0.09, 0.25 of 0.38: cumulative 0.105, 0.342, 1
    assert draw(logits, torch.tensor([0.1, 0.11, 0.34, 0.35, 1.0]), 0.5).tolist() == [0, 1, 1, 2, 2]
    # top-2 leaves 0.3 and 0.5: cumulative 0, 0.375, 1
    assert draw(logits, torch.tensor([1e-6, 0.37, 0.38, 0.5, 1.0]), 1.0, 2).tolist() == [1, 1, 2, 2, 2]
    assert draw(logits, uniform, 0.0).tolist() == [2] * 5


def test_recorded_distribution_is_the_one_sampled_from():
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    tempered = log_distribution(logits, 0.5).exp()
    assert torch.allclose(tempered, torch.tensor([[0.04, 0.09, 0.25]]) / 0.38)
    cut = log_distribution(logits, 1.0, 2).exp()
    assert torch.allclose(cut, torch.tensor([[0.0, 0.375, 0.625]]))
    kept = log_distribution(logits, 1.0, 2, keep=torch.tensor([0])).exp()
    assert torch.allclose(kept, torch.tensor([[0.2, 0.3, 0.5]]))


@pytest.mark.parametrize("changes", [{}, {"context": 6}, {"positional_embedding": "sin", "norm": "layer_norm"}])
def test_frames_of_fixed_shape_are_the_same_frames(changes, monkeypatch):
    """What CUDA graphs replay, on a CPU: the position a tensor, the cache read behind a mask, rows halved."""
    monkeypatch.setattr("rlhf_duplex.policy.moshi.SEEN_TOGETHER", 8)
    model = small_model([0, 0, 1, 0, 1], 2, **changes)
    codes = user_codes(model, 2, batch=5, frames=27)
    lengths = [27, 20, 12, 9, 3]
    results = []
    for fixed in (False, True):
        policy = MoshiPolicy(model, Sampling(), fixed=fixed)
        policy.begin([3, 1, 4, 1, 5], lengths)
        actions = torch.stack([policy.act(codes[:, :, t]) for t in range(27)], dim=1)
        results.append((actions, policy.trajectory()))
        used = set(policy._stream.graphs)
        policy.end()
    assert used == {(5, 8), (5, 16), (3, 16), (2, 16), (2, 24), (1, 24), (1, 32)}
    (plain, expected), (actions, trajectory) = results
    for row, length in enumerate(lengths):
        assert torch.equal(actions[row, :length], plain[row, :length])
        assert torch.equal(trajectory.codes[row, 0, :length], expected.codes[row, 0, :length])
        assert torch.allclose(trajectory.log_probs[row, :length], expected.log_probs[row, :length], atol=1e-5)


def test_kept_caches_begin_anew(nano):
    codes = user_codes(nano.lm, nano.codec.agent_codebooks, 3, 20)
    policy = MoshiPolicy(nano.lm, Sampling(), fixed=True)
    expected, _ = act_all(policy, codes[:, :, :15], [7, 8, 9])
    policy.begin([1, 2, 3], 20)
    for t in range(20):
        policy.act(codes[:, :, t])
    room = policy._stream
    policy.end(keep=True)
    actions, _ = act_all(policy, codes[:, :, :15], [7, 8, 9])
    assert torch.equal(actions, expected)
    policy.begin([1, 2, 3], 20)
    policy.end(keep=True)
    policy.begin([1, 2, 3], 18)
    assert policy._stream.step is not room.step  # `act_all` freed it
    kept = policy._stream
    policy.end(keep=True)
    policy.begin([4, 5, 6], 20)
    assert policy._stream.step is kept.step
    policy.act(codes[:, :, 0])
    policy.act(codes[:, :, 1])
    assert policy._stream.graphs
    gone = weakref.ref(policy._stream)
    del room, kept
    gc.disable()  # caches of many GB must not wait for a collector
    try:
        policy.end()
        assert gone() is None
    finally:
        gc.enable()
    assert policy._kept is None


def test_every_codebook_has_a_norm_of_its_own():
    model = small_model([0, 0, 1, 1, 0, 1, 1], 3, depformer_norm="layer_norm")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.depformer_norms.parameters():  # all the same when they are made
            parameter += torch.randn(parameter.shape, generator=generator)
    codes = user_codes(model, 3, batch=3, frames=15)
    expected = stock_greedy(model, codes)
    actions, _ = act_all(MoshiPolicy(model, GREEDY), codes)
    assert all(torch.equal(actions[:, t], expected[t][:, :, 0]) for t in range(1, 15))
