"""The configuration of a warm start, with the figures of arXiv 2506.21463 in brackets where nano's are others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from envs.errors import InputError
from rlhf_duplex.algorithms.objectives import OBJECTIVES
from rlhf_duplex.config import (
    DTYPES,
    TRACKERS,
    CheckpointingConfig,
    DetectorConfig,
    EvaluationConfig,
    LoraConfig,
    PromptConfig,
    SamplingConfig,
    _default_rewards,
)
from rlhf_duplex.config_checks import check_lora
from rlhf_duplex.config_files import load_structured
from rlhf_duplex.data.pair import KINDS
from rlhf_duplex.options import Allowed, check_options, check_value, option
from rlhf_duplex.policy.lora import PARTS, part_of

LOSSES = ("sigmoid_norm", "sigmoid", "ipo", "apo_zero", "hinge", "robust", "simpo")
STREAMS = ("text", "semantic", "audio")
SPANS = ("pair", "reply")


@dataclass
class LossConfig:
    """What is optimised.

    Attributes:
        name: `sigmoid_norm` (DPO-LN), `sigmoid` (DPO), `ipo`, `apo_zero`, `hinge`, `robust` (TRL's `DPOTrainer`) or
            `simpo` (TRL's `CPOTrainer`, without a reference).
        beta: weight of the log-ratios [0.3].
        label_smoothing: of `robust` (the share of flipped pairs) and `simpo`.
        simpo_gamma: target margin of SimPO, in units of the reward.
        streams: `text`, `semantic` (text and the agent's semantic codebook) or `audio` (text and all codebooks of the
            agent): what a reply's log-probability is the sum of.
        objective: what of a text token is learned: `tokens` [tokens], `speaking` or `onsets`; `onset_frames`: see
            `rlhf_duplex.algorithms.objectives.Objective`.
        count_pad: whether |y| counts frames in which the text stream is padding (PAD or EPAD). Their log-probabilities
            are in the sum either way: staying silent is an action. Not given in the paper; without them a silent
            reply has |y| = 1, which gives it a weight many times that of a spoken one.
        span: `pair`, the frames that the pair names (from where chosen and rejected part), or `reply`, all that
            follows the context.
        sft_weight: of the mean negative log-likelihood of the chosen reply's tokens beside the preference loss (RPO,
            arXiv 2404.19733, eq. 2); keeps words and voice where pairs are about timing.
        sft_streams: `text`, `semantic` or `audio`, as `streams`; each stream counts the same.
    """

    name: str = option("sigmoid_norm", choices=LOSSES)
    beta: float = option(0.3, above=0)
    label_smoothing: float = option(0.0, below=0.5)
    simpo_gamma: float = 0.5
    streams: str = option("text", choices=STREAMS)
    objective: str = option("tokens", choices=OBJECTIVES)
    onset_frames: int = option(8, above=0)
    count_pad: bool = True
    span: str = option("pair", choices=SPANS)
    sft_weight: float = 0.0
    sft_streams: str = option("audio", choices=STREAMS)


@dataclass
class ReferenceConfig:
    """The frozen policy of the log-ratios: the checkpoint.

    Attributes:
        mode: `cached`, its log-probabilities are computed once, before training; `lora_off`, on the fly with the
            adapters switched off.
        cache: file of `cached`; None is `reference.safetensors` in the run folder. It is bound to the content of pairs
            and weights and to the options: what is stale is computed anew.
    """

    mode: str = option("cached", choices=("cached", "lora_off"))
    cache: str | None = None


@dataclass
class LearningRates:
    """By part of the model [temporal 5e-9, depth 1e-6; the others not given]; 0 freezes a part.

    The depth transformer learns only from audio streams; where the loss has none it is not run.
    """

    temporal: float = 1e-4
    depth: float = 1e-4
    embeddings: float = 1e-4
    lora: float = 1e-3


@dataclass
class WarmstartOptimiser:
    """AdamW. `schedule`: `cosine` [cosine], `linear` or `constant`, after `warmup_steps` of linear rise."""

    learning_rates: LearningRates = field(default_factory=LearningRates)
    betas: tuple[float, float] = option((0.9, 0.95), below=1)
    weight_decay: float = 0.0
    clip_norm: float = option(1.0, above=0)
    schedule: str = option("cosine", choices=("cosine", "linear", "constant"))
    warmup_steps: int = 2


@dataclass
class TrainingConfig:
    """The loop.

    Attributes:
        epochs: passes over the pairs [1].
        batch_size: pairs an optimiser step, over all devices [16; 32 for SimPO].
        microbatch: pairs a device takes at once (memory only).
        gradient_checkpointing: recompute the transformer's layers in the backward pass.
        autocast: `none` or `bfloat16`: the type that products are computed in, beside `dtype`, that of the weights. A
            rate of 5e-9 is lost in bfloat16 weights, which keep 8 bits.
        fsdp: shard weights, gradients and optimiser over the devices (start it with accelerate or torchrun).
        devices: how many the dry run reckons with; a real run counts them itself.
        at_most: by kind of pair (`pause_handling: 40`), how many of it are learned from, spread over all of it;
            evens out kinds without making the pairs anew (`pairs --balance` cuts all to the rarest).
    """

    epochs: int = option(1, above=0)
    batch_size: int = option(16, above=0)
    microbatch: int = option(16, above=0)
    gradient_checkpointing: bool = False
    autocast: str = option("none", choices=("none", "bfloat16"))
    fsdp: bool = False
    devices: int = option(1, above=0)
    at_most: dict[str, int] = field(default_factory=dict)


@dataclass
class DryRunConfig:
    """What `--dry-run` reckons with where the pairs are not made yet: how many, and the seconds of the longest."""

    pairs: int = 0
    seconds: float = option(30.0, above=0)


@dataclass
class WarmstartEvaluation(EvaluationConfig):
    """Of the held-out pairs during training, and of the four axes before and after (see `EvaluationConfig`).

    Attributes:
        every: steps between two evaluations of the held-out pairs; 0: at the end only.
        pairs: held-out pairs that are evaluated, the first so many of each kind; 0: all.
        segments: manifest of held-out segments for the axes, `nano` for those that ship with nano; None plays none.
        lead_in: seconds of silence before each segment.
        batch_size: dialogues of the axes that are played at once (of held-out pairs it is `training.microbatch`).
    """

    segments: str | None = "nano"
    every: int = 20
    pairs: int = 0
    lead_in: float = 1.0
    batch_size: int = option(256, above=0)


@dataclass
class WarmstartConfig:
    """A whole warm start.

    Attributes:
        run_dir, seed, checkpoint, resume, device, dtype, trackers, codes_cache: as in `rlhf_duplex.config.Config`.
        pairs: `pairs.jsonl` of `rlhf-duplex pairs`.
        sampling: how the agent draws its tokens in the evaluation of the axes; the loss has the model's own
            distribution (temperature 1).
    """

    run_dir: str = "runs/warm"
    seed: int = 0
    checkpoint: str = "nano"
    pairs: str = "runs/pairs/pairs.jsonl"
    resume: bool = False
    device: str = "cpu"
    dtype: str = option("float32", choices=DTYPES)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optimiser: WarmstartOptimiser = field(default_factory=WarmstartOptimiser)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    rewards: dict[str, Any] = field(default_factory=_default_rewards)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    evaluation: WarmstartEvaluation = field(default_factory=WarmstartEvaluation)
    trackers: list[str] = field(default_factory=list, metadata={"allowed": Allowed(choices=TRACKERS)})
    codes_cache: str = "auto"
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)


# What a resumed warm start must keep; how it is spread over devices and evaluated may change.
DECIDES_NUMBERS = ("seed", "checkpoint", "pairs", "dtype", "loss", "lora", "prompt", "optimiser", "training")
MAY_CHANGE = ("training.fsdp", "training.devices", "training.gradient_checkpointing")


def load_warmstart_config(path: Path | None = None, overrides: Sequence[str] = ()) -> WarmstartConfig:
    """Defaults, then the file, then `key=value` overrides; checked.

    Raises:
        InputError: the first thing that is wrong.
    """
    config: WarmstartConfig = load_structured(WarmstartConfig, path, overrides, replaced=("rewards",))
    check_warmstart(config)
    return config


def check_warmstart(config: WarmstartConfig) -> None:
    """Values that no type can rule out.

    Raises:
        InputError: the first that is wrong.
    """
    check_options(config)
    for kind, count in config.training.at_most.items():
        if kind not in KINDS:
            raise InputError(f"training.at_most.{kind} is not a kind of pair: choose {', '.join(KINDS)}")
        check_value(f"training.at_most.{kind}", count)
    if config.device.startswith("cuda:") and config.device != "cuda:0":
        raise InputError(f"device {config.device}: a warm start takes the first GPU; set CUDA_VISIBLE_DEVICES instead")
    check_lora(config.lora)
    if config.lora.rank and "temporal" not in config.lora.parts and _text_only(config.loss):
        raise InputError(f"lora.parts {list(config.lora.parts)}: a loss about text alone teaches only temporal ones")
    of_train: dict[str, tuple[Any, Any]] = {
        "checkpointing.best": (config.checkpointing.best, CheckpointingConfig().best),
        "evaluation.before": (config.evaluation.before, None),
        "evaluation.every_limit": (config.evaluation.every_limit, EvaluationConfig().every_limit),
    }
    for key, (found, unset) in of_train.items():
        if found != unset:
            raise InputError(f"{key} is of `train`; a warm start has no such thing")
    if config.reference.mode == "lora_off" and not config.lora.rank:
        raise InputError("reference.mode=lora_off needs adapters: set lora.rank, or take reference.mode=cached")
    if not trained_parts(config):
        raise InputError("nothing is left to train: give a part of optimiser.learning_rates a rate above 0")
    accumulation_steps(config, config.training.devices)


def trained_parts(config: WarmstartConfig) -> dict[str, float]:
    """The parts that are trained, with their rates: adapters alone where there are any, and the depth transformer only
    where the loss has audio streams to teach it."""
    rates = vars(config.optimiser.learning_rates)
    if config.lora.rank:
        return {"lora": rates["lora"]} if rates["lora"] > 0 else {}
    depth = not _text_only(config.loss)
    return {part: rates[part] for part in PARTS if rates[part] > 0 and (part != "depth" or depth)}


def _text_only(loss: LossConfig) -> bool:
    return loss.streams == "text" and (loss.sft_weight == 0 or loss.sft_streams == "text")


def set_trained(lm: nn.Module, config: WarmstartConfig) -> None:
    """Let the parts of the configuration learn, and freeze everything else, so that it costs no gradient."""
    parts = trained_parts(config)
    text_only = _text_only(config.loss)
    for name, parameter in lm.named_parameters():
        idle = text_only and name.startswith(("depformer", "linears"))
        parameter.requires_grad_(part_of(name) in parts and not idle)


def accumulation_steps(config: WarmstartConfig, devices: int) -> int:
    """Forward passes of a device in an optimiser step.

    Raises:
        InputError: the batch cannot be cut evenly.
    """
    batch, micro = config.training.batch_size, config.training.microbatch
    if batch % (micro * devices):
        raise InputError(
            f"training.batch_size {batch} is no multiple of training.microbatch {micro} x {devices} "
            f"device{'s' if devices > 1 else ''}"
        )
    return batch // (micro * devices)
