"""What is wrong with a configuration that its types allow."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from envs.context import ContextSchedule
from envs.errors import InputError
from rlhf_duplex.algorithms.objectives import OBJECTIVES
from rlhf_duplex.cluster_config import check_cluster

if TYPE_CHECKING:
    from rlhf_duplex.config import Config, LoraConfig


def check_config(config: "Config") -> None:
    """Values that no type can rule out.

    Raises:
        InputError: the first that is wrong.
    """
    trainer, optimiser = config.trainer, config.optimiser
    positive = {
        "trainer.groups": trainer.groups,
        "trainer.minibatch": trainer.minibatch,
        "trainer.microbatch": trainer.microbatch,
        "trainer.importance_cap": trainer.importance_cap,
        "trainer.passes": trainer.passes,
        "trainer.onset_frames": trainer.onset_frames,
        "checkpointing.every": config.checkpointing.every,
        "checkpointing.keep": config.checkpointing.keep,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.every_limit": config.evaluation.every_limit,
        "live.dialogues": config.live.dialogues,
        "live.seconds": config.live.seconds,
        "live.lead_in": config.live.lead_in,
        "optimiser.learning_rate": optimiser.learning_rate,
        "optimiser.clip_norm": optimiser.clip_norm,
        "ppo.value_learning_rate": config.ppo.value_learning_rate,
    }
    check_positive(positive)
    if trainer.group_size < 2:
        raise InputError(
            f"trainer.group_size must be at least 2 (a group is compared within itself), found {trainer.group_size}"
        )
    not_negative = {
        "seed": config.seed,
        "evaluation.seed": config.evaluation.seed,
        "optimiser.weight_decay": optimiser.weight_decay,
        "trainer.updates": trainer.updates,
        "trainer.clip": trainer.clip,
        "trainer.clip_high": trainer.clip if trainer.clip_high is None else trainer.clip_high,
        "trainer.kl_beta": trainer.kl_beta,
        "trainer.sentence_kl_beta": trainer.sentence_kl_beta,
        "trainer.opening_kl_beta": trainer.opening_kl_beta,
        "trainer.audio_beta": trainer.audio_beta,
        "ppo.value_clip": config.ppo.value_clip,
        "context.lead_in": config.context.lead_in,
        "context.max_seconds": config.context.max_seconds,
        **{f"sampling.{key}": value for key, value in vars(config.sampling).items()},
        "optimiser.warmup_updates": optimiser.warmup_updates,
        "evaluation.limit": config.evaluation.limit,
        "evaluation.episodes": config.evaluation.episodes,
        "evaluation.every": config.evaluation.every,
        "rollout.batch_size": config.rollout.batch_size,
    }
    check_not_negative(not_negative)
    for key, seed in {"seed": config.seed, "evaluation.seed": config.evaluation.seed}.items():
        if seed >= 2**63:
            raise InputError(f"{key} must be below 2^63, found {seed}")
    if not 0 <= optimiser.final_share <= 1:
        raise InputError(f"optimiser.final_share must lie in [0, 1], found {optimiser.final_share}")
    ContextSchedule(config.context.probability, config.context.max_seconds, config.context.schedule)
    if not all(0 <= beta < 1 for beta in optimiser.betas):
        raise InputError(f"optimiser.betas must lie in [0, 1), found {list(optimiser.betas)}")
    choices = {
        "trainer.algorithm": (trainer.algorithm, ("grpo", "rloo", "dr_grpo", "gspo", "ppo")),
        "trainer.objective": (trainer.objective, OBJECTIVES),
        "trainer.advantages": (trainer.advantages, ("per_axis", "weighted_sum")),
        "trainer.importance": (trainer.importance, ("none", "truncated")),
        "optimiser.schedule": (optimiser.schedule, ("cosine", "constant")),
        "dtype": (config.dtype, ("float32", "bfloat16")),
        "env": (config.env, ("replay", "live")),
    }
    for key, (chosen, allowed) in choices.items():
        if chosen not in allowed:
            raise InputError(f"{key} '{chosen}' is not known: choose {' or '.join(allowed)}")
    if not (0 <= config.ppo.gamma <= 1 and 0 <= config.ppo.gae_lambda <= 1):
        raise InputError(
            f"ppo.gamma and ppo.gae_lambda must lie in [0, 1], found {config.ppo.gamma} and {config.ppo.gae_lambda}"
        )
    if trainer.onset_words and trainer.objective != "onsets":
        raise InputError(
            f"trainer.onset_words are of trainer.objective=onsets, found {trainer.objective}: set it, or leave them out"
        )
    if config.env == "live" and config.train_axes:
        raise InputError("train_axes chooses recorded segments: env=live has none")
    check_lora(config.lora)
    if config.lora.rank and "temporal" not in config.lora.parts:
        raise InputError(f"lora.parts {config.lora.parts}: RL trains the text stream, which needs temporal")
    check_cluster(config.cluster, trainer.ahead)
    if config.cluster.workers and config.device.startswith("cuda:"):
        raise InputError(
            f"device {config.device}: on Ray each process sees the GPUs that it was given: write device=cuda"
        )
    for name in config.trackers:
        if name not in ("tensorboard", "wandb"):
            raise InputError(f"tracker '{name}' is not known: choose tensorboard or wandb")


def check_positive(values: Mapping[str, float]) -> None:
    """Values by key, all of which must be above 0 and finite.

    Raises:
        InputError: the first that is not.
    """
    for key, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{key} must be above 0, found {value}")


def check_not_negative(values: Mapping[str, float]) -> None:
    """Values by key, all of which must be at least 0 and finite.

    Raises:
        InputError: the first that is not.
    """
    for key, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"{key} must be a number of at least 0, found {value}")


def check_lora(lora: "LoraConfig") -> None:
    """Hold an adapter's options against what can be.

    Raises:
        InputError: the first that is wrong.
    """
    if lora.rank < 0 or not (lora.scaling > 0 and math.isfinite(lora.scaling)):
        raise InputError(f"lora.rank must be at least 0 and lora.scaling above 0, found {lora.rank} and {lora.scaling}")
    if lora.flavour not in ("moshi", "peft"):
        raise InputError(f"lora.flavour '{lora.flavour}' is not known: choose moshi or peft")
    if not lora.parts or not set(lora.parts) <= {"temporal", "depth"}:
        raise InputError(f"lora.parts must name temporal, depth or both, found {lora.parts}")
