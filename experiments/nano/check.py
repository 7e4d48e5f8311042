"""What the bundle does when it is sampled: stock `LMGen` on held-out user audio, heard by Silero, scored per axis.

python -m experiments.nano.check [--temperature 0.7]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from moshi.models import LMGen, LMModel, MimiModel
from moshi.models.loaders import CheckpointInfo
from torch import Tensor

from envs.speech import SileroDetector

from .codec import SAMPLE_RATE
from .tokenizer import EPAD, PAD

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_duplex"
AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")


def checkpoint(bundle: Path) -> CheckpointInfo:
    """The bundle as the loaders of Moshi read it from local files."""
    config = json.loads((bundle / "config.json").read_text())
    return CheckpointInfo.from_hf_repo(
        "nano", config_path=bundle / "config.json", moshi_weights=bundle / config["moshi_name"],
        mimi_weights=bundle / config["mimi_name"], tokenizer=bundle / config["tokenizer_name"],
        mimi_config_path=bundle / config["mimi_config_name"],
    )  # fmt: skip


@torch.no_grad()
def sample(
    model: LMModel, mimi: MimiModel, user: Tensor, text_temperature: float, audio_temperature: float
) -> tuple[Tensor, Tensor]:
    """Play user audio [B, N] to the model. Returns its text tokens [B, T] and its audio [B, N]."""
    codes = mimi.encode(user[:, None])
    batch, _, frames = codes.shape
    generator = LMGen(
        model, use_sampling=True, temp=audio_temperature, temp_text=text_temperature, top_k=250, top_k_text=0,
        check=False,
    )  # fmt: skip
    steps = []
    with generator.streaming(batch):
        for frame in range(frames):
            out = generator.step(codes[:, :, frame : frame + 1])
            if out is not None:
                steps.append(out)
    made = torch.cat(steps, dim=2)
    audio = mimi.decode(made[:, 1:])[:, 0]
    return made[:, 0], audio


@dataclass
class Outcome:
    """One sampled dialogue: text tokens by frame and speech intervals, in seconds from the segment's start."""

    segment: dict
    tokens: list[int]
    speech: list[tuple[float, float]]
    lead: float


def play(bundle: Path, data: Path, axis: str, count: int, lead: float, temperatures: tuple[float, float], seed: int,
         repeats: int = 1) -> list[Outcome]:  # fmt: skip
    """Sample `count` segments of one axis, `repeats` times each, after `lead` seconds of silence."""
    info = checkpoint(bundle)
    model, mimi = info.get_moshi("cpu", torch.float32), info.get_mimi("cpu")
    segments = [json.loads(line) for line in (data / "segments.jsonl").read_text().splitlines()]
    segments = [segment for segment in segments if segment["axis"] == axis][:count] * repeats
    channels = []
    for segment in segments:
        audio, rate = soundfile.read(data / segment["recording"], dtype="float32", always_2d=True)
        part = audio[int(segment["start"] * rate) : int(segment["end"] * rate), segment["user_channel"]]
        channels.append(np.concatenate([np.zeros(round(lead * rate), np.float32), part]))
    longest = -(-max(map(len, channels)) // mimi.frame_size) * mimi.frame_size
    user = torch.from_numpy(np.stack([np.pad(channel, (0, longest - len(channel))) for channel in channels]))
    torch.manual_seed(seed)
    tokens, audio = sample(model, mimi, user, *temperatures)
    audio = torch.nn.functional.pad(audio, (0, 1600))  # Silero closes an interval after a little silence
    outcomes = []
    heard = SileroDetector().detect(list(audio.numpy()), SAMPLE_RATE)
    for segment, row, spoken in zip(segments, tokens.tolist(), heard, strict=True):
        end = segment["end"] - segment["start"]
        cut = [(s - lead, min(e - lead, end)) for s, e in spoken if s - lead < end and e > lead]
        outcomes.append(Outcome(segment, row, cut, lead))
    return outcomes


def measure(axis: str, outcomes: list[Outcome]) -> dict[str, float]:
    """Takeover rate, latency, F1: the axis's own measures, as means over the outcomes that have them."""
    table: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        table.setdefault(name, []).append(float(value))

    for outcome in outcomes:
        start, events = outcome.segment["start"], outcome.segment["events"]
        long = [(s, e) for s, e in outcome.speech if e - s > 1.0]
        add("speech share", sum(e - s for s, e in outcome.speech) / (outcome.segment["end"] - start))
        if axis == "pause_handling":
            add("takeover", bool(long))
        elif axis == "turn_taking":
            end = events["user_turn_end"] - start
            after = [s - end for s, _ in long if s > end]
            add("early", any(s < end for s, _ in long))
            add("answered", bool(after))
            if after:
                add("latency", after[0])
        elif axis == "backchannel":
            short = [s for s, e in outcome.speech if e - s <= 1.0]
            true = [s - start for s, _ in events["true_backchannels"]]
            hits, left = 0, list(true)
            for s in short:
                near = [t for t in left if abs(t - s) <= 1.0]
                if near:
                    hits += 1
                    left.remove(near[0])
            add("takeover", bool(long))
            add("short", len(short))
            add("any hit", hits > 0)
            add("F1", 2 * hits / (len(short) + len(long) + len(true)))
        else:
            end = events["interruption"][1] - start
            after = [s - end for s, _ in outcome.speech if s > end]
            running = any(s < events["interruption"][0] - start < e for s, e in outcome.speech)
            add("talking at barge-in", running)
            add("answered", bool(after))
            if after:
                add("latency", after[0])
    return {name: sum(values) / len(values) for name, values in table.items()} | {
        f"{name} sd": float(np.std(values)) for name, values in table.items() if name == "latency"
    }


def words_of(tokens: list[int], tokenizer) -> str:
    """The text of a stream of tokens by frame, with a dot a frame for PAD and a colon for EPAD."""
    out = []
    for token in tokens:
        if token in (PAD, EPAD):
            out.append("." if token == PAD else ":")
        else:
            out.append(tokenizer.id_to_piece(token).replace("▁", " "))
    return "".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=PACKAGE / "nano")
    parser.add_argument("--data", type=Path, default=PACKAGE / "nano_data" / "heldout")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the text (no top-k)")
    parser.add_argument("--audio-temperature", type=float, default=0.8)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--lead", type=float, default=2.0, help="seconds of silence before the segment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, help="print this many dialogues an axis")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = checkpoint(arguments.bundle).get_text_tokenizer()
    for axis in arguments.axes:
        began = time.time()
        temperatures = (arguments.temperature, arguments.audio_temperature)
        outcomes = play(arguments.bundle, arguments.data, axis, arguments.count, arguments.lead, temperatures, 0,
                        arguments.repeats)  # fmt: skip
        print(f"{axis:18s}", {name: round(value, 3) for name, value in measure(axis, outcomes).items()},
              f"n {len(outcomes)}, {time.time() - began:.0f} s")  # fmt: skip
        for outcome in outcomes[: arguments.show]:
            print("  ", {k: v for k, v in outcome.segment["events"].items()}, "from", outcome.segment["start"])
            print("  ", words_of(outcome.tokens[round(outcome.lead / 0.08) :], tokenizer))
            print("  ", [(round(s, 2), round(e, 2)) for s, e in outcome.speech])
        words = Counter(t for o in outcomes for t in o.tokens if t not in (PAD, EPAD))
        print("   most said:", [(tokenizer.id_to_piece(t), n) for t, n in words.most_common(8)])


if __name__ == "__main__":
    main()
