"""The warm start's loss and gradients by hand and against TRL, streams, padding, references, parts."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.utils import FusedCausalLMOutput
from warmstart_pairs import config_of, make_pairs, run, trainer_of

from rlhf_duplex.data.pair import Pair, stream_format, write_pairs
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.lora import add_lora, part_of
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.warmstart.data import PairCollator, StreamIds
from rlhf_duplex.warmstart.model import PairModel, stream_ids
from rlhf_duplex.warmstart.reference import read_references, reference_key, score_pairs, write_references


class TestLossByHand:
    """Two pairs, with log-probabilities that can be worked out on paper."""

    @pytest.fixture
    def batch(self):
        # Chosen of the first pair: 4 tokens that count, log-probabilities -0.5 each: sum -2, reference -4, so
        # log-ratio 2 and 2 / 4 a token. Rejected: 2 tokens of -1: sum -2, reference -1: log-ratio -1, -1 / 2 a token.
        # Second pair: chosen 1 token of -3, reference -2: log-ratio -1, -1 a token; rejected 3 tokens of -1: sum -3,
        # reference -6: log-ratio 3, 1 a token.
        log_probs = torch.tensor(
            [[-0.5, -0.5, -0.5, -0.5], [-3.0, 0, 0, 0], [-1.0, -1.0, 0, 0], [-1.0, -1.0, -1.0, 0]], requires_grad=True
        )
        mask = (log_probs.detach() != 0).long()
        behind = torch.cat([torch.zeros(4, 1, dtype=torch.long), mask], dim=1)
        inputs = {
            "codes": torch.zeros(4, 1, 4),
            "loss_mask": mask.bool(),
            "input_ids": torch.zeros(4, 5, dtype=torch.long),
            "completion_mask": behind,
            "attention_mask": behind,
            "kinds": torch.tensor([0, 1]),
            "ref_chosen_logps": torch.tensor([-4.0, -2.0]),
            "ref_rejected_logps": torch.tensor([-1.0, -6.0]),
        }
        zeros = torch.zeros(4, 4)
        output = FusedCausalLMOutput(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=mask.bool(), label_mask=mask.bool()
        )
        return log_probs, inputs, lambda **_: output

    def loss(self, nano, batch, **keys):
        _, inputs, model = batch
        trainer = trainer_of(nano, make_pairs(nano.lm, 2), **keys)
        trainer.model.train()
        return trainer._compute_loss(model, inputs), trainer

    def test_dpo_ln(self, nano, batch):
        loss, trainer = self.loss(nano, batch, loss__beta=0.3)
        # Differences a token: 0.5 - (-0.5) = 1 and -1 - 1 = -2.
        first, second = 1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(0.6))
        assert loss.item() == pytest.approx(-(math.log(first) + math.log(second)) / 2, abs=1e-6)
        loss.backward()
        gradient = batch[0].grad
        # d/d log pi(y_w) = -1/2 beta/|y_w| (1 - sigmoid), the same for each of its tokens; + for y_l.
        assert gradient[0].tolist() == pytest.approx([-0.5 * 0.3 / 4 * (1 - first)] * 4, abs=1e-7)
        assert gradient[1, 0].item() == pytest.approx(-0.5 * 0.3 / 1 * (1 - second), abs=1e-7)
        assert gradient[2, :2].tolist() == pytest.approx([0.5 * 0.3 / 2 * (1 - first)] * 2, abs=1e-7)
        assert gradient[3, :3].tolist() == pytest.approx([0.5 * 0.3 / 3 * (1 - second)] * 3, abs=1e-7)
        # TRL's rewards are beta times the whole log-ratio: 0.6 and -0.3; -0.3 and 0.9.
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert metrics["rewards/chosen"] == pytest.approx(0.15)
        assert metrics["rewards/rejected"] == pytest.approx(0.3)
        assert metrics["rewards/margins"] == pytest.approx(-0.15)
        assert metrics["rewards/accuracies"] == pytest.approx(0.5)
        assert metrics["rewards/accuracies/interruption"] == 1.0
        assert metrics["rewards/accuracies/unresponsive"] == 0.0
        assert metrics["rewards/margins/unresponsive"] == pytest.approx(-1.2)
        assert metrics["logps/chosen"] == pytest.approx(-2.5)

    @pytest.mark.parametrize(
        ("name", "keys", "expected"),
        [
            # Log-ratios 2, -1 and -1, 3: differences 3 and -4; beta 0.3: 0.9 and -1.2.
            ("sigmoid", {}, (math.log(1 + math.exp(-0.9)) + math.log(1 + math.exp(1.2))) / 2),
            ("hinge", {}, (0.1 + 2.2) / 2),
            # A token: 1 and -2; target 1 / (2 beta) = 5/3.
            ("ipo", {}, ((1 - 5 / 3) ** 2 + (-2 - 5 / 3) ** 2) / 2),
            (
                "apo_zero",
                {},
                sum(
                    1 - 1 / (1 + math.exp(-0.3 * w)) + 1 / (1 + math.exp(-0.3 * lost)) for w, lost in ((2, -1), (-1, 3))
                )
                / 2,
            ),
            (
                "robust",
                {"loss__label_smoothing": 0.1},
                sum((0.9 * math.log(1 + math.exp(-d)) - 0.1 * math.log(1 + math.exp(d))) / 0.8 for d in (0.9, -1.2))
                / 2,
            ),
            # Log-probabilities a token: -0.5, -1 and -3, -1; beta 2, gamma 0.5: 2 * 0.5 - 0.5 and 2 * -2 - 0.5.
            (
                "simpo",
                {"loss__beta": 2.0, "loss__simpo_gamma": 0.5},
                (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(4.5))) / 2,
            ),
        ],
    )
    def test_its_relatives(self, nano, batch, name, keys, expected):
        loss, _ = self.loss(nano, batch, loss__name=name, **keys)
        assert loss.item() == pytest.approx(expected, abs=1e-5)


class TestAgainstTrl:
    """TRL's own trainer on a real text model: the same losses and gradients from the same tensors."""

    @pytest.fixture(scope="class")
    def stock(self, tmp_path_factory):
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        models_ = [LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)) for _ in range(2)]
        data = Dataset.from_dict({"prompt": ["a b", "c"], "chosen": [" d e f g", " h"], "rejected": [" a", " b c d"]})
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("stock")), use_cpu=True, bf16=False, report_to="none", beta=0.3
        )
        trainer = DPOTrainer(models_[0], models_[1], args=arguments, train_dataset=data, processing_class=fast)
        batch = next(iter(trainer.get_train_dataloader()))
        return (
            trainer,
            trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])),
            batch,
        )

    @pytest.mark.parametrize("name", ["sigmoid_norm", "sigmoid", "ipo", "apo_zero", "hinge", "robust"])
    def test_loss_and_gradients(self, stock, nano, name):
        trainer, inputs, _ = stock
        trainer.loss_types, trainer.label_smoothing = [name], 0.1
        model = trainer.model.train()
        model.zero_grad()
        theirs = trainer._compute_loss(model, inputs, False)
        theirs.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        mine = trainer_of(nano, make_pairs(nano.lm, 2), loss__name=name, loss__label_smoothing=0.1)
        mine.model.train()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)

        def text_model(codes, **_):
            return model(input_ids=codes, attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True)

        model.zero_grad()
        loss = mine._compute_loss(
            text_model,
            {
                "codes": inputs["input_ids"],
                "input_ids": inputs["input_ids"],
                "completion_mask": inputs["completion_mask"],
                "attention_mask": inputs["attention_mask"],
                "kinds": torch.tensor([0, 1]),
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            },
        )
        loss.backward()
        torch.testing.assert_close(loss, theirs)
        for parameter_name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[parameter_name], msg=parameter_name)


class TestCollator:
    """One stream of each kind: text (PAD 3, EPAD 0) and two audio codebooks, of which the first is semantic."""

    def pair(self):
        context = torch.tensor([[3, 7], [1, 1], [2, 2]])
        chosen = torch.tensor([[3, 0, 9, 3], [4, 5, 6, 7], [1, 2, 3, -1]])
        rejected = torch.tensor([[8, 3], [4, 5], [6, -1]])
        return Pair("p", "content", "train", context, chosen, rejected, (1, 3), (0, 2))

    def test_text_with_padding_counted(self):
        batch = PairCollator(StreamIds((0,), (3, 0)))([(self.pair(), (-1.5, -2.5))])
        assert batch["codes"].shape == (2, 3, 6)
        assert batch["codes"][1, 0].tolist() == [3, 7, 8, 3, -1, -1]
        # chosen_span [1, 3) lies behind two frames of context: EPAD and the word 9.
        assert batch["loss_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]
        assert batch["completion_mask"].sum(dim=1).tolist() == [2, 2]
        assert batch["input_ids"][0].tolist() == [0, 3, 7, 3, 0, 9, 3]
        assert batch["attention_mask"].sum(dim=1).tolist() == [6, 4]
        assert batch["ref_chosen_logps"].tolist() == [-1.5]
        assert batch["ref_rejected_logps"].tolist() == [-2.5]

    def test_padding_not_counted_stays_in_the_sum(self):
        batch = PairCollator(StreamIds((0,), (3, 0)), count_pad=False)([(self.pair(), None)])
        assert batch["loss_mask"].sum(dim=1).tolist() == [2, 2]
        assert batch["completion_mask"].sum(dim=1).tolist() == [1, 1]  # the words 9 and 8
        assert "ref_chosen_logps" not in batch

    def test_span_of_the_whole_reply(self):
        batch = PairCollator(StreamIds((0,), (3, 0)), span="reply")([(self.pair(), None)])
        assert batch["loss_mask"].sum(dim=1).tolist() == [4, 2]
        assert batch["completion_mask"].sum(dim=1).tolist() == [4, 2]

    def test_audio_streams_without_codes_that_never_came(self):
        batch = PairCollator(StreamIds((0, 1, 2), (3, 0)), span="reply")([(self.pair(), None)])
        assert batch["loss_mask"].sum(dim=1).tolist() == [4 + 4 + 3, 2 + 2 + 1]
        assert batch["input_ids"].shape == (2, 1 + 3 * 6)
        semantic = PairCollator(StreamIds((0, 1), (3, 0)), span="reply", count_pad=False)([(self.pair(), None)])
        # Codes are no padding: 1 word and 4 codes; 1 word and 2 codes.
        assert semantic["completion_mask"].sum(dim=1).tolist() == [5, 3]


class TestPairModel:
    def test_text_equals_evaluate_actions(self, nano):
        pairs = make_pairs(nano.lm, 2)
        batch = PairCollator(stream_ids(nano.lm, "text"))([(pair, None) for pair in pairs])
        with torch.no_grad():
            output = PairModel(nano.lm)(**batch)
            policy = MoshiPolicy(nano.lm, Sampling(text_temperature=1.0))
            expected, distribution = policy.evaluate_actions(batch["codes"])
        mask = batch["loss_mask"]
        torch.testing.assert_close(output.log_probs[mask], expected[mask])
        assert (output.log_probs[~mask] == 0).all()
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
        torch.testing.assert_close(output.entropy[mask], entropy[mask])

    @pytest.mark.parametrize(("streams", "count"), [("semantic", 1), ("audio", 8)])
    def test_audio_equals_moshis_own_forward(self, nano, streams, count):
        pairs = make_pairs(nano.lm, 2)
        batch = PairCollator(stream_ids(nano.lm, streams))([(pair, None) for pair in pairs])
        with torch.no_grad():
            output = PairModel(nano.lm, streams)(**batch)
            # Followed by two frames, so that no delayed stream lacks its last logits.
            codes = torch.nn.functional.pad(batch["codes"], (0, 2), value=-1)
            moshi = nano.lm(codes)
        frames = batch["codes"].shape[-1]
        mask = batch["loss_mask"].unflatten(1, (1 + count, frames))
        found = output.log_probs.unflatten(1, (1 + count, frames))
        for stream in range(1 + count):
            logits = moshi.text_logits[:, 0] if stream == 0 else moshi.logits[:, stream - 1]
            expected = torch.log_softmax(logits[:, :frames], -1).gather(-1, codes[:, stream, :frames, None].clamp(0))
            torch.testing.assert_close(found[:, stream][mask[:, stream]], expected[..., 0][mask[:, stream]])
        assert mask.sum() == (7 + 4) * 2 * (1 + count)

    @pytest.mark.parametrize(("streams", "count"), [("text", 0), ("audio", 8)])
    def test_likelihood_of_the_chosen_replies(self, nano, streams, count):
        pairs = make_pairs(nano.lm, 2)
        pairs[1] = replace(pairs[1], chosen=pairs[1].chosen[:, :5], chosen_span=(1, 5))
        batch = PairCollator(stream_ids(nano.lm, "text"))([(pair, None) for pair in pairs])
        assert batch["reply_mask"].sum(dim=1).tolist() == [8, 5, 6, 6]
        with torch.no_grad():
            output = PairModel(nano.lm, sft_streams=streams)(**batch)
            plain = PairModel(nano.lm)(**batch)
            moshi = nano.lm(torch.nn.functional.pad(batch["codes"], (0, 2), value=-1))
        assert plain.sft is None
        torch.testing.assert_close(output.log_probs, plain.log_probs)
        means = []
        for stream in range(1 + count):
            logits = moshi.text_logits[:, 0] if stream == 0 else moshi.logits[:, stream - 1]
            log_probs = torch.log_softmax(logits, -1)
            for row, pair in enumerate(pairs):
                own = [log_probs[row, 3 + n, int(token)] for n, token in enumerate(pair.chosen[stream])]
                means.append(-torch.stack(own).mean())
        torch.testing.assert_close(output.sft, torch.stack(means).mean())

    def test_the_likelihood_is_added_to_the_loss_and_teaches_the_depth_transformer(self):
        def run(**keys):
            bundle = load_bundle("nano")
            trainer = trainer_of(bundle, make_pairs(bundle.lm, 2), loss__beta=0.3, **keys)
            batch = trainer.data_collator([(pair, (-9.0, -8.0)) for pair in make_pairs(bundle.lm, 2)])
            trainer.model.train()
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            gradients = {n: p.grad for n, p in bundle.lm.named_parameters() if p.grad is not None}
            assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
            return loss.item(), {part_of(name) for name in gradients}, trainer._metrics["train"]

        without, parts, metrics = run()
        assert "depth" not in parts
        assert "sft" not in metrics
        with_it, parts, metrics = run(loss__sft_weight=0.5)
        assert "depth" in parts
        assert with_it == pytest.approx(without + 0.5 * metrics["sft"][0], abs=1e-5)
        _, parts, _ = run(loss__sft_weight=0.5, loss__sft_streams="text")
        assert "depth" not in parts

    def test_no_nan_reaches_a_gradient(self):
        lm = load_bundle("nano").lm
        pairs = make_pairs(lm, 2)
        batch = PairCollator(stream_ids(lm, "audio"))([(pair, None) for pair in pairs])
        PairModel(lm, "audio")(**batch).log_probs.sum().backward()
        gradients = [p.grad for p in lm.parameters() if p.grad is not None]
        assert len(gradients) > 20
        assert all(g.isfinite().all() for g in gradients)


class TestReferences:
    def test_scores_do_not_depend_on_the_batch(self, nano):
        pairs = make_pairs(nano.lm, 5)
        one = score_pairs(nano.lm, pairs, config_of(training__microbatch=1))
        many = score_pairs(nano.lm, pairs, config_of(training__microbatch=4))
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-4)
        assert (one < 0).all()

    def test_cache_is_found_again_and_what_is_stale_is_not(self, nano, tmp_path):
        pairs, config = make_pairs(nano.lm, 3), config_of()
        weights = nano.lm.state_dict()
        key = reference_key(weights, pairs, config)
        write_references(tmp_path / "r.safetensors", key, torch.ones(3, 2))
        assert (
            read_references(tmp_path / "r.safetensors", reference_key(weights, pairs, config)).tolist() == [[1, 1]] * 3
        )
        other = make_pairs(nano.lm, 3)
        other[1].chosen[0, 4] += 1
        changed = dict(weights, **{"text_linear.weight": weights["text_linear.weight"] + 1})
        keys = {
            key,
            reference_key(weights, other, config),
            reference_key(weights, pairs[::-1], config),
            reference_key(changed, pairs, config),
            reference_key(weights, pairs, config_of(loss__span="reply")),
            reference_key(weights, pairs, config_of(loss__streams="semantic")),
        }
        assert len(keys) == 6
        assert reference_key(weights, pairs, config_of(loss__beta=1.0, loss__count_pad="false")) == key
        for stale in keys - {key}:
            assert read_references(tmp_path / "r.safetensors", stale) is None
        assert read_references(tmp_path / "missing.safetensors", key) is None

    def test_adapters_switched_off_give_the_cached_ones(self):
        bundle = load_bundle("nano")
        pairs = make_pairs(bundle.lm, 2)
        cached = score_pairs(bundle.lm, pairs, config_of())
        key = reference_key(bundle.lm.state_dict(), pairs, config_of())
        add_lora(bundle.lm, 2)
        for name, parameter in bundle.lm.named_parameters():
            if ".lora_B" in name:
                parameter.data.fill_(0.02)
        assert reference_key(bundle.lm.state_dict(), pairs, config_of()) == key
        losses = []
        for mode in ("cached", "lora_off"):
            references = cached if mode == "cached" else None
            trainer = trainer_of(bundle, pairs, references, lora__rank=2, reference__mode=mode)
            inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
            trainer.model.train()
            losses.append(trainer._compute_loss(trainer.model, inputs))
            metrics = trainer._metrics["train"]
            assert abs(metrics["rewards/chosen"][-1]) > 1e-3  # the adapters do move it
            assert metrics["rewards/margins/interruption"][-1] == pytest.approx(
                2 * metrics["rewards/margins"][-1] - metrics["rewards/margins/pause_handling"][-1], abs=1e-5
            )
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


class TestParts:
    def test_rates_and_frozen_parts(self):
        bundle = load_bundle("nano")
        keys = {"optimiser__learning_rates__temporal": 1e-3, "optimiser__learning_rates__embeddings": 0}
        trainer = trainer_of(bundle, make_pairs(bundle.lm, 2), **keys)
        groups = trainer.create_optimizer().param_groups
        assert [group["lr"] for group in groups] == [1e-3]  # text alone does not teach the depth transformer
        trained = [n for n, p in bundle.lm.named_parameters() if p.requires_grad]
        assert {part_of(name) for name in trained} == {"temporal"}
        keys = {
            "loss__streams": "audio",
            "optimiser__learning_rates__depth": 1e-6,
            "optimiser__learning_rates__temporal": 5e-9,
        }
        trainer = trainer_of(bundle, make_pairs(bundle.lm, 2), **keys)
        groups = trainer.create_optimizer().param_groups
        assert [group["lr"] for group in groups] == [5e-9, 1e-6, 1e-4]
        assert sum(len(group["params"]) for group in groups) == len(list(bundle.lm.parameters()))

    def test_a_frozen_part_stays_to_the_bit_and_others_move(self, tmp_path):
        write_pairs(tmp_path / "pairs.jsonl", make_pairs(load_bundle("nano").lm), stream_format(load_bundle("nano")))
        run(tmp_path, optimiser__learning_rates__embeddings=0, evaluation__every=0, checkpointing__every=3)
        before = load_bundle("nano").lm.state_dict()
        after = load_file(tmp_path / "run" / "checkpoints" / "step_000003" / "model.safetensors")
        moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"temporal"}


def test_scores_of_pairs_of_other_lengths_are_in_the_order_of_the_pairs(nano):
    # From long to short: batches are made from short to long.
    pairs = [
        replace(p, chosen=p.chosen[:, : 8 - i], chosen_span=(1, 8 - i)) for i, p in enumerate(make_pairs(nano.lm, 5))
    ]
    alone = torch.cat([score_pairs(nano.lm, [pair], config_of()) for pair in pairs])
    together = score_pairs(nano.lm, pairs, config_of(training__microbatch=2))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_text_is_scored_as_the_objective_sees_it(nano):
    from rlhf_duplex.policy.moshi import MoshiPolicy
    from rlhf_duplex.policy.sampling import Sampling
    from rlhf_duplex.warmstart.data import PairCollator
    from rlhf_duplex.warmstart.model import PairModel, make_objective, stream_ids

    config = config_of(loss__objective="speaking")
    batch = PairCollator(stream_ids(nano.lm, "text"))([(pair, None) for pair in make_pairs(nano.lm, 2)])
    with torch.no_grad():
        found = PairModel(nano.lm, objective=make_objective(nano.lm, config.loss))(**batch).log_probs
        _, distribution = MoshiPolicy(nano.lm, Sampling(text_temperature=1.0)).evaluate_actions(batch["codes"])
    silent = distribution[..., nano.lm.text_padding_token_id].exp()
    spoke = batch["codes"][:, 0] != nano.lm.text_padding_token_id
    mask = batch["loss_mask"]
    torch.testing.assert_close(found[mask].exp(), torch.where(spoke, 1 - silent, silent)[mask], atol=1e-5, rtol=1e-4)
    assert spoke[mask].any()
    assert not spoke[mask].all()


def test_only_text_has_padding_that_is_not_counted():
    from rlhf_duplex.warmstart.data import PairCollator, StreamIds

    # Codes 3 and 0 are codes as any: 1 word and 4 + 3 codes; 1 word and 2 + 1 codes.
    ids = StreamIds((0, 1, 2), (3, 0))
    batch = PairCollator(ids, span="reply", count_pad=False)([(TestCollator().pair(), None)])
    assert batch["completion_mask"].sum(dim=1).tolist() == [1 + 4 + 3, 1 + 2 + 1]
