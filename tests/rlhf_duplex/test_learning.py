"""Rollouts and updates on the nano bundle: parity at step 0, determinism to the bit, and a policy that learns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_runs import options, write_inputs
from rich.console import Console

from envs.episode import Episode
from envs.errors import InputError
from envs.segments import write_manifest
from envs.vector import DuplexDialogueVectorEnv
from rlhf_duplex.batch import make_batch
from rlhf_duplex.config import OptimiserConfig, PpoConfig, TrainerConfig, load_config
from rlhf_duplex.inputs import load_inputs
from rlhf_duplex.learner import Learner, NonFiniteError
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.codec import first_tokens
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.rollout import episode_seed, rollout
from rlhf_duplex.run import running, train
from rlhf_duplex.run_folder import prepare_run_dir
from rlhf_duplex.sampler import segments_of_update

QUIET = Console(quiet=True)
SAMPLING = Sampling(text_temperature=1.0, audio_top_k=0)


@pytest.fixture(scope="module")
def setting(silero, one_of_each):
    """A policy of its own (it is trained), its environment, and 8 episodes."""
    bundle = load_bundle("nano")
    policy = MoshiPolicy(bundle.lm, SAMPLING)
    env = DuplexDialogueVectorEnv(one_of_each, bundle.codec, silero, lead_in=0.4)
    segments = [s for s in one_of_each for _ in range(2)]
    episodes = rollout(policy, env, segments, list(range(8)), [0.0] * 8)
    return bundle, policy, env, segments, episodes


def test_an_episodes_tokens_depend_on_its_own_seed_alone(setting):
    _, policy, env, segments, episodes = setting
    order = [5, 0, 7]
    others = rollout(policy, env, [segments[i] for i in order], order, [0.0] * 3, batch_size=2)
    for row, other in zip(order, others, strict=True):
        assert np.array_equal(episodes[row].text_tokens, other.text_tokens)
        assert np.array_equal(episodes[row].audio_tokens, other.audio_tokens)
        assert np.allclose(episodes[row].log_probs, other.log_probs, atol=1e-5)
        assert episodes[row].agent_speech == other.agent_speech
        assert episodes[row].text == other.text
    assert not np.array_equal(episodes[0].text_tokens, episodes[1].text_tokens)  # another seed, another dialogue


def test_ratio_is_one_at_step_zero_for_padded_batches(setting):
    bundle, policy, _, _, episodes = setting
    batch = make_batch(episodes, torch.zeros(8), bundle.codec.frame_rate, policy.device)
    with torch.no_grad():
        log_probs, _ = policy.evaluate_actions(batch.codes)
    ratio = (log_probs - batch.log_probs).exp()
    assert batch.mask.any(dim=1).all()
    assert (ratio[batch.mask] - 1).abs().max() < 1e-4
    # Lead-in is not trained on: 0.4 s are 5 frames.
    assert not batch.mask[:, :5].any()
    assert batch.mask[:, 5].all()


def test_saved_episodes_train_without_a_model_run(setting, tmp_path):
    bundle, policy, _, _, episodes = setting
    episodes[0].save(tmp_path / "episode")
    loaded = Episode.load(tmp_path / "episode")
    ours, theirs = (
        make_batch([e], torch.ones(1), bundle.codec.frame_rate, policy.device) for e in (episodes[0], loaded)
    )
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.log_probs, theirs.log_probs)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "speaking", "sentence_kl_beta": 0.1, "passes": 2},
        {"objective": "onsets", "audio_beta": 0.1, "opening_kl_beta": 0.1},
        {"onset_words": ["mm-hm", "okay"], "objective": "onsets", "opening_kl_beta": 0.1},
        {"algorithm": "gspo", "clip": 4e-4},
        {"algorithm": "dr_grpo", "clip_high": 0.28},
        {"algorithm": "rloo"},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_every_objective_raises_speech_that_had_a_high_advantage(setting, options):
    """Advantage for the episodes that speak most: after a few updates, they are likelier than the others."""
    bundle, _, _, _, episodes = setting
    policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
    config = OptimiserConfig(learning_rate=1e-4, schedule="constant", warmup_updates=0)
    apart = first_tokens(bundle.tokenizer, options.get("onset_words", ()))
    learner = Learner(policy, TrainerConfig(minibatch=8, microbatch=3, **options), config, seed=0, apart=apart)
    silent = policy.lm.text_padding_token_id
    spoken = torch.tensor([float((e.text_tokens != silent).mean()) for e in episodes])
    advantages = torch.where(spoken > spoken.median(), 1.0, -1.0)
    batch = make_batch(episodes, advantages, bundle.codec.frame_rate, policy.device)
    before = _speech(policy, batch)
    first = learner.update(batch, 0)
    assert first["ratio_first"] == pytest.approx(1.0, abs=1e-4)
    if options.get("opening_kl_beta"):
        assert first["opening_kl"] == pytest.approx(0.0, abs=1e-6)
    if options.get("audio_beta"):
        assert first["audio_drift"] == pytest.approx(0.0, abs=1e-6)  # before the first step it is the reference
        assert learner.update(batch, 1)["audio_drift"] > 0
    after = _speech(policy, batch)
    assert after > before


def _speech(policy, batch):
    """Mean probability of speaking at the frames of a batch."""
    with torch.no_grad():
        _, distribution = policy.evaluate_actions(batch.codes)
    silent = distribution[..., policy.lm.text_padding_token_id].exp()
    return 1 - float(silent[batch.mask].mean())


def test_an_update_raises_what_had_a_high_advantage(setting):
    bundle, _, _, _, episodes = setting
    policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
    config = OptimiserConfig(learning_rate=1e-4, schedule="constant", warmup_updates=0)
    learner = Learner(policy, TrainerConfig(minibatch=8, microbatch=3), config, seed=0)
    advantages = torch.tensor([1.0, -1.0] * 4)
    batch = make_batch(episodes, advantages, bundle.codec.frame_rate, policy.device)
    first = learner.update(batch, 0)
    assert first["ratio_first"] == first["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert 1.0 <= first["mismatch/ratio_max"] < 1 + 1e-4
    assert 0.0 <= first["mismatch/kl"] < 1e-8
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss"] == pytest.approx(0.0, abs=1e-4)  # the mean of the advantages
    with torch.no_grad():
        log_probs, _ = policy.evaluate_actions(batch.codes)
    gain = torch.where(batch.mask, log_probs - batch.log_probs, 0.0).sum(dim=1)
    assert gain[advantages > 0].sum() > 0 > gain[advantages < 0].sum()
    second = learner.update(batch, 1)
    assert second["kl"] > 0
    # The episodes are those of the policy before the first update: a rollout policy that is not the trained one shows.
    assert second["mismatch/ratio_max"] > 1 + 1e-3
    assert second["mismatch/kl"] > 1e-6


def test_depth_transformer_and_reference_stay_as_they_were(setting):
    bundle, _, _, _, episodes = setting
    policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
    before = {name: value.clone() for name, value in policy.lm.state_dict().items()}
    learner = Learner(policy, TrainerConfig(), OptimiserConfig(learning_rate=1e-3), seed=0)
    learner.update(make_batch(episodes, torch.randn(8), bundle.codec.frame_rate, policy.device), 0)
    changed = {name for name, value in policy.lm.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(("depformer", "linears")) for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in learner.reference.lm.state_dict().items())


def test_microbatches_change_nothing_but_rounding(setting):
    bundle, _, _, _, episodes = setting
    results = []
    for microbatch in (8, 3):
        policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
        learner = Learner(policy, TrainerConfig(minibatch=8, microbatch=microbatch), OptimiserConfig(), seed=0)
        batch = make_batch(episodes, torch.linspace(-1, 1, 8), bundle.codec.frame_rate, policy.device)
        results.append(learner.update(batch, 0))
    for name in ("loss", "kl", "grad_norm", "entropy"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-3, abs=1e-6)


def test_a_top_k_on_text_keeps_the_kl_finite(setting):
    bundle, policy, env, segments, _ = setting
    narrow = MoshiPolicy(load_bundle("nano").lm, Sampling(text_top_k=3))
    episodes = rollout(narrow, env, segments[:2], [1, 2], [0.0] * 2)
    config = OptimiserConfig(learning_rate=1e-3, warmup_updates=0)
    learner = Learner(narrow, TrainerConfig(minibatch=2), config, seed=0)
    batch = make_batch(episodes, torch.tensor([1.0, -1.0]), bundle.codec.frame_rate, policy.device)
    results = [learner.update(batch, update) for update in range(3)]
    assert results[0]["ratio_first"] == pytest.approx(1.0, abs=1e-4)
    assert all(np.isfinite(result["kl"]) for result in results)


def test_a_loss_that_is_not_finite_stops_before_the_weights(setting):
    bundle, _, _, _, episodes = setting
    policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
    learner = Learner(policy, TrainerConfig(minibatch=8), OptimiserConfig(learning_rate=1e-3), seed=0)
    before = {name: value.clone() for name, value in policy.lm.state_dict().items()}
    batch = make_batch(episodes, torch.full((8,), float("nan")), bundle.codec.frame_rate, policy.device)
    with pytest.raises(NonFiniteError, match="update 3"):
        learner.update(batch, 3)
    assert all(torch.equal(value, before[name]) for name, value in policy.lm.state_dict().items())


def test_values_that_are_not_finite_stop_before_the_head(setting):
    bundle, _, _, _, episodes = setting
    policy = MoshiPolicy(load_bundle("nano").lm, SAMPLING)
    trainer = TrainerConfig(algorithm="ppo", minibatch=8, passes=3)
    learner = Learner(policy, trainer, OptimiserConfig(), seed=0, ppo=PpoConfig(value_learning_rate=1e20))
    batch = make_batch(episodes, torch.ones(8), bundle.codec.frame_rate, policy.device)
    with pytest.raises(NonFiniteError, match=r"^value_loss is .*lower ppo\.value_learning_rate"):
        learner.update(batch, 0)
    assert all(value.isfinite().all() for value in learner.critic.parameters.values())


def test_learning_rate_falls_as_a_cosine():
    learner = Learner.__new__(Learner)
    learner.trainer = TrainerConfig(updates=10)
    learner.config = OptimiserConfig(learning_rate=1.0, final_share=0.2, warmup_updates=0)
    assert learner.learning_rate(0) == pytest.approx(1.0)
    assert learner.learning_rate(5) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert learner.learning_rate(10) == pytest.approx(0.2)
    learner.config = OptimiserConfig(learning_rate=1.0, schedule="constant", warmup_updates=3)
    assert [learner.learning_rate(update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_every_segment_comes_once_before_any_comes_twice(nano_segments):
    axes = {s.axis for s in nano_segments}
    per_axis = min(sum(s.axis == axis for s in nano_segments) for axis in axes)
    seen = [s.id for update in range(per_axis // 2) for s in segments_of_update(nano_segments, update, 8, seed=1)]
    assert len(seen) == len(set(seen)) == 4 * 2 * (per_axis // 2)
    assert segments_of_update(nano_segments, 3, 8, 1) == segments_of_update(nano_segments, 3, 8, 1)
    assert segments_of_update(nano_segments, 3, 8, 1) != segments_of_update(nano_segments, 3, 8, 2)


def test_an_axis_that_is_named_twice_has_twice_the_segments(nano_segments):
    axes = ["turn_taking", "backchannel", "turn_taking"]
    seen = [s for update in range(10) for s in segments_of_update(nano_segments, update, 4, 1, axes)]
    assert len({s.id for s in seen}) == 40
    assert [s.axis for s in seen[:6]] == ["backchannel", "turn_taking", "turn_taking"] * 2
    # Once each, in whatever order they are named, is as if they were not named.
    every = [s for update in range(3) for s in segments_of_update(nano_segments, update, 4, 1)]
    named = sorted({s.axis for s in nano_segments}, reverse=True)
    assert [s for update in range(3) for s in segments_of_update(nano_segments, update, 4, 1, named)] == every


def test_episode_seeds_differ_in_every_counter():
    seeds = {episode_seed(*key) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5


def short_run(run_dir: Path, few, **overrides) -> list[dict]:
    """A small run; gives its metrics without the times, which no two runs share."""
    defaults = {
        "run_dir": run_dir,
        "segments": few,
        "trainer.updates": 2,
        "trainer.groups": 2,
        "trainer.group_size": 3,
        "trainer.minibatch": 3,
        "evaluation.episodes": 1,
        "context.lead_in": 0.4,
        "context.max_seconds": 1.0,
        "sampling.audio_top_k": 0,
        "optimiser.learning_rate": 1e-4,
        "checkpointing.every": 1,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    train(load_config(None, [f"{key}={value}" for key, value in defaults.items()]), QUIET)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "audio_seconds_per"))} for line in lines]


@pytest.fixture(scope="module")
def few(tmp_path_factory, one_of_each):
    """A manifest of one segment an axis."""
    path = tmp_path_factory.mktemp("few") / "segments.jsonl"
    write_manifest(path, one_of_each)
    return path


def test_same_seed_same_metrics_to_the_bit_and_resume_is_exact(tmp_path, few):
    straight = short_run(tmp_path / "a", few)
    again = short_run(tmp_path / "b", few)
    other = short_run(tmp_path / "c", few, seed=1)
    assert len(straight) == 2
    assert straight == again
    assert straight != other
    evaluation = [json.loads((tmp_path / run / "evaluation" / "after.json").read_text()) for run in "ab"]
    assert evaluation[0]["axes"] == evaluation[1]["axes"]
    # One update, then on to two: the schedule is that of the whole run, so only the number of updates differs.
    run = tmp_path / "resumed"
    short_run(run, few)
    shutil.rmtree(run / "checkpoints" / "step_000002")
    resumed = short_run(run, few, resume="true")
    assert resumed == straight
    with pytest.raises(InputError, match=r"optimiser.learning_rate was 0.0001 and is 0.5"):
        short_run(run, few, resume="true", **{"optimiser.learning_rate": 0.5})


def test_an_axis_of_ones_own_trains_and_an_older_run_is_kept(tmp_path, few):
    (tmp_path / "overlap.py").write_text(
        "from rewards import RewardAxis, Score\n\n\n"
        "class Overlap(RewardAxis):\n"
        "    name = 'overlap'\n\n"
        "    def score_episode(self, episode):\n"
        "        seconds = sum(a.overlap(u) for a in episode.scored_agent_speech for u in episode.scored_user_speech)\n"
        "        return Score(-seconds, {'overlap_seconds': seconds})\n"
    )
    run = tmp_path / "run"
    for _ in range(2):
        target = {"rewards.overlap.target": tmp_path / "overlap.py", "trainer.updates": 1}
        metrics = short_run(run, few, **target)
    assert metrics[0]["reward/overlap"] < 0
    assert "advantage_share/overlap" in metrics[0]
    assert (tmp_path / "run.old-1" / "metrics.jsonl").is_file()


def test_the_run_folder_holds_what_design_says(tmp_path, few):
    run = tmp_path / "run"
    short_run(run, few, trainer__updates=1)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "report.html", "evaluation/before.json", "evaluation/after.json"}
    assert expected <= names
    assert "checkpoints/step_000001/model.safetensors" in names
    trained = load_bundle(str(run / "checkpoints" / "step_000001"))
    assert not torch.equal(trained.lm.text_linear.weight, load_bundle("nano").lm.text_linear.weight)
    assert not [name for name in names if "/." in name or name.startswith(".")]  # nothing half-written
    result = json.loads((run / "evaluation" / "before.json").read_text())
    assert set(result["axes"]["turn_taking"]["reward"]) == {"mean", "low", "high", "n"}


EPS = 0.5  # added to a group's spread


@pytest.mark.parametrize(
    ("algorithm", "by_hand"),
    [
        ("grpo", lambda r: (r - r.mean()) / (r.std() + EPS)),
        ("rloo", lambda r: (r - r.mean()) * len(r) / (len(r) - 1)),
        ("dr_grpo", lambda r: r - r.mean()),
    ],
)
def test_an_episodes_advantage_is_over_those_of_its_own_segment(algorithm, by_hand, tmp_path, nano_segments):
    write_inputs(tmp_path, nano_segments)
    arguments = options(
        tmp_path, tmp_path / "run", trainer__algorithm=algorithm, trainer__group_size=3, trainer__minibatch=6,
        context__probability=1, context__max_seconds=1.0, context__schedule="constant", sampling__text_temperature=3.0,
        rewards__words__advantage_eps=EPS, rewards__pause_handling__weight=0,
    )  # fmt: skip
    config, seen = load_config(None, arguments), {}
    inputs = load_inputs(config)
    with running(config, inputs, prepare_run_dir(config), Console(quiet=True)) as trainer:
        rollouts, learn = trainer.rollouts, trainer.cluster.learn
        trainer.rollouts = lambda: seen.setdefault("found", rollouts())
        trainer.cluster.learn = lambda batch, update: learn(seen.setdefault("batch", batch), update)
        trainer.step()
    found = seen["found"]
    groups = {}
    for row, episode in enumerate(found.episodes):
        groups.setdefault(episode.segment.id, []).append(row)
    assert [len(rows) for rows in groups.values()] == [3, 3]
    for rows in groups.values():
        assert len({found.episodes[row].scored_from for row in rows}) == 1  # one context for all of a group
        rewards = np.array([found.scores[row]["words"].value for row in rows])
        assert rewards.std() > 1e-3
        assert seen["batch"].advantages[rows].tolist() == pytest.approx(by_hand(rewards).tolist(), abs=1e-4)
