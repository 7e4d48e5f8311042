"""Does Silero hear the codec's reconstruction as it hears the original? Frame agreement and interval overlap."""

from __future__ import annotations

import argparse
from pathlib import Path

import librosa
import numpy as np
import torch

from envs.audio import resample
from envs.speech import Interval, SileroDetector

from . import bank, codec, sentences


def agreement(mimi, detector: SileroDetector, utterances: list[np.ndarray]) -> tuple[float, float]:
    """Share of 32 ms blocks with the same decision, and intersection over union of the speech intervals.

    utterances: float32 [N] at 8 kHz; half a second of silence goes before and after each.
    """
    same = blocks = both = either = 0.0
    for audio in utterances:
        padded = np.pad(audio, (4000, 4000))
        padded = np.pad(padded, (0, -len(padded) % codec.FRAME_SIZE)).astype(np.float32)
        real = torch.from_numpy(padded)[None]
        with torch.no_grad():
            made = mimi.decode(mimi.encode(real[:, None]))[:, 0, : real.shape[1]]
        sides = [resample(side[0].numpy(), codec.SAMPLE_RATE, detector.sample_rate) for side in (real, made)]
        first, second = detector.probabilities(torch.from_numpy(np.stack(sides)))
        same += float(((first >= 0.5) == (second >= 0.5)).sum())
        blocks += len(first)
        masks = [_mask(found, len(padded) // 80) for found in detector.detect(sides, detector.sample_rate)]
        both += float((masks[0] & masks[1]).sum())
        either += float((masks[0] | masks[1]).sum())
    return same / blocks, both / max(either, 1.0)


def _mask(intervals: list[Interval], length: int) -> np.ndarray:
    """Whether there is speech, by hundredths of a second."""
    mask = np.zeros(length, bool)
    for start, end in intervals:
        mask[round(start * 100) : round(end * 100)] = True
    return mask


def real_speech(folder: Path) -> list[np.ndarray]:
    """Every wav under `folder` at 8 kHz, at the level of the synthesised speech."""
    out = []
    for path in sorted(folder.glob("*.wav")):
        audio = librosa.load(path, sr=codec.SAMPLE_RATE)[0][: 20 * codec.SAMPLE_RATE]
        out.append(audio * (0.08 / (np.sqrt(np.mean(audio**2)) + 1e-6)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codec", type=Path, help="Mimi weights (safetensors)")
    parser.add_argument("folders", type=Path, nargs="*", help="folders of wav files never trained on")
    parser.add_argument("--speech", type=Path, help="the recipe's speech.npz: 60 held-out utterances, and the agent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mimi, detector = codec.load(arguments.codec), SileroDetector()
    speech = {folder.name: real_speech(folder) for folder in arguments.folders}
    if arguments.speech is not None:
        made = bank.load(arguments.speech)
        pieces = [audio for spoken in made.held_out for audio in spoken.audio]
        lines = made.agent.audio.items()
        speech["held-out user voices"] = pieces[:: len(pieces) // 60]
        speech["agent, sentences"] = [parts[0] for text, parts in lines if text not in sentences.BACKCHANNELS]
        speech["agent, backchannels"] = [p for text, parts in lines if text in sentences.BACKCHANNELS for p in parts]
    for name, utterances in speech.items():
        same, overlap = agreement(mimi, detector, utterances)
        print(f"{name}: frame agreement {same:.3f}, interval IoU {overlap:.3f}")
    silence = torch.zeros(1, 1, 100 * codec.FRAME_SIZE)
    with torch.no_grad():
        made = mimi.decode(mimi.encode(silence))
    heard = detector.detect([made[0, 0].numpy()], codec.SAMPLE_RATE)
    print(f"silence: peak {made.abs().max().item():.4f}, intervals heard {heard[0]}")


if __name__ == "__main__":
    main()
