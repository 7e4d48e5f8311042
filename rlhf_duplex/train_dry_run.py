"""What a training run would take: memory a GPU by part, placement, and seconds a step; no weight is read.

Sizes are counted on the meta device from the model's real configuration, activations with the learner's own loss. Not
in it: what the allocator loses, communication buffers, and the suite before and after. Seconds are those of
`rlhf_duplex.step_model`, for the machine that `dry_run` describes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from rich.console import Console
from rich.table import Table

from envs.frames import frame_at, frames_in
from envs.segments import read_manifest
from rlhf_duplex.batch import Batch
from rlhf_duplex.config import Config
from rlhf_duplex.inputs import NANO_DATA
from rlhf_duplex.learner import Learner
from rlhf_duplex.memory_model import (
    GIB,
    count_memory,
    gathered_bytes,
    meta_model,
    model_config,
    peak_bytes,
    saved_bytes,
)
from rlhf_duplex.policy.bundle import meta_mimi
from rlhf_duplex.policy.codec import DECODED_FRAMES
from rlhf_duplex.policy.lora import add_lora, is_adapted
from rlhf_duplex.policy.memory import USED
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.policy.scoring import LOGITS_AT_ONCE
from rlhf_duplex.run_folder import make_console
from rlhf_duplex.step_model import Machine, Size, rollout_seconds, sync_seconds, update_seconds

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Who is where.

    Attributes:
        workers, learners: processes of each role; colocated: whether they are the same.
        episodes: that one worker plays at once; rounds: how often it does so in an update.
        microbatches: that one learner computes in a pass.
    """

    workers: int
    learners: int
    colocated: bool
    episodes: int
    rounds: int
    microbatches: int


def make_plan(config: Config) -> Plan:
    """The placement that a configuration asks for."""
    cluster, trainer = config.cluster, config.trainer
    workers = max(1, cluster.workers)
    colocated = cluster.workers == 0 or cluster.placement == "colocated"
    learners = workers if colocated else cluster.learners
    total = trainer.groups * trainer.group_size
    share = -(-total // workers)
    episodes = min(share, config.rollout.batch_size or share)  # 0: as many as there is room for, see below
    a_minibatch = -(-min(trainer.minibatch, total) // trainer.microbatch)
    steps = -(-total // trainer.minibatch)
    return Plan(workers, learners, colocated, episodes, -(-share // episodes), steps * -(-a_minibatch // learners))


def dry_run_training(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Print what a run would take; gives the figures (bytes, seconds).

    Raises:
        InputError: what is wrong with the checkpoint's configuration or the manifest.
    """
    console = console or make_console()
    plan, cluster, trainer = make_plan(config), config.cluster, config.trainer
    sizes = model_config(config.checkpoint)
    half = cluster.mixed_precision == "bfloat16"
    lm, mimi = meta_model(sizes.lm, _TYPES[config.dtype]), meta_mimi(sizes.mimi, config.checkpoint)
    learner = _meta_learner(config, lm)
    frames, counted = _frames(config, mimi.frame_rate)
    cut = cluster.strategy == "fsdp"
    parts = {name: part.total for name, part in count_memory(lm, plan.learners, cut).items()}
    of_learner = {f"{name} (weights, gradients, optimiser)": size for name, size in parts.items()}
    of_learner["reference"] = _reference_bytes(learner, plan.learners, cut)
    copied = sum(m.numel() for name, m in learner.masters.items() if m is not learner.parameters[name])
    if copied:  # a number's copy 4 bytes, its gradient 4 where 2 are counted, the optimiser's 8 where 4 are
        of_learner["float32 copies of what is trained"] = 10 * copied // (plan.learners if cut else 1)
    if learner.critic is not None:
        of_learner["value head"] = 4 * sum(p.nbytes for p in learner.critic.parameters.values())
    if cut and plan.learners > 1:
        of_learner["gathered weights"] = gathered_bytes(lm, 2 if half else _TYPES[config.dtype].itemsize)
    of_learner["activations"] = _activations(config, sizes.lm, frames, torch.bfloat16 if half else _TYPES[config.dtype])
    own_copy = not plan.colocated or cut
    acting = _TYPES[cluster.rollout_dtype or config.dtype]
    of_worker = {"policy that acts": sum(p.numel() for p in lm.parameters()) * acting.itemsize if own_copy else 0}
    if config.lora.rank and config.rollout.merged:
        of_worker["layers with adapters, merged"] = acting.itemsize * sum(
            p.numel() for name, p in lm.named_parameters() if is_adapted(name)
        )
    of_worker["Mimi"], of_worker["audio that Mimi decodes at once"] = _mimi_bytes(mimi)
    cache = _cache_bytes(lm, acting)
    if not config.rollout.batch_size:  # what is left, as `dialogues_that_fit` finds it
        taken = sum(of_worker.values()) + (sum(of_learner.values()) if plan.colocated else 0)
        fit = max(1, int(USED * (config.dry_run.gpu_gib * GIB - taken) / (frames * cache)))
        share, episodes = plan.episodes, min(plan.episodes, fit)
        plan = replace(plan, episodes=episodes, rounds=-(-share // episodes))
    of_worker[f"keys and values of {plan.episodes} episodes"] = plan.episodes * frames * cache
    total_learner, total_worker = sum(of_learner.values()), sum(of_worker.values())
    totals = [total_learner + total_worker] if plan.colocated else [total_learner, total_worker]
    seconds = _seconds(config, plan, lm, learner, frames, acting)
    count = plan.workers if plan.colocated else plan.workers + plan.learners
    console.print(f"checkpoint {config.checkpoint}: {sizes.source}")
    console.print(_placement(config, plan, count))
    for title, rows in (("learner", of_learner), ("rollout worker", of_worker)):
        table = Table(title=f"GiB on the GPU of a {title}", title_justify="left")
        table.add_column("part")
        table.add_column("GiB", justify="right")
        for name, size in rows.items():
            table.add_row(name, f"{size / GIB:.2f}")
        table.add_section()
        table.add_row("all", f"{sum(rows.values()) / GIB:.2f}")
        console.print(table)
    console.print(
        f"a step of {trainer.groups * trainer.group_size} episodes of {frames} frames ({counted}): "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    )
    limit = config.dry_run.gpu_gib
    fits = max(totals) / GIB <= limit
    console.print(
        f"dry run: the configuration holds; {max(totals) / GIB:.1f} GiB on the fullest of {count} GPUs "
        f"{'fits' if fits else 'does not fit'} {limit:g} GiB; {trainer.updates} updates take "
        f"{trainer.updates * seconds['all'] / 3600:.1f} h; nothing was loaded or written"
    )
    return {
        "learner": of_learner,
        "worker": of_worker,
        "totals": totals,
        "seconds": seconds,
        "plan": plan,
        "fits": fits,
    }


def _meta_learner(config: Config, lm: LMModel) -> Learner:
    """The learner of a run with shapes and no storage: what is trained and what is shared as it will be."""
    if config.lora.rank:
        add_lora(lm, seed=config.seed, **vars(config.lora))
    with torch.device("meta"):
        policy = MoshiPolicy(lm, Sampling(**vars(config.sampling)))
        return Learner(policy, config.trainer, config.optimiser, config.seed, config.ppo)


def _reference_bytes(learner: Learner, learners: int, cut: bool) -> int:
    """The reference's own weights: with full sharding all of them, else those that the policy trains."""
    shared = set() if cut else {id(p) for p in learner.policy.lm.parameters()}
    own = sum(p.nbytes for p in learner.reference.lm.parameters() if id(p) not in shared)
    return own // (learners if cut else 1)


def _activations(config: Config, arguments: Any, frames: int, computed: torch.dtype) -> int:
    """What the backward pass of a microbatch keeps, and the gradient of its logits."""
    lm = meta_model(arguments, computed)
    learner = _meta_learner(config, lm)
    rows = config.trainer.microbatch
    # With activation checkpointing it is one layer at a time, and every layer's input.
    with torch.device("meta"):
        batch = Batch(
            torch.zeros(rows, 1 + lm.n_q, frames, dtype=torch.long),
            torch.zeros(rows, frames),
            torch.ones(rows, frames, dtype=torch.bool),
            torch.zeros(rows, frames),
            values=torch.zeros(rows, frames),
            returns=torch.zeros(rows, frames),
        )
        kept = saved_bytes(lambda: learner._loss(batch, None)[0], dict(lm.named_parameters()))
        if lm.transformer.checkpointing:
            lm.transformer.checkpointing = False
            whole = saved_bytes(lambda: learner._loss(batch, None)[0], dict(lm.named_parameters()))
            layers = len(lm.transformer.layers)
            inputs = layers * rows * frames * lm.dim * computed.itemsize
            kept += inputs + (whole - kept) // layers
    return kept + 4 * min(rows * frames * lm.text_card, LOGITS_AT_ONCE)


def _cache_bytes(lm: LMModel, dtype: torch.dtype) -> int:
    """Keys and values of one frame of one episode in the temporal transformer."""
    attention = lm.transformer.layers[0].self_attn
    width = attention.embed_dim // attention.kv_repeat
    return 2 * len(lm.transformer.layers) * width * dtype.itemsize


def _mimi_bytes(mimi: MimiModel) -> tuple[int, int]:
    """Its weights, and what it holds on the way to the audio of as many frames as are decoded at once."""
    with torch.device("meta"):
        codes = torch.zeros(DECODED_FRAMES // 100, mimi.num_codebooks, 100, dtype=torch.long)
        decoding = peak_bytes(lambda: mimi.decode(codes))
    return sum(4 * p.numel() for p in mimi.parameters()), decoding


def _frames(config: Config, frame_rate: float) -> tuple[int, str]:
    """Frames of the longest episode, each part counted as the environments do, and where that was learned."""
    if config.env == "live":
        live = config.live
        return frames_in(live.lead_in, frame_rate) + frames_in(live.seconds, frame_rate), "live dialogues"
    path = NANO_DATA / "train" / "segments.jsonl" if config.segments == "nano" else Path(config.segments)
    if not path.is_file():
        return frames_in(config.dry_run.seconds, frame_rate), f"{config.dry_run.seconds:g} s are assumed"
    context = config.context.max_seconds if config.context.probability > 0 else 0.0
    longest = max(
        frames_in(segment.duration, frame_rate) + frame_at(min(context, segment.start), frame_rate)
        for segment in read_manifest(path)
    )
    lead_in = frames_in(config.context.lead_in, frame_rate)
    return lead_in + longest, f"the longest segment of {path}, with lead-in and context"


def _seconds(
    config: Config, plan: Plan, lm: LMModel, learner: Learner, frames: int, acting: torch.dtype
) -> dict[str, float]:
    known, cluster, trainer = config.dry_run, config.cluster, config.trainer
    machine = Machine(known.bandwidth, known.flops, near=known.near, far=known.far, node=known.node)
    sizes: dict[str, int] = {"temporal": 0, "depth": 0, "embeddings": 0, "lora": 0}
    for name, part in count_memory(lm, 1, False).items():
        sizes[name] = part.parameters
    trained = sum(p.numel() for p in learner.parameters.values())
    computed = 2 if cluster.mixed_precision == "bfloat16" or config.dtype == "bfloat16" else 4
    size = Size(
        sizes["temporal"] + sizes["lora"],
        sizes["depth"],
        trained,
        (sizes["temporal"] + sizes["lora"] + sizes["depth"]) * acting.itemsize,
        _cache_bytes(lm, acting),
        trained * acting.itemsize,
        sum(p.numel() for p in lm.parameters()) * computed,
    )
    cut = cluster.strategy == "fsdp"
    weighted = trainer.ahead or trainer.importance == "truncated"
    before = int(learner.critic is not None or weighted or trainer.objective != "tokens")
    total = trainer.groups * trainer.group_size
    computing, moving = update_seconds(
        size,
        machine,
        total * frames,
        plan.learners,
        trainer.passes,
        before,
        config.trainer.gradient_checkpointing,
        cut,
        plan.microbatches,
        -(-total // trainer.minibatch),
    )
    how = "shared" if plan.colocated and not cut else "broadcast" if plan.colocated else cluster.weights
    found = {
        "rollout": plan.rounds * rollout_seconds(size, machine, plan.episodes, frames),
        "update": computing + moving,
        "sync": sync_seconds(size, machine, plan.workers, how),
    }
    beside = trainer.ahead  # rollouts and update at the same time
    whole = max(found["rollout"], found["update"]) if beside else found["rollout"] + found["update"]
    return {**found, "all": whole + found["sync"]}


def _placement(config: Config, plan: Plan, count: int) -> str:
    nodes = -(-count // config.dry_run.node)
    where = f"{count} GPU{'s' if count > 1 else ''} ({nodes} node{'s' if nodes > 1 else ''} of {config.dry_run.node})"
    how = {"ddp": "all weights on each", "fsdp": f"weights cut over {plan.learners}"}[config.cluster.strategy]
    play = f"{plan.episodes} episodes at once" + (f", {plan.rounds} times" if plan.rounds > 1 else "")
    if plan.colocated:
        return f"placement: {where}, each a rollout worker ({play}), then a learner ({how})"
    return f"placement: {where}: {plan.workers} rollout workers ({play} each), {plan.learners} learners ({how})"
