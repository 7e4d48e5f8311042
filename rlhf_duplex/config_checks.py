"""What is wrong with a configuration that its types allow."""

from typing import TYPE_CHECKING

from envs.context import ContextSchedule
from envs.errors import InputError
from rlhf_duplex.cluster_config import check_cluster
from rlhf_duplex.options import check_options

if TYPE_CHECKING:
    from rlhf_duplex.config import Config, LoraConfig


def check_config(config: "Config") -> None:
    """Values that no type can rule out.

    Raises:
        InputError: the first that is wrong.
    """
    check_options(config)
    trainer = config.trainer
    ContextSchedule(config.context.probability, config.context.max_seconds, config.context.schedule)
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


def check_lora(lora: "LoraConfig") -> None:
    """Hold an adapter's options against what can be.

    Raises:
        InputError: the first that is wrong.
    """
    if not lora.parts or not set(lora.parts) <= {"temporal", "depth"}:
        raise InputError(f"lora.parts must name temporal, depth or both, found {lora.parts}")
