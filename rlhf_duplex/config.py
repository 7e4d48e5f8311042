"""The configuration: dataclasses that OmegaConf fills from a YAML file and `key=value` arguments.

Defaults are for the nano bundle on a laptop; where arXiv 2606.11167, section 3, gives a figure for the 7B that is
another, it stands in brackets.

What a value may be stands at its field; a number of which nothing is said is finite and at least 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_duplex.algorithms.objectives import OBJECTIVES
from rlhf_duplex.cluster_config import ClusterConfig, DryRunConfig
from rlhf_duplex.config_checks import check_config
from rlhf_duplex.config_files import load_structured
from rlhf_duplex.options import Allowed, option

DTYPES = ("float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb")


@dataclass
class TrainerConfig:
    """The loop.

    Attributes:
        algorithm: `grpo`, or of its family `rloo` (the mean of the other members of the group is the baseline, no
            division by the spread), `dr_grpo` (no division by spread or by an episode's own length) and `gspo` (one
            ratio for a whole episode; its clip is of another order, 4e-4 in the paper); or `ppo`, with a value function
            in place of the group's baseline (options under `ppo`).
        objective: what of a frame's text token is learned: `tokens`, `speaking` or `onsets`; `onset_frames`: see
            `rlhf_duplex.algorithms.objectives.Objective`.
        onset_words: of `onsets`, the words (by their first token) that are told from others where the agent may begin,
            such as "mm-hm"; beside these only whether it begins is learned, not with which word. Without any, each
            word is learned, and soon the ones that are heard soonest begin every answer.
        updates: how many [100].
        groups: segments an update [32]; group_size: G, episodes of each [16].
        minibatch: episodes an optimiser step [32, one a GPU]; microbatch: episodes a forward pass (no effect on
            results but rounding: memory, and on a CPU the parts that its cores share among themselves).
        passes: times that an update goes over its episodes.
        clip: eps of the ratio [0.2]; clip_high: eps above 1 where it is another (DAPO's clip-higher: 0.28).
        kl_beta: weight of KL[policy || reference] [0.01].
        sentence_kl_beta: further weight of the KL at the frames inside a sentence, those at which `onsets` takes no
            token: keeps how sentences go on, and leaves free when they begin.
        opening_kl_beta: weight of the KL of which word is said where the agent may begin, given that it says one (and
            none of `onset_words`): keeps answers from coming to begin with the same words, leaves free when they do.
        audio_beta: weight of the squared distance, relative to its size, between what the depth transformer is given
            and what the reference gives it. The loss is about the text stream alone; without this the voice, which
            reads the same features, drifts with it, and the words after the voice.
        advantages: `per_axis` (standardise each axis over the group, then add) or `weighted_sum`.
        whiten: GDPO's whitening over the batch.
        importance: `truncated` weighs each token by how much likelier it is under the policy as it is trained than it
            was when it was drawn (streaming, in another number type), at most `importance_cap` times; `none` does not.
        gradient_checkpointing: compute the layers of the transformer anew in the backward pass: less memory, a third
            more time.
        ahead: roll out the next update's episodes while this one is learned from (they are then one update old, and
            `importance` is `truncated` whatever it says; needs workers of their own). The update after a checkpoint has
            fresh episodes, so that a resumed run is the same run. (Not where a signal stopped it between two
            scheduled checkpoints: the update after that one has newer episodes than it would have had.)
    """

    algorithm: str = option("grpo", choices=("grpo", "rloo", "dr_grpo", "gspo", "ppo"))
    objective: str = option("tokens", choices=OBJECTIVES)
    onset_frames: int = option(8, above=0)
    onset_words: list[str] = field(default_factory=list)
    updates: int = 24
    groups: int = option(12, above=0)
    group_size: int = option(16, at_least=2, must="be at least 2 (a group is compared within itself)")
    minibatch: int = option(64, above=0)
    microbatch: int = option(8, above=0)
    passes: int = option(1, above=0)
    clip: float = 0.2
    clip_high: float | None = None
    kl_beta: float = 0.01
    sentence_kl_beta: float = 0.0
    opening_kl_beta: float = 0.0
    audio_beta: float = 0.0
    advantages: str = option("per_axis", choices=("per_axis", "weighted_sum"))
    whiten: bool = False
    importance: str = option("none", choices=("none", "truncated"))
    importance_cap: float = option(2.0, above=0)
    gradient_checkpointing: bool = False
    ahead: bool = False


@dataclass
class PpoConfig:
    """The value function of `trainer.algorithm: ppo`, and its advantages; see `rlhf_duplex.algorithms.values`.

    Attributes:
        gamma, gae_lambda: discount and lambda a frame (80 ms).
        value_clip: how far a value may move from its old one, in units of the reward; 0: as far as it likes.
        value_learning_rate: of the head, constant.
        standardise_rewards: rewards of an axis in standard deviations from their mean over the batch.
    """

    gamma: float = option(1.0, at_most=1)
    gae_lambda: float = option(0.99, at_most=1)
    value_clip: float = 0.5
    value_learning_rate: float = option(1e-3, above=0)
    standardise_rewards: bool = True


@dataclass
class OptimiserConfig:
    """AdamW [2e-7, betas 0.9 and 0.95, weight decay 0.1, clip norm 2, cosine].

    `schedule`: `cosine` (to `final_share` of the rate after the last update) or `constant`, after `warmup_updates` in
    which the rate rises linearly (Adam's first steps have the full size whatever the gradient).
    """

    learning_rate: float = option(3e-4, above=0)
    betas: tuple[float, float] = option((0.9, 0.95), below=1)
    weight_decay: float = 0.0
    clip_norm: float = option(2.0, above=0)
    schedule: str = option("cosine", choices=("cosine", "constant"))
    final_share: float = option(0.1, at_most=1)
    warmup_updates: int = 2


@dataclass
class SamplingConfig:
    """How tokens are drawn [text 0.7, audio 0.8, audio top-k 250]; see `rlhf_duplex.policy.sampling.Sampling`."""

    text_temperature: float = 0.7
    text_top_k: int = 0
    audio_temperature: float = 0.8
    audio_top_k: int = 0


@dataclass
class ContextConfig:
    """What precedes a segment [30 s, lead-in 3 s for Moshi]; see `envs.context.ContextSchedule`.

    `lead_in`: seconds of silence before everything.
    """

    lead_in: float = 1.0
    probability: float = option(0.5, at_most=1)
    max_seconds: float = 5.0
    schedule: str = "linear"


@dataclass
class DetectorConfig:
    """Speech detection: `silero` or `energy`, with its options (see `envs.speech`)."""

    name: str = "silero"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RolloutConfig:
    """How episodes are played.

    Attributes:
        batch_size: dialogues at once; 0: as many as memory is free for (on a GPU).
        merged: with adapters, act with a merged copy of the layers that have one: faster frames for their memory. It
            rounds otherwise than the adapters do, which `mismatch/*` shows and `trainer.importance` corrects.
    """

    batch_size: int = 256
    merged: bool = False


@dataclass
class CheckpointingConfig:
    """A checkpoint every so many updates (and at the end); the last `keep` are kept, and the best.

    `best`: a metric of metrics.jsonl, its mean over the updates since the checkpoint before; higher is better, with a
    minus before its name lower is (`-kl`). `checkpoints/best` points to it. Empty: none is kept as the best.
    """

    every: int = option(10, above=0)
    keep: int = option(2, above=0)
    best: str = "reward/total"


@dataclass
class EvaluationConfig:
    """Before and after training.

    Attributes:
        segments: manifest of the held-out segments, `nano` for those that ship with nano; None: those of nano when
            it is trained on its own segments, else the training segments (the report then says so).
        limit: play only the first so many segments of each axis; 0 plays all. Of `evaluate --suite live` it is the
            number of dialogues, 32 where it is 0.
        samples: episodes of each segment.
        episodes: segments of each axis whose episodes are kept to look at and listen to.
        seed: of the episodes, the same before and after.
        every: during training, also after every so many updates, on the first `every_limit` segments of each axis;
            0 never. The figures are in metrics.jsonl under `evaluation/`, and a file each in the run folder.
        every_limit: segments of each axis that are played during training.
        before: `evaluation/before.json` of another run of the same policy on the same segments, taken (with the
            episodes beside it) instead of playing them again; None plays them. A reward that it measured with other
            options of the axis is shown, but not compared.
    """

    segments: str | None = None
    limit: int = 0
    samples: int = option(1, above=0)
    episodes: int = 6
    seed: int = 1
    every: int = 0
    every_limit: int = option(4, above=0)
    before: str | None = None


@dataclass
class LiveConfig:
    """Live dialogues, with a user that hears the agent and reacts; see `rlhf_duplex.live`.

    Attributes:
        dialogues: different scripts to train on.
        seconds: of each, in training and in `evaluate --suite live` (which takes `evaluation.limit` dialogues).
        lead_in: seconds of silence before the user's first words.
        user: `scripted`, or the checkpoint of a second policy of the same codec, which hears the agent and answers.
    """

    dialogues: int = option(64, above=0)
    seconds: float = option(20.0, above=0)
    lead_in: float = option(1.0, above=0)
    user: str = "scripted"


@dataclass
class LoraConfig:
    """Low-rank adapters instead of full training; see `rlhf_duplex.policy.lora`.

    Attributes:
        rank: 0 trains the weights themselves.
        scaling: of an adapter, alpha / rank.
        flavour: `moshi` (exported for `moshi.server --lora-weight`) or `peft`.
        parts: `temporal`, `depth` or both.
    """

    rank: int = 0
    scaling: float = option(2.0, above=0)
    flavour: str = option("moshi", choices=("moshi", "peft"))
    parts: list[str] = field(default_factory=lambda: ["temporal"])


@dataclass
class PromptConfig:
    """What the policy is told before every dialogue, masked out of the loss (PersonaPlex; none for Moshi).

    Attributes:
        voice: a recording of the voice that the agent is to have.
        text: its role, in words; put between `<system>` tags.
        silence_seconds: after each of the two.
        user_frame, silent_frame: Mimi's codes of the user's frame all the while and of a silent agent's; None: those of
            PersonaPlex for Moshi's Mimi, and for another one what it makes of a tone of 440 Hz and of silence.
    """

    voice: str | None = None
    text: str | None = None
    silence_seconds: float = 0.5
    user_frame: list[int] | None = None
    silent_frame: list[int] | None = None


def _default_rewards() -> dict[str, Any]:
    return {axis: {"weight": 1.0} for axis in ("pause_handling", "turn_taking", "backchannel", "user_interruption")}


@dataclass
class Config:
    """A whole run.

    Attributes:
        run_dir: where everything is written.
        seed: of everything random.
        checkpoint: `nano`, a bundle's folder, or a hub id.
        segments: manifest to train on, or `nano` for the segments that ship with it.
        train_axes: train on the segments of these axes only, in turn (one that is named twice has twice the groups);
            empty: all that the manifest has.
        resume: go on from the run folder's last checkpoint.
        device: `cpu`, `cuda`, `cuda:1`...; dtype: of the policy's weights.
        env: what RL trains in: `replay` (recorded users) or `live` (users that react, who speak with the utterances of
            the training segments). The evaluation before and after is on recorded users either way.
        rewards: by axis, `weight`, `target`, `advantage_eps` (`rewards.aggregate.RewardSpec`), and its own options.
        dry_run: what `train --dry-run` reckons with.
        trackers: mirrors of metrics.jsonl: `tensorboard`, `wandb`.
        codes_cache: folder where the codes of users' audio are kept for later runs (`rlhf_duplex.data.codes`); `auto`
            is the user's cache folder, `none` keeps none.
    """

    run_dir: str = "runs/default"
    seed: int = 0
    checkpoint: str = "nano"
    segments: str = "nano"
    train_axes: list[str] = field(default_factory=list)
    resume: bool = False
    device: str = "cpu"
    dtype: str = option("float32", choices=DTYPES)
    env: str = option("replay", choices=("replay", "live"))
    live: LiveConfig = field(default_factory=LiveConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rewards: dict[str, Any] = field(default_factory=_default_rewards)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)
    trackers: list[str] = field(default_factory=list, metadata={"allowed": Allowed(choices=TRACKERS)})
    codes_cache: str = "auto"


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration: defaults, then the file, then `key=value` overrides.

    Args:
        path: YAML file. Where it has `rewards`, these replace the default axes (an axis that is not named is off).
        overrides: such as `trainer.updates=20`.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value of the wrong type or out of range.
    """
    result: Config = load_structured(Config, path, overrides, replaced=("rewards",))
    result.rewards = {name: {} if options is None else options for name, options in result.rewards.items()}
    check_config(result)
    return result
