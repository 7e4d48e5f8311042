"""The GRPO loss by hand, and what it must not do."""

import math

import pytest
import torch

from rlhf_duplex.algorithms.losses import entropy, exact_kl, grpo_loss, masked_mean
from rlhf_duplex.algorithms.objectives import Objective, onset_mask, speaking_log_probs


def test_loss_by_hand():
    # Two episodes, advantages +1 and -2; ratios chosen, frame 3 of the first episode masked.
    ratio = torch.tensor([[1.0, 1.5, 9.9], [0.5, 1.1, 1.3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.tensor([[0.1, 0.3, 7.0], [0.2, 0.2, 0.2]])
    loss, diagnostics = grpo_loss(ratio.log(), torch.zeros(2, 3), torch.tensor([1.0, -2.0]), kl, mask, 0.2, 0.5)
    # Episode 1, A = 1: min(1, 1) = 1; min(1.5, 1.2) = 1.2; mean 1.1; KL mean 0.2.
    # Episode 2, A = -2: min(-1.0, 0.8 * -2) = -1.6; min(-2.2, -2.2) = -2.2; min(-2.6, -2.4) = -2.6; mean -6.4 / 3.
    expected = -((1.1 - 0.5 * 0.2) + (-6.4 / 3 - 0.5 * 0.2)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    # Outside 0.8..1.2: one of two frames, two of three.
    assert diagnostics["clip_fraction"].item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert diagnostics["ratio_max"].item() == pytest.approx(1.5)  # the masked 9.9 does not count
    assert diagnostics["kl"].item() == pytest.approx(0.2)


def test_gradient_by_hand():
    # At ratio 1 the gradient of the loss to a log-probability is -A / (B N), whatever the clipping.
    log_probs = torch.zeros(2, 2, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, _ = grpo_loss(log_probs, torch.zeros(2, 2), torch.tensor([1.0, -3.0]), torch.zeros(2, 2), mask)
    loss.backward()
    assert torch.allclose(log_probs.grad, torch.tensor([[-0.25, -0.25], [1.5, 0.0]]))


def test_clipped_frames_have_no_gradient():
    log_probs = torch.tensor([[math.log(1.5)]], requires_grad=True)
    loss, _ = grpo_loss(log_probs, torch.zeros(1, 1), torch.tensor([1.0]), torch.zeros(1, 1), torch.ones(1, 1).bool())
    loss.backward()
    assert log_probs.grad.item() == 0.0


def test_garbage_outside_the_mask_stays_outside():
    log_probs = torch.tensor([[0.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    kl = torch.tensor([[0.0, float("nan")]])
    loss, _ = grpo_loss(log_probs, torch.zeros(1, 2), torch.tensor([2.0]), kl, mask)
    loss.backward()
    assert loss.item() == pytest.approx(-2.0)
    assert log_probs.grad.tolist() == [[-2.0, 0.0]]


def test_kl_and_entropy_by_hand():
    policy = torch.tensor([0.5, 0.5, 0.0]).log()
    reference = torch.tensor([0.25, 0.5, 0.25]).log()
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.5) + 0 = 0.5 ln 2
    assert exact_kl(policy, reference).item() == pytest.approx(0.5 * math.log(2))
    assert exact_kl(policy, policy).item() == pytest.approx(0.0)
    assert entropy(policy).item() == pytest.approx(math.log(2))


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.tensor([[5.0]]), torch.tensor([[False]])).item() == 0.0


def test_microbatches_add_up():
    torch.manual_seed(0)
    log_probs, kl = torch.randn(6, 5) * 0.1, torch.rand(6, 5)
    mask, advantages = torch.rand(6, 5) > 0.3, torch.randn(6)
    whole, _ = grpo_loss(log_probs, torch.zeros(6, 5), advantages, kl, mask)
    parts = [
        grpo_loss(log_probs[i : i + 2], torch.zeros(2, 5), advantages[i : i + 2], kl[i : i + 2], mask[i : i + 2])[0]
        for i in (0, 2, 4)
    ]
    assert whole.item() == pytest.approx(sum(p.item() for p in parts) / 3, abs=1e-6)


def test_variants_by_hand():
    ratio = torch.tensor([[1.25, 1.6], [0.5, 1.0]])
    mask = torch.tensor([[True, True], [True, False]])
    zero, advantages = torch.zeros(2, 2), torch.tensor([2.0, -1.0])
    # Clip-higher: 1.25 stays below 1.28, 1.6 is cut to it; the lower side is cut at 0.8 as before.
    loss, diagnostics = grpo_loss(ratio.log(), zero, advantages, zero, mask, clip=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-((1.25 + 1.28) / 2 * 2.0 - 0.8) / 2)
    assert diagnostics["clip_fraction"].item() == pytest.approx((0.5 + 1.0) / 2)
    # GSPO: one ratio an episode, the geometric mean: sqrt(1.25 * 1.6) = sqrt 2, cut to 1.3; and 0.5, cut to 0.7.
    loss, _ = grpo_loss(ratio.log(), zero, advantages, zero, mask, clip=0.3, sequence_ratio=True)
    assert loss.item() == pytest.approx(-(1.3 * 2.0 - 0.7) / 2)
    # Dr. GRPO: sums over 4 instead of means over the episodes' own 2 and 1 frames; KL as well.
    kl = torch.full((2, 2), 0.5)
    loss, _ = grpo_loss(ratio.log(), zero, advantages, kl, mask, clip=0.2, kl_beta=0.1, length=4.0)
    assert loss.item() == pytest.approx(-((1.2 + 1.2) * 2.0 / 4 - 0.8 / 4 - 0.1 * 0.5 * (2 + 1) / 4) / 2)


def test_advantages_by_frame_are_those_of_each_frame():
    advantages = torch.tensor([[1.0, -3.0]])
    loss, _ = grpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), advantages, torch.zeros(1, 2), torch.ones(1, 2).bool())
    assert loss.item() == pytest.approx(1.0)


def test_silent_and_speaking_by_hand():
    policy = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.25, 0.75, 0.0]]).log()
    projected = speaking_log_probs(policy, silent=2).exp()
    assert torch.allclose(projected, torch.tensor([[0.3, 0.7], [0.75, 0.25]]))
    # Silence is all that `text_top_k` left: nothing speaks, and the gradient is a number.
    only = torch.tensor([[0.0, -math.inf, -math.inf]], requires_grad=True)
    speaking = speaking_log_probs(only, silent=0)
    assert speaking.exp().tolist() == [[1.0, 0.0]]
    speaking[..., 0].sum().backward()
    assert only.grad.tolist() == [[1.0, 0.0, 0.0]]
    choices = Objective("onsets", silent=0, announcing=1, apart=(2,)).choices(only)
    assert choices.exp().tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_kl_is_the_sum_of_timing_and_words():
    # The chain rule: KL = KL{silent, speak} + P(speak) KL of the token given that one is spoken.
    policy, reference = torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.2, 0.2, 0.6])
    timing = exact_kl(speaking_log_probs(policy.log(), 0), speaking_log_probs(reference.log(), 0))
    words = 0.5 * (0.8 * math.log(0.8 / 0.25) + 0.2 * math.log(0.2 / 0.75))
    assert (exact_kl(policy.log(), reference.log()) - timing).item() == pytest.approx(words, abs=1e-6)


def test_onsets_are_where_nothing_was_said_just_before():
    spoken = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0]]).bool()
    # Two silent frames are asked for: the first word's own frame is an onset, the second's after three silent ones too.
    assert onset_mask(spoken, 2).int().tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1]]
    assert onset_mask(spoken, 20).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]


def test_objectives_by_hand():
    # Vocabulary: 0 announces, 1 and 2 are words, 3 is silent. Frames: silent, a word, silent, another word.
    distribution = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(4, 4)[None]
    text = torch.tensor([[3, 1, 3, 2]])
    tokens = Objective("tokens").log_probs(distribution, text).exp()
    assert torch.allclose(tokens, torch.tensor([[0.4, 0.2, 0.4, 0.3]]))
    speaking = Objective("speaking").log_probs(distribution, text).exp()
    assert torch.allclose(speaking, torch.tensor([[0.4, 0.6, 0.4, 0.6]]))
    # Two frames of silence before: the first word is an onset, the second is not.
    onsets = Objective("onsets", onset_frames=2).log_probs(distribution, text).exp()
    assert torch.allclose(onsets, torch.tensor([[0.4, 0.2, 0.4, 0.6]]))
    # With token 1 apart, token 2 stands for all others; whether to begin is learned as before.
    apart = Objective("onsets", onset_frames=1, apart=(1,))
    assert torch.allclose(apart.choices(distribution)[0, 0].exp(), torch.tensor([0.4, 0.1, 0.2, 0.3]))
    assert torch.allclose(apart.log_probs(distribution, text).exp(), torch.tensor([[0.4, 0.2, 0.4, 0.3]]))
    with pytest.raises(ValueError, match="objective"):
        Objective("words")


def test_with_which_word_a_sentence_begins_gets_no_gradient_where_words_are_told_apart():
    # Vocabulary: 0 announces, 1 is "mm-hm", 3 is silent, 2, 4 and 5 begin sentences; the last was drawn.
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    goal, text = Objective("onsets", apart=(1,)), torch.tensor([[5]])

    def gradient(objective):
        (found,) = torch.autograd.grad(objective.log_probs(logits.log_softmax(-1)[None, None], text).sum(), logits)
        return found

    grouped, single = gradient(goal), gradient(Objective("onsets"))
    probabilities = logits.detach().softmax(-1)
    shares = grouped[[2, 4, 5]] / probabilities[[2, 4, 5]]
    assert torch.allclose(shares, shares[0].expand(3), atol=1e-5)  # all by the same factor: their odds stay
    assert grouped[5] > 0 > grouped[3]
    assert single[4] < 0 < single[5]


def test_the_token_that_announces_a_word_is_none():
    # 3 is silent, 0 announces: the word after it is still one with which the agent begins, the next is not.
    text = torch.tensor([[3, 3, 0, 7, 8]])
    assert Objective("onsets", onset_frames=2).onsets(text).tolist() == [[True, True, True, True, False]]
