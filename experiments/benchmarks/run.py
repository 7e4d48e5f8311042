"""The benchmarks: each times our way and the stock way in turn, and takes the median of the ratios of the pairs."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from envs.cores import cores, one_core_operations
from envs.errors import InputError
from envs.speech import SileroDetector
from experiments.benchmarks.memory import growth, peak_memory_mb
from rlhf_duplex.batch import Batch
from rlhf_duplex.config import OptimiserConfig, TrainerConfig
from rlhf_duplex.learner import Learner
from rlhf_duplex.policy.bundle import Bundle, load_bundle
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.run_folder import progress

SAMPLING = Sampling(text_temperature=0.7, text_top_k=0, audio_temperature=0.8, audio_top_k=0)


@dataclass(frozen=True)
class Sizes:
    """What is measured on.

    Attributes:
        dialogues: played at once; alone_frames: frames of the one dialogue that stock LMGen plays alone.
        frames: of each dialogue.
        episodes: of an update's minibatch.
        clips: that speech is detected in.
    """

    dialogues: int = 96
    frames: int = 100
    alone_frames: int = 50
    episodes: int = 24
    clips: int = 48


SMALL = Sizes(dialogues=6, frames=12, alone_frames=12, episodes=4, clips=4)


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same; each gives how many seconds of audio it worked through."""

    name: str
    ours: Callable[[], float]
    stock: Callable[[], float]


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All benchmarks; prints the table and gives what is written as JSON.

    Raises:
        InputError: a device or checkpoint that cannot be used.
    """
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{arguments.device}' cannot be used ({str(error).splitlines()[0]})") from error
    torch.set_num_threads(cores())
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    bundle = load_bundle(arguments.checkpoint, arguments.device, dtype)
    sizes = SMALL if arguments.small else Sizes()
    comparisons = make_comparisons(bundle, sizes, device)
    measured: dict[str, dict[str, float]] = {}
    with progress(console, "benchmarks", len(comparisons) * (arguments.repeats + 1)) as advance:
        for comparison in comparisons:
            measured[comparison.name] = compare(comparison, device, arguments.repeats, advance)
    results: dict[str, Any] = {
        "machine": machine(device),
        "settings": {
            "checkpoint": arguments.checkpoint,
            "dtype": arguments.dtype,
            "repeats": arguments.repeats,
            **vars(sizes),
        },
        "ceiling": ceiling(device, dtype),
        "ratios": {name: values["ratio"] for name, values in measured.items()},
        "audio_seconds_per_second": {
            name: {"ours": values["ours"], "stock": values["stock"]} for name, values in measured.items()
        },
        "peak_memory_mb": peak_memory_mb(device),
    }
    if arguments.updates:
        with progress(console, "updates", arguments.updates) as advance:
            results["growth"] = growth(arguments.updates, device, advance)
    console.print(table(results))
    return results


def compare(comparison: Comparison, device: torch.device, repeats: int, advance: Callable[[float], None]) -> dict:
    """Medians of the interleaved runs, after one run of each that does not count."""

    def speed(work: Callable[[], float]) -> float:
        synchronise(device)
        started = time.perf_counter()
        seconds = work()
        synchronise(device)
        return seconds / (time.perf_counter() - started)

    speed(comparison.ours)
    speed(comparison.stock)
    advance(1)
    pairs = []
    for _ in range(repeats):
        pairs.append((speed(comparison.ours), speed(comparison.stock)))
        advance(1)
    return {
        "ratio": statistics.median(ours / stock for ours, stock in pairs),
        "ours": statistics.median(ours for ours, _ in pairs),
        "stock": statistics.median(stock for _, stock in pairs),
    }


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_comparisons(bundle: Bundle, sizes: Sizes, device: torch.device) -> list[Comparison]:
    """What README.md explains, one a line of the table."""
    from moshi.models.lm import LMGen  # after rlhf_duplex.policy, which decides whether Moshi compiles

    codec, lm = bundle.codec, bundle.lm
    second = 1 / codec.frame_rate
    generator = torch.Generator().manual_seed(0)

    def random_codes(rows: int, streams: int, frames: int) -> torch.Tensor:
        return torch.randint(0, lm.card, (rows, streams, frames), generator=generator).to(device)

    user = random_codes(sizes.dialogues, codec.user_codebooks, sizes.frames)
    policy = MoshiPolicy(lm, SAMPLING)

    def ours_rollout() -> float:
        with one_core_operations(device):
            policy.begin(list(range(sizes.dialogues)), sizes.frames)
            for frame in range(sizes.frames):
                policy.act(user[:, :, frame])
            policy.trajectory().codes.cpu()
            policy.end()
        return sizes.dialogues * sizes.frames * second

    def stock_rollout(rows: int, frames: int) -> float:
        model = LMGen(lm.eval(), temp=0.8, temp_text=0.7, top_k=0, top_k_text=0)
        with one_core_operations(device), torch.no_grad(), model.streaming(rows):
            for frame in range(frames):
                model.step(user[:rows, :, frame : frame + 1])
        lm.set_streaming_detached(False)
        return rows * frames * second

    def ours_decode() -> float:
        return codec.decode(agent).shape[0] * sizes.frames * second

    @torch.no_grad()
    def stock_decode() -> float:
        return bundle.mimi.decode(agent).shape[0] * sizes.frames * second

    agent = random_codes(min(sizes.dialogues, 16), codec.agent_codebooks, sizes.frames)
    comparisons = [
        Comparison("rollout_vs_stock_one_by_one", ours_rollout, lambda: stock_rollout(1, sizes.alone_frames)),
        Comparison("rollout_vs_stock_same_batch", ours_rollout, lambda: stock_rollout(sizes.dialogues, sizes.frames)),
        Comparison("decode_vs_stock", ours_decode, stock_decode),
    ]
    comparisons += [_update(bundle, sizes, random_codes, second), _detection(bundle, sizes, device)]
    return comparisons


def _update(bundle: Bundle, sizes: Sizes, random_codes: Callable, second: float) -> Comparison:
    """An optimiser step of GRPO against `LMModel.forward` with cross-entropy on text and audio, and its backward."""
    lm = load_bundle(str(bundle.folder), str(bundle.lm.device), bundle.lm.dtype).lm  # trained: not the one that acts
    codes = random_codes(sizes.episodes, lm.n_q + 1, sizes.frames)
    rows = (sizes.episodes, sizes.frames)
    batch = Batch(
        codes,
        torch.full(rows, -3.0, device=codes.device),
        torch.ones(rows, dtype=torch.bool, device=codes.device),
        torch.linspace(-1, 1, sizes.episodes, device=codes.device),
    )
    microbatch = 8 if codes.device.type == "cpu" else sizes.episodes
    config = TrainerConfig(minibatch=sizes.episodes, microbatch=microbatch)
    learner = Learner(MoshiPolicy(lm, SAMPLING), config, OptimiserConfig(learning_rate=1e-6), 0)
    stock = load_bundle(str(bundle.folder), str(bundle.lm.device), bundle.lm.dtype).lm

    def ours() -> float:
        learner.update(batch, 0)
        return sizes.episodes * sizes.frames * second

    def whole() -> float:
        output = stock(codes)
        loss = torch.zeros((), device=codes.device)
        streams = ((output.text_logits, output.text_mask, codes[:, :1]),)
        streams += ((output.logits, output.mask, codes[:, 1 : 1 + stock.dep_q]),)
        for logits, mask, targets in streams:
            loss = loss + torch.nn.functional.cross_entropy(logits[mask].float(), targets[mask])
        loss.backward()
        stock.zero_grad(set_to_none=True)
        return sizes.episodes * sizes.frames * second

    return Comparison("update_vs_full_forward", ours, whole)


def _detection(bundle: Bundle, sizes: Sizes, device: torch.device) -> Comparison:
    """Silero over all clips at once against the stock package one by one, on noise that is loud and quiet in turns."""
    from silero_vad import get_speech_timestamps, load_silero_vad

    threads = torch.get_num_threads()
    detector, stock = SileroDetector(device=str(device)), load_silero_vad()
    torch.set_num_threads(threads)  # importing silero_vad sets the whole process to one thread
    generator = np.random.default_rng(0)
    rate = detector.sample_rate
    clips = [
        (generator.standard_normal(10 * rate) * 0.1 * np.sin(np.arange(10 * rate) / rate) ** 2).astype(np.float32)
        for _ in range(sizes.clips)
    ]

    def ours() -> float:
        detector.detect(clips, rate)
        return sum(map(len, clips)) / rate

    def one_by_one() -> float:
        few = clips[: max(1, len(clips) // 8)]
        with one_core_operations(torch.device("cpu")):  # as the package does itself
            for clip in few:
                get_speech_timestamps(torch.from_numpy(clip), stock, sampling_rate=rate)
        return sum(map(len, few)) / rate

    return Comparison("detection_vs_one_by_one", ours, one_by_one)


def ceiling(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do at most: memory copied (read and written) and matrices multiplied, medians of 5."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    block = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(block)

    def median(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(5):
            synchronise(device)
            started = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return {
        "copy_gb_per_second": 2 * block.nbytes / median(lambda: target.copy_(block)) / 1e9,
        "matrix_gflops": 2 * side**3 / median(lambda: matrix @ matrix) / 1e9,
    }


def machine(device: torch.device) -> str:
    """What it was measured on, in words."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":")[1] for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].strip() if names else processor
    words = f"{processor}, {cores()} cores used, PyTorch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}; {words}" if device.type == "cuda" else words


def table(results: dict[str, Any]) -> Table:
    """For people."""
    made = Table(title=results["machine"])
    made.add_column("comparison")
    for name in ("ratio", "ours, audio-s/s", "stock, audio-s/s"):
        made.add_column(name, justify="right")
    for name, ratio in results["ratios"].items():
        speeds = results["audio_seconds_per_second"][name]
        made.add_row(name, f"{ratio:.2f}", f"{speeds['ours']:.1f}", f"{speeds['stock']:.1f}")
    made.add_row("matrix rate", "", f"{results['ceiling']['matrix_gflops']:.0f} GFLOP/s", "")
    made.add_row("copy bandwidth", "", f"{results['ceiling']['copy_gb_per_second']:.1f} GB/s", "")
    made.add_row("peak memory", "", f"{results['peak_memory_mb']:.0f} MB", "")
    if "growth" in results:
        made.add_row("growth an update", "", f"{results['growth']['mb_per_update']:.3f} MB", "")
    return made
