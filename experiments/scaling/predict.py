"""The step of Moshi 7B on more GPUs than there are here, by `rlhf_duplex.train_dry_run`; and all of it as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_duplex.config import load_config
from rlhf_duplex.train_dry_run import dry_run_training

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPUS = (8, 32, 256)


def predictions(gpus: tuple[int, ...] = GPUS) -> list[dict[str, Any]]:
    """By kind of training and number of GPUs, one group of 16 a GPU: seconds of rollout, update and sync."""
    found = []
    for kind, name in (("full", "moshi_7b_paper"), ("LoRA", "moshi_7b_lora_8gpu")):
        for count in gpus:
            # As many groups as GPUs, and one episode of each GPU in a minibatch: the paper's step at another size.
            keys = [f"cluster.workers={count}", f"trainer.groups={count}", f"trainer.minibatch={count}"]
            config = load_config(CONFIGS / f"{name}.yaml", [*keys, "trainer.microbatch=1", "dry_run.seconds=60"])
            result = dry_run_training(config, Console(quiet=True))
            seconds = result["seconds"]
            audio = count * config.trainer.group_size * config.dry_run.seconds
            found.append(
                {
                    "kind": kind,
                    "gpus": count,
                    **seconds,
                    "audio_hours_per_hour": audio / seconds["all"],
                    "gib": max(result["totals"]) / 2**30,
                }
            )
    return found


def table(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    lines = []
    if "runs" in found:
        cores = found["machine"]["cores"]
        lines += [
            f"Measured on nano, {cores} core(s):",
            "",
            "| workers | rollout, s | update, s | sync, s | step, s | ",
        ]
        lines[-1] += "audio-s/s | transport, share of the step |"
        lines.append("|---" * 7 + "|")
        for run in found["runs"]:
            names = ("time/rollout", "time/update", "time/sync", "time/total", "audio_seconds_per_second")
            cells = " | ".join(f"{run[name]:.2f}" for name in names)
            lines.append(f"| {run['workers']:.0f} | {cells} | {run['transport_share']:.1%} |")
        lines.append("")
    for part in ("rollout", "update"):
        constants = ", ".join(f"{name} {value:.3g}" for name, value in found[part].items() if name != "points")
        lines += [f"Fitted, {part}: {constants}", ""]
    lines += [
        "Predicted for Moshi 7B, a group of 16 episodes of 60 s a GPU (assumptions: experiments/scaling/README.md):",
        "",
        "| training | GPUs | rollout, s | update, s | sync, s | step, s | hours of audio an hour | GiB a GPU |",
        "|---" * 8 + "|",
    ]
    for row in found["predictions"]:
        cells = " | ".join(f"{row[name]:.1f}" for name in ("rollout", "update", "sync", "all"))
        lines.append(
            f"| {row['kind']} | {row['gpus']} | {cells} | {row['audio_hours_per_hour']:.0f} | {row['gib']:.0f} |"
        )
    return "\n".join(lines)
