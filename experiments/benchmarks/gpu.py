"""`python -m experiments.benchmarks gpu`: rollouts and a whole GRPO update at the 7B's real shapes, weights random.

What is written was measured in this run, on the machine that it names. See README.md beside this file.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from envs.audio import write_audio
from envs.context import ContextSchedule
from envs.cores import cores, one_core_operations
from envs.dialogues import UserSides
from envs.errors import InputError
from envs.segments import Segment
from envs.speech import SileroDetector
from envs.vector import DuplexDialogueVectorEnv
from experiments.benchmarks.gpu_tables import tables
from experiments.benchmarks.run import ceiling, machine, synchronise
from rewards.aggregate import EarlyScores, RewardFunction, RewardSpec
from rlhf_duplex.algorithms.advantages import combine_advantages
from rlhf_duplex.batch import Batch, make_batch
from rlhf_duplex.config import OptimiserConfig, TrainerConfig
from rlhf_duplex.learner import Learner
from rlhf_duplex.memory_model import model_config
from rlhf_duplex.policy.bundle import NANO, NANO_FOLDER, Bundle
from rlhf_duplex.policy.lora import add_lora, merge_into, merged_copy
from rlhf_duplex.policy.memory import dialogues_that_fit
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.rollout import episode_seed, rollout
from rlhf_duplex.run_folder import progress

# arXiv 2606.11167: epochs of 32 segments, 16 episodes each.
PAPER_UPDATES, PAPER_GROUPS, PAPER_GROUP_SIZE = 100, 32, 16
SAMPLING = Sampling(text_temperature=0.7, text_top_k=0, audio_temperature=0.8, audio_top_k=250)


@dataclass(frozen=True)
class Sizes:
    """What is measured on.

    Attributes:
        batches: dialogues at once; stock: those that stock `LMGen` plays.
        frames: of each; the last half is timed.
        groups, group_size: of the update; seconds: of a segment; context: l_max, drawn as the paper does.
        rank: of the adapters; minibatch, microbatch: of the update.
    """

    batches: tuple[int, ...] = (1, 16, 64, 256)
    stock: tuple[int, ...] = (1, 16)
    frames: int = 256
    groups: int = PAPER_GROUPS
    group_size: int = PAPER_GROUP_SIZE
    seconds: float = 10.0
    context: float = 30.0
    rank: int = 64
    minibatch: int = 32
    microbatch: int = 4


SMALL = Sizes((1, 4), (1, 2), 12, groups=2, group_size=2, seconds=1.0, context=0.8, rank=2, minibatch=4, microbatch=2)


def run(
    arguments: argparse.Namespace, console: Console, keep: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """All of it; prints tables and gives what is written as JSON.

    `keep` is called with what there is after each measurement: minutes on a lent GPU are not lost to a later failure.

    Raises:
        InputError: a device that cannot be used.
    """
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{arguments.device}' cannot be used ({str(error).splitlines()[0]})") from error
    torch.set_num_threads(cores())
    sizes = SMALL if arguments.small else Sizes()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    steps = len(sizes.batches) + len(sizes.stock) + 4
    with progress(console, "benchmarks on a GPU" if device.type == "cuda" else "benchmarks", steps) as advance:
        top = ceiling(device, dtype)
        advance(1)
        bundle = random_bundle(arguments.small, device, dtype)
        advance(1)
        results: dict[str, Any] = {
            "machine": machine(device),
            "settings": {"dtype": arguments.dtype, "shapes": "nano" if arguments.small else "Moshi 7B", **vars(sizes)},
            "ceiling": top,
            "frames": [],
            "stock": [],
        }
        keep = keep or (lambda results: None)
        for batch in sizes.batches:
            results["frames"].append(frame_figures(bundle, batch, sizes.frames, top, advance))
            keep(results)
        results["stock"] = stock_apart(arguments.small, device, dtype, sizes)
        keep(results)
        advance(len(sizes.stock))
        results["update"] = whole_update(bundle, sizes, top, advance)
    paper = (sizes.groups, sizes.group_size) == (PAPER_GROUPS, PAPER_GROUP_SIZE)
    if paper and not arguments.small:  # of small shapes it would say nothing
        seconds = sum(results["update"]["seconds"].values())
        results["projection"] = {"updates": PAPER_UPDATES, "hours": PAPER_UPDATES * seconds / 3600}
    for made in tables(results):
        console.print(made)
    return results


def random_bundle(small: bool, device: torch.device, dtype: torch.dtype) -> Bundle:
    """Moshi and Mimi at the 7B's sizes or at nano's, weights as they are initialised; nano's tokenizer."""
    import sentencepiece
    from moshi.models import loaders

    sizes = model_config(NANO if small else "kyutai/moshiko-pytorch-bf16")
    torch.manual_seed(0)
    lm = loaders.get_moshi_lm(None, sizes.lm, device=device, dtype=dtype)
    mimi = loaders.get_mimi(None, sizes.mimi, device=device, num_codebooks=8)
    tokenizer = sentencepiece.SentencePieceProcessor(str(NANO_FOLDER / "tokenizer.model"))
    return Bundle(sizes.lm, sizes.mimi, lm, mimi, tokenizer, NANO_FOLDER)


def frame_bytes(policy: MoshiPolicy, batch: int, positions: float) -> float:
    """What a frame of B dialogues must read at least: every weight that acts once, and the caches' written part."""
    lm = policy.lm
    parts = [lm.transformer, lm.out_norm, lm.text_linear, lm.depformer, lm.depformer_in]
    parts += list(lm.linears[: policy.agent_codebooks])
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    size = next(lm.parameters()).element_size()
    attention = lm.transformer.layers[0].self_attn
    cache = 2 * len(lm.transformer.layers) * attention.embed_dim // attention.kv_repeat * size * positions
    return weights + batch * cache


def frame_figures(
    bundle: Bundle, batch: int, frames: int, top: dict[str, float], advance: Callable[[float], None]
) -> dict[str, float]:
    """Our frame: time over the second half of dialogues, and its share of what copy bandwidth allows."""
    policy, device = MoshiPolicy(bundle.lm, SAMPLING), bundle.lm.device
    user = torch.randint(0, bundle.lm.card, (frames, batch, bundle.codec.user_codebooks), device=device)
    first = frames // 2
    _reset_peak(device)
    with one_core_operations(device):
        for _ in range(2):  # graphs are recorded in the first round
            policy.begin(list(range(batch)), frames)
            for frame in range(frames):
                if frame == first:
                    synchronise(device)
                    started = time.perf_counter()
                policy.act(user[frame])
            synchronise(device)
            seconds = (time.perf_counter() - started) / (frames - first)
            policy.end(keep=True)
        policy.end()
    read = frame_bytes(policy, batch, (first + frames) / 2)
    bound = read / (top["copy_gb_per_second"] * 1e9)
    advance(1)
    return {
        "batch": batch,
        "frame_ms": 1000 * seconds,
        "read_gb": read / 1e9,
        "bandwidth_share": bound / seconds,
        "audio_seconds_per_second": batch / bundle.codec.frame_rate / seconds,
        **_peak(device),
    }


def stock_apart(small: bool, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[dict[str, float]]:
    """`stock_figures` of all batches, in a process of its own.

    On a GPU Moshi's functions are compiled there, as they are without us; attention does without cuDNN as here (see
    `rlhf_duplex.policy`).
    """
    before = os.environ["NO_TORCH_COMPILE"]
    if device.type == "cuda":
        os.environ["NO_TORCH_COMPILE"] = ""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(_stock_rows, small, str(device), dtype, sizes).result()
    finally:
        os.environ["NO_TORCH_COMPILE"] = before


def _stock_rows(small: bool, device: str, dtype: torch.dtype, sizes: Sizes) -> list[dict[str, float]]:
    torch.set_num_threads(cores())
    bundle = random_bundle(small, torch.device(device), dtype)
    return [stock_figures(bundle, batch, sizes.frames) for batch in sizes.stock]


def stock_figures(bundle: Bundle, batch: int, frames: int) -> dict[str, float]:
    """Stock `LMGen`'s frame, with its own CUDA graphs, over the second half of as many frames."""
    from moshi.models.lm import LMGen

    lm, device = bundle.lm.eval(), bundle.lm.device
    user = torch.randint(0, lm.card, (frames, batch, bundle.codec.user_codebooks, 1), device=device)
    model = LMGen(
        lm,
        temp=SAMPLING.audio_temperature,
        temp_text=SAMPLING.text_temperature,
        top_k=SAMPLING.audio_top_k,
        top_k_text=SAMPLING.text_top_k,
    )
    with one_core_operations(device), torch.no_grad(), model.streaming(batch):
        for frame in range(frames):
            if frame == frames // 2:
                synchronise(device)
                started = time.perf_counter()
            model.step(user[frame])
        synchronise(device)
    seconds = (time.perf_counter() - started) / (frames - frames // 2)
    return {
        "batch": batch,
        "frame_ms": 1000 * seconds,
        "audio_seconds_per_second": batch / bundle.codec.frame_rate / seconds,
    }


def whole_update(
    bundle: Bundle, sizes: Sizes, top: dict[str, float], advance: Callable[[float], None]
) -> dict[str, Any]:
    """One GRPO update with adapters, from recordings to new weights: seconds, memory and rates by stage.

    The timing axes alone: a judge of what is said waits for a server and not for this machine.
    """
    device, codec = bundle.lm.device, bundle.codec
    add_lora(bundle.lm, sizes.rank)
    policy = MoshiPolicy(bundle.lm, SAMPLING)
    trainer = TrainerConfig(
        groups=sizes.groups, group_size=sizes.group_size, minibatch=sizes.minibatch, microbatch=sizes.microbatch
    )
    learner = Learner(policy, trainer, OptimiserConfig(learning_rate=2e-7, warmup_updates=0), 0)
    actor = MoshiPolicy(merged_copy(bundle.lm), SAMPLING)
    seconds: dict[str, float] = {}
    memory: dict[str, dict[str, float]] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        _reset_peak(device)
        synchronise(device)
        started = time.perf_counter()
        result = work()
        synchronise(device)
        seconds[name] = time.perf_counter() - started
        memory[name] = _peak(device)
        return result

    with tempfile.TemporaryDirectory() as folder:
        segments = recordings(Path(folder), sizes, codec.sample_rate)
        detector = SileroDetector(device=str(device))
        env = DuplexDialogueVectorEnv(segments, codec, detector, user_sides=UserSides(codec, detector, lead_in=3.0))
        rng = np.random.default_rng(0)
        schedule = ContextSchedule(0.5, sizes.context, "linear")
        contexts = [schedule.draw(rng, 1.0) for _ in segments]
        function = RewardFunction({"turn_taking": RewardSpec(), "pause_handling": RewardSpec()})
        members = range(sizes.group_size)
        each = [segment for segment in segments for _ in members]
        of_each = [context for context in contexts for _ in members]
        seeds = [episode_seed(0, group, member) for group in range(sizes.groups) for member in members]
        stage("user", lambda: env.user_sides.get(list(zip(segments, contexts, strict=True))))
        stage("merge", lambda: merge_into(actor.lm, bundle.lm))
        longest = max(user.frames for user in env.user_sides.get(list(zip(segments, contexts, strict=True))))
        together = min(len(each), dialogues_that_fit(actor, longest))
        early = EarlyScores(function)
        episodes = stage(
            "rollout", lambda: rollout(actor, env, each, seeds, of_each, batch_size=together, on_batch=early.add)
        )
        advance(1)
        scores = stage("score", early.finish)
    acting = _acting_seconds(actor, [round(e.duration * codec.frame_rate) for e in episodes], together)
    rewards = {k: torch.from_numpy(v).reshape(-1, sizes.group_size) for k, v in function.values(scores).items()}
    advantages = combine_advantages(rewards, function.weights).advantages.reshape(-1)
    # Random weights speak alike in all episodes of a group: without a spread, gradients would be 0 and cost the same.
    batch = make_batch(episodes, advantages, codec.frame_rate, device)
    metrics = stage("update", lambda: learner.update(batch, 0))
    advance(1)
    flops = update_flops(policy, batch)
    audio = sum(episode.duration for episode in episodes)
    return {
        "episodes": len(episodes),
        "audio_seconds": audio,
        "dialogues_at_once": together,
        "seconds": seconds,
        "memory": memory,
        "rollout_audio_seconds_per_second": audio / seconds["rollout"],
        "outside_the_policy_share": max(0.0, 1 - acting / seconds["rollout"]),
        "update_tflop": flops / 1e12,
        "mfu": flops / seconds["update"] / (top["matrix_gflops"] * 1e9),
        "mismatch": {name: metrics[f"mismatch/{name}"] for name in ("ratio_mean", "ratio_max", "kl")},
    }


def _acting_seconds(policy: MoshiPolicy, frames: list[int], together: int) -> float:
    """What the policy's frames of these dialogues take alone: no environment, no audio."""
    device, order = policy.device, sorted(frames, reverse=True)
    codebooks = policy.lm.n_q - policy.agent_codebooks
    synchronise(device)
    started = time.perf_counter()
    with one_core_operations(device):
        for start in range(0, len(order), together):
            lengths = order[start : start + together]
            user = torch.zeros(len(lengths), codebooks, dtype=torch.long, device=device)
            policy.begin(list(range(len(lengths))), lengths)
            for _ in range(lengths[0]):
                policy.act(user)
            policy.trajectory().codes.cpu()
            policy.end(keep=policy.fixed)
        policy.end()
    return time.perf_counter() - started


def recordings(folder: Path, sizes: Sizes, sample_rate: int) -> list[Segment]:
    """A segment for each group, in recordings of noise that is loud and quiet in turns, with context before it."""
    rng = np.random.default_rng(0)
    found = []
    length = sizes.context + sizes.seconds
    for number in range(sizes.groups):
        time_axis = np.arange(round(length * sample_rate)) / sample_rate
        loud = np.sin(time_axis * np.pi / 2 + number) ** 2
        user = 0.1 * rng.standard_normal(len(time_axis)) * loud
        path = folder / f"{number}.flac"
        write_audio(path, np.stack([np.zeros_like(user), user], axis=1).astype(np.float32), sample_rate)
        axis = ("turn_taking", "pause_handling")[number % 2]
        events: dict[str, Any] = {"user_turn_end": sizes.context + sizes.seconds / 2, "pauses": []}
        found.append(Segment(f"s{number}", axis, path, 1, sizes.context, length, events))
    return found


def update_flops(policy: MoshiPolicy, batch: Batch) -> float:
    """Operations that the update needs, with adapters: policy and reference forward, activations' gradients back.

    2 for a weight and a token; attention 4 T^2 D for a layer of a whole sequence, half of it behind the mask. The
    text head for the frames that the loss is about. Padding and what is computed twice are not counted.
    """
    lm = policy.lm
    layers = lm.transformer.layers
    weights = sum(p.numel() for n, p in layers.named_parameters() if p.ndim == 2 and ".lora_" not in n)
    lengths = (batch.codes[:, 0] >= 0).sum(dim=1).double()
    body = 2 * weights * float(lengths.sum()) + 2 * len(layers) * lm.dim * float(lengths.square().sum())
    logits = 2 * lm.text_linear.out_features * lm.dim * float(batch.mask.sum())
    return 3 * (body + logits)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, float]:
    """The most that was held since, on a GPU; a CPU does not say."""
    if device.type != "cuda":
        return {}
    return {
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }
