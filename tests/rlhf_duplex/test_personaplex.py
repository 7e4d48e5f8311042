"""PersonaPlex on nano's weights: expansion on load, prompts before every dialogue, and every command."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.audio import write_audio
from envs.errors import InputError
from envs.segments import write_manifest
from rlhf_duplex.cli import main
from rlhf_duplex.config import PromptConfig
from rlhf_duplex.data.pair import Pair, stream_format, write_pairs
from rlhf_duplex.policy.bundle import NANO_FOLDER, load_bundle
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.personaplex import expand_depth, fuse_projections
from rlhf_duplex.policy.prompt import check_prompt, make_prompt
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.tracking import read_metrics
from rlhf_duplex.warmstart.model import PairModel
from tests.rlhf_duplex.test_policy import GREEDY, act_all, small_model, stock_greedy, user_codes

TEXT = "you are good help"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nano's weights under a configuration whose depth transformer predicts the user's codes too."""
    folder = shutil.copytree(NANO_FOLDER, tmp_path_factory.mktemp("personaplex") / "bundle")
    config = json.loads((folder / "config.json").read_text())
    schedule = config["depformer_weights_per_step_schedule"]
    config |= {"dep_q": config["n_q"], "depformer_weights_per_step_schedule": schedule * 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def persona(folder):
    return load_bundle(str(folder))


@pytest.fixture(scope="module")
def voice(tmp_path_factory, one_of_each):
    """The recorded agent of a dialogue, 0.9 s of it: eleven frames and a part of one."""
    segment = one_of_each[0]
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    write_audio(path, segment.user_audio(8000)[: int(0.9 * 8000)], 8000)
    return path


@pytest.fixture(scope="module")
def prompt(persona, voice):
    return make_prompt(persona, PromptConfig(voice=str(voice), text=TEXT))


class TestExpansion:
    def test_missing_entries_are_those_of_the_agent_and_no_one_is_shared(self, persona, nano):
        ours, theirs = persona.lm.state_dict(), nano.lm.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        new = sorted(set(ours) - set(theirs))
        assert new == sorted(
            [f"linears.{i}.weight" for i in range(8, 16)] + [f"depformer_emb.{i}.weight" for i in range(7, 15)]
        )
        assert all(torch.equal(ours[f"linears.{i}.weight"], ours[f"linears.{i - 8}.weight"]) for i in range(8, 16))
        assert torch.equal(ours["depformer_emb.9.weight"], ours["depformer_emb.1.weight"])
        assert ours["linears.8.weight"].data_ptr() != ours["linears.0.weight"].data_ptr()

    def test_fused_attention_is_doubled_and_counted_parts_copied(self):
        small, large = small_model([0, 0, 1, 0, 1], 2), small_model([0, 0, 1, 0, 1], 4)
        weights = fuse_projections(small.state_dict())
        assert "depformer.layers.0.self_attn.in_proj_weight" in weights
        large.load_state_dict(expand_depth(weights, large))
        found, known = large.state_dict(), small.state_dict()
        assert all(torch.equal(found[name], value) for name, value in known.items())
        for name, value in found.items():
            if name not in known and "depformer_emb" not in name:
                number = int(re.search(r"(?:projs|gating|linears|depformer_in)\.(\d)", name).group(1))
                source = re.sub(r"((?:projs|gating|linears|depformer_in)\.)\d", rf"\g<1>{number - 2}", name)
                assert number >= 2
                assert torch.equal(value, known[source])
        codes = user_codes(small, 2, 2, 12)
        assert torch.equal(act_all(MoshiPolicy(large, GREEDY), codes)[0], act_all(MoshiPolicy(small, GREEDY), codes)[0])

    def test_a_damaged_larger_model_is_not_mended(self, persona, folder, tmp_path):
        damaged = shutil.copytree(folder, tmp_path / "damaged")
        weights = {n: v.clone() for n, v in persona.lm.state_dict().items() if n != "linears.9.weight"}
        save_file(weights, damaged / "model.safetensors")
        with pytest.raises(InputError, match=r"key 'linears\.9\.weight' is missing"):
            load_bundle(str(damaged))

    def test_without_a_prompt_it_acts_as_the_agent_that_it_is_made_of(self, persona, nano):
        assert (persona.codec.agent_codebooks, persona.codec.user_codebooks) == (8, 8)
        codes = user_codes(nano.lm, 8, batch=2, frames=20)
        expected = stock_greedy(nano.lm, codes)
        actions, _ = act_all(MoshiPolicy(persona.lm, GREEDY), codes)
        assert all(torch.equal(actions[:, t], expected[t][:, :, 0]) for t in range(1, 20))


class TestPrompt:
    def test_voice_silence_text_silence_and_a_tone_from_the_user(self, persona, prompt):
        words = persona.tokenizer.encode(f"<system> {TEXT} <system>")
        # 0.9 s are 11.25 frames: 12, then 6 (whole frames of 0.5 s), a frame a token, 6.
        assert prompt.shape == (17, 12 + 6 + len(words) + 6)
        text, agent, user = prompt[0], prompt[1:9], prompt[9:]
        assert text.tolist() == [3] * 18 + words + [3] * 6
        silent = agent[:, -1]
        assert (agent[:, 12:] == silent[:, None]).all()
        assert (agent[:, :12] != silent[:, None]).any()
        assert (user == user[:, :1]).all()
        assert (user[:, 0] != silent).any()
        heard = persona.codec.decode(silent[None, :, None].expand(-1, -1, 25))
        assert heard[:, 8000:].abs().max() < 0.05
        tagged = make_prompt(persona, PromptConfig(text=f" <system> {TEXT} <system> "))
        assert tagged[0].tolist() == [3] * 6 + words + [3] * 6
        assert make_prompt(persona, PromptConfig()) is None
        # 2.32 s are 29 frames of 0.08 s, though 2.32 * 12.5 is a little below 29.
        longer = make_prompt(persona, PromptConfig(text=TEXT, silence_seconds=2.32))
        assert longer[0].tolist() == [3] * 29 + words + [3] * 29

    def test_codes_of_moshis_own_mimi_are_personaplexs(self, persona, monkeypatch):
        monkeypatch.setattr(persona, "mimi_config", None)
        made = make_prompt(persona, PromptConfig(text="a"))
        assert made[9:, 0].tolist() == [430, 1268, 381, 1611, 1095, 1495, 56, 472]
        assert made[1:9, 0].tolist() == [948, 243, 1178, 546, 1736, 1030, 1978, 2008]
        given = make_prompt(persona, PromptConfig(text="a", user_frame=[5] * 8, silent_frame=[6] * 8))
        assert set(given[9:].flatten().tolist()) == {5}
        assert set(given[1:9].flatten().tolist()) == {6}

    def test_what_is_wrong_with_a_prompt(self, persona, tmp_path):
        with pytest.raises(InputError, match=r"voice\.wav does not exist"):
            check_prompt(PromptConfig(voice=str(tmp_path / "voice.wav")))
        with pytest.raises(InputError, match=r"prompt\.silence_seconds must be at least 0, found -1"):
            check_prompt(PromptConfig(silence_seconds=-1))
        with pytest.raises(InputError, match=r"prompt\.user_frame must be 8 codes from 0 to 255, found \[1, 2\]"):
            make_prompt(persona, PromptConfig(text="a", user_frame=[1, 2]))

    @pytest.mark.parametrize("fixed", [False, True])
    def test_tokens_are_those_of_the_whole_model_run_anew_for_every_frame(self, fixed):
        """An oracle with no cache: the modules of `LMModel.forward` over all positions so far, greedily."""
        model = small_model([0, 0, 1, 0, 1], 4)  # agent 1 and 2, user 3 and 4, the second of each a frame late
        generator = torch.Generator().manual_seed(5)
        prompt = torch.cat([torch.randint(0, n, (k, 7), generator=generator) for n, k in ((30, 1), (20, 4))])
        users = user_codes(model, 2, 1, 9)
        policy = MoshiPolicy(model, GREEDY, prompt, fixed=fixed)
        policy.begin([0], 9)
        actions = torch.stack([policy.act(users[:, :, t])[0] for t in range(9)], dim=1)
        trajectory = policy.trajectory()
        policy.end()
        known = torch.full((1, 5, 7 + 9 + 3), -1)  # what is model input at each position
        for stream, delay in enumerate(model.delays):
            known[0, stream, : delay + 1] = 20 if stream else 30
            known[0, stream, delay + 1 : delay + 8] = prompt[stream]
        for frame in range(9):
            position = 7 + frame
            for stream in (3, 4):
                if frame > 0:  # the first user frame is never model input
                    known[0, stream, position + model.delays[stream]] = users[0, stream - 3, frame]
            with torch.no_grad():
                hidden, logits = model.forward_text(known[:, :, : position + 1])
                known[0, 0, position + 1] = logits[0, 0, -1].argmax()
                for codebook in (1, 2):
                    if position + 1 > 7 + model.delays[codebook]:  # no longer the prompt's
                        depth = model.forward_depformer_training(known[:, :, 1 : position + 2].clamp(min=0), hidden)
                        known[0, codebook, position + 1] = depth[0, codebook - 1, -1].argmax()
        assert torch.equal(trajectory.codes[0, 0], known[0, 0, 8:17])
        assert torch.equal(trajectory.codes[0, 1], known[0, 1, 8:17])
        assert torch.equal(trajectory.codes[0, 2, :8], known[0, 2, 9:17])
        assert torch.equal(trajectory.codes[0, 3, :8], known[0, 3, 8:16])
        assert torch.equal(actions[:2, 1:], known[0, :2, 8:16])  # heard once whole, a frame later
        assert torch.equal(actions[2, 1:], known[0, 2, 9:17])
        assert actions[:, 0].tolist() == [30, 20, 20]  # nothing yet

    def test_ratio_is_one_with_a_prompt(self, persona, prompt):
        policy = MoshiPolicy(persona.lm, Sampling(), prompt)
        plain = MoshiPolicy(persona.lm, Sampling())
        codes = user_codes(persona.lm, 8, batch=3, frames=30)
        actions, trajectory = act_all(policy, codes)
        assert trajectory.codes.shape == (3, 17, 30)  # the prompt is none of its frames
        assert (actions[:, 0, 0] == persona.lm.text_card).all()
        with torch.no_grad():
            log_probs, _ = policy.evaluate_actions(trajectory.codes)
            without, _ = plain.evaluate_actions(trajectory.codes)
            pairs = PairModel(persona.lm, "text", prompt=prompt)._logits(trajectory.codes)[0]
            audio = PairModel(persona.lm, "audio", prompt=prompt)._logits(trajectory.codes)
            torch.testing.assert_close(pairs, policy.text_logits(trajectory.codes))
        assert (log_probs - trajectory.log_probs).abs().max() < 1e-4
        assert (without - trajectory.log_probs).abs().max() > 1e-3  # it is heard
        assert [tuple(part.shape) for part in audio] == [(3, 30, 480)] + [(3, 30, 256)] * 8
        torch.testing.assert_close(audio[0], pairs)
        policy.begin([7, 8, 9], 30)
        policy.prefill(trajectory.codes[:, :, :12])
        policy.end()


@pytest.mark.timeout(300)
def test_every_command_runs_with_prompts(folder, persona, voice, one_of_each, tmp_path):
    """GRPO with rollouts and evaluation before and after, a warm start from its run, evaluation, export."""
    manifest = tmp_path / "segments.jsonl"
    write_manifest(manifest, [s for s in one_of_each if s.axis in ("turn_taking", "pause_handling")])
    told = [f"prompt.voice={voice}", f"prompt.text={TEXT}"]
    assert (
        main(
            [
                "train",
                f"run_dir={tmp_path / 'rl'}",
                f"checkpoint={folder}",
                f"segments={manifest}",
                "trainer.updates=1",
                "trainer.groups=2",
                "trainer.group_size=4",
                "trainer.minibatch=4",
                "context.probability=0",
                "context.lead_in=0.4",
                "optimiser.warmup_updates=0",
                *told,
            ]
        )
        == 0
    )
    (metrics,) = read_metrics(tmp_path / "rl" / "metrics.jsonl")
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-4)
    trained = load_bundle(str(tmp_path / "rl"))
    assert trained.lm.dep_q == 16
    assert not torch.equal(trained.lm.text_linear.weight, persona.lm.text_linear.weight)

    spoken = []
    for name, prompt in (("plain", []), ("told", ["--prompt-voice", str(voice), "--prompt-text", TEXT])):
        logs = tmp_path / name
        assert main(["converse", str(manifest), "--checkpoint", str(folder), "--out", str(logs), *prompt]) == 0
        spoken.append([path.read_bytes() for path in sorted(logs.glob("*.wav"))])
    assert len(spoken[0]) == len(spoken[1]) == 2
    assert spoken[0] != spoken[1]
    assert main(["converse", str(manifest), "--prompt-voice", "gone.wav", "--out", str(tmp_path / "no")]) == 2

    generator = torch.Generator().manual_seed(0)

    def tokens(frames):
        return torch.cat([torch.randint(0, n, (k, frames), generator=generator) for n, k in ((300, 1), (256, 16))])

    pairs = [
        Pair(split, "interruption", split, tokens(3), tokens(8), tokens(6), (1, 8), (2, 6))
        for split in ("train", "heldout")
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs, stream_format(persona))
    warm = [f"run_dir={tmp_path / 'warm'}", f"checkpoint={tmp_path / 'rl'}", f"pairs={tmp_path / 'pairs.jsonl'}"]
    options = [
        "training.batch_size=1",
        "training.microbatch=1",
        "optimiser.warmup_steps=0",
        "evaluation.segments=null",
        "loss.streams=audio",
    ]
    assert main(["warmstart", *warm, *options, *told]) == 0
    warmed = load_bundle(str(tmp_path / "warm"))
    assert not torch.equal(warmed.lm.linears[0].weight, trained.lm.linears[0].weight)
    assert not torch.equal(warmed.lm.text_linear.weight, trained.lm.text_linear.weight)

    arguments = [f"checkpoint={tmp_path / 'warm'}", f"segments={manifest}", "context.lead_in=0.4", *told]
    assert main(["evaluate", f"run_dir={tmp_path / 'checked'}", *arguments]) == 0
    axes = json.loads((tmp_path / "checked" / "evaluation" / "before.json").read_text())["axes"]
    assert {"turn_taking", "pause_handling"} <= set(axes)

    assert main(["export", str(tmp_path / "warm"), "--to", str(tmp_path / "out")]) == 0
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert not [name for name in names if "_projs." in name]  # PersonaPlex's own moshi knows them fused
    assert {"transformer.layers.0.self_attn.in_proj_weight", "depformer.layers.0.self_attn.out_proj.weight"} <= names
    exported = load_bundle(str(tmp_path / "out")).lm.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in warmed.lm.state_dict().items())
