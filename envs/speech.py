"""Where somebody speaks: the `SpeechDetector` protocol and its two implementations, Silero and energy.

Both take a padded batch of mono audio and give speech intervals in seconds. Detection is batched over episodes: a
rollout of 128 dialogues is one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from envs.audio import resample
from envs.cores import map_on_cores
from envs.errors import InputError
from envs.silero import SileroNetwork

# Clips that go through Silero's LSTM as one batch; batches go to the cores of a CPU.
CLIPS_TOGETHER = 16


class Interval(NamedTuple):
    """A stretch of time in seconds, `start` inclusive, `end` exclusive."""

    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start

    def overlap(self, other: "Interval") -> float:
        """Seconds that both share (0 where they do not meet)."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


# What Silero carries from one stretch of audio to the next: the last samples `(B, context)` and the LSTM's state.
VadState = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]


class SpeechDetector(Protocol):
    """Finds speech in a batch of audio."""

    def detect(self, audio: Sequence[np.ndarray], sample_rate: int) -> list[list[Interval]]:
        """Speech intervals of each clip, in time order, in seconds from its start.

        Args:
            audio: B mono clips `(N_b,)`, float32 in [-1, 1], of any lengths (0 included).
            sample_rate: Hz of all of them.
        """
        ...


def pad_batch(clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
    """Clips of different lengths as one zero-padded tensor `(B, N)` and their lengths in samples."""
    lengths = [len(clip) for clip in clips]
    batch = torch.zeros(len(clips), max(lengths, default=0))
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = torch.as_tensor(clip)
    return batch, lengths


@dataclass
class SileroDetector:
    """Silero VAD over a whole batch at once.

    The stock package runs one clip, one 32 ms window at a time. Here the windows of all clips go through the
    convolutions together and through the LSTM as one sequence with a batch dimension (`envs.silero`); the
    probabilities are the same (tested), and so is the rule that turns them into intervals, which is the package's own.

    All audio is resampled to the network's rate (feeding 24 kHz audio as if it were 16 kHz is a fault of the official
    Full-Duplex-Bench scripts). nano's audio, at 8 kHz, goes through the 16 kHz network, too: it hears the beginnings of
    utterances that the 8 kHz one is late for (`experiments/nano/README.md`). Recordings that are curated go through the
    network of their rate (`rlhf_duplex.data.detection`).

    Attributes:
        threshold: speech probability from which a window counts as speech.
        min_speech_seconds: shorter speech is dropped.
        min_silence_seconds: a shorter silence does not end an interval.
        pad_seconds: added on both sides of an interval.
        device: where the network runs.
        sample_rate: Hz of the network, 16000 or 8000.
    """

    threshold: float = 0.5
    min_speech_seconds: float = 0.2
    min_silence_seconds: float = 0.1
    pad_seconds: float = 0.03
    device: str = "cpu"
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        if self.sample_rate not in (8000, 16000):
            raise InputError(f"Silero has a network for 8000 and one for 16000 Hz, not for {self.sample_rate!r}")
        threads = torch.get_num_threads()
        from silero_vad import load_silero_vad

        torch.set_num_threads(threads)  # importing silero_vad sets the whole process to one thread
        model = load_silero_vad().to(self.device)
        self._network = SileroNetwork(model._model if self.sample_rate == 16000 else model._model_8k)

    def probabilities(self, audio: torch.Tensor) -> torch.Tensor:
        """Speech probability of each 32 ms window, `(B, windows)`, of audio `(B, N)` at the network's rate."""
        window = self.window
        device = torch.device(self.device)
        audio = torch.nn.functional.pad(audio.to(device), (0, -audio.shape[1] % window))
        parts = audio.split(CLIPS_TOGETHER)
        return torch.cat(list(map_on_cores(lambda part: self.advance(part)[0], parts, device)))

    @property
    def window(self) -> int:
        """Samples of a window at the network's rate: 32 ms."""
        return 512 if self.sample_rate == 16000 else 256

    @torch.no_grad()
    def advance(self, audio: torch.Tensor, state: VadState | None = None) -> tuple[torch.Tensor, VadState]:
        """The probabilities `(B, windows)` of the next whole windows `(B, windows * window)` of B clips.

        Args:
            audio: what follows the audio of the call before, at the network's rate.
            state: what the call before gave; None at the beginning of the clips.
        """
        window = self.window
        context = window // 8
        batch, samples = audio.shape
        count = samples // window
        audio = audio.to(self.device)
        tail, hidden = state or (audio.new_zeros(batch, context), None)
        if count == 0:
            return torch.zeros(batch, 0), (tail, hidden)
        # Each window is seen with the last samples of the one before it (zeros before the first).
        padded = torch.cat([tail, audio], dim=1)
        probabilities, hidden = self._network(padded.unfold(1, window + context, window), hidden)
        return probabilities.cpu(), (padded[:, -context:], hidden)

    def stamps(self, probabilities: np.ndarray, samples: int) -> list[Interval]:
        """Speech intervals of one clip of so many samples, by the package's rule from `(windows,)` probabilities."""
        from silero_vad.utils_vad import get_speech_timestamps_from_probs

        stamps = get_speech_timestamps_from_probs(
            probabilities.tolist(),
            sampling_rate=self.sample_rate,
            threshold=self.threshold,
            min_speech_duration_ms=self.min_speech_seconds * 1000,
            min_silence_duration_ms=self.min_silence_seconds * 1000,
            speech_pad_ms=self.pad_seconds * 1000,
            audio_length_samples=samples,
            step=1,
        )
        return [Interval(stamp["start"] / self.sample_rate, stamp["end"] / self.sample_rate) for stamp in stamps]

    def detect(self, audio: Sequence[np.ndarray], sample_rate: int) -> list[list[Interval]]:
        """See `SpeechDetector.detect`."""
        clips = [np.asarray(clip, dtype=np.float32) for clip in audio]
        if sample_rate != self.sample_rate:
            clips = [resample(clip, sample_rate, self.sample_rate) if len(clip) else clip for clip in clips]
        batch, lengths = pad_batch(clips)
        if batch.numel() == 0:
            return [[] for _ in clips]
        probabilities = self.probabilities(batch).numpy()
        return [
            self.stamps(row[: -(-length // self.window)], length)
            for row, length in zip(probabilities, lengths, strict=True)
        ]


@dataclass
class EnergyDetector:
    """Speech where the short-time energy stands above the clip's noise floor: fast, no network, clean audio only.

    Attributes:
        frame_seconds: hop of the energy measurement.
        above_floor_db: how far above the noise floor (10th percentile of the energy) speech must stand.
        min_level_db: never speech below this level (dB full scale), so that digital silence stays silent.
        min_speech_seconds, min_silence_seconds: as in `SileroDetector`.
    """

    frame_seconds: float = 0.02
    above_floor_db: float = 12.0
    min_level_db: float = -50.0
    min_speech_seconds: float = 0.2
    min_silence_seconds: float = 0.1

    def detect(self, audio: Sequence[np.ndarray], sample_rate: int) -> list[list[Interval]]:
        """See `SpeechDetector.detect`."""
        return [self._detect_one(np.asarray(clip, dtype=np.float32), sample_rate) for clip in audio]

    def _detect_one(self, clip: np.ndarray, sample_rate: int) -> list[Interval]:
        import librosa
        from scipy import ndimage

        hop = max(1, round(self.frame_seconds * sample_rate))
        if len(clip) < hop:
            return []
        energy = librosa.feature.rms(y=clip, frame_length=2 * hop, hop_length=hop)[0]
        level = 20 * np.log10(np.maximum(energy, 1e-6))
        loud = level > max(self.min_level_db, float(np.percentile(level, 10)) + self.above_floor_db)
        # A clip that is loud throughout has no floor of its own: then the absolute level decides.
        if not loud.any() and np.median(level) > self.min_level_db + self.above_floor_db:
            loud = level > self.min_level_db
        gap = max(1, round(self.min_silence_seconds / self.frame_seconds))
        closed = ndimage.binary_closing(np.pad(loud, gap), np.ones(gap))[gap:-gap]
        runs, count = ndimage.label(closed)
        intervals = []
        for (span,) in ndimage.find_objects(runs, count):
            start, end = span.start * hop / sample_rate, min(span.stop * hop, len(clip)) / sample_rate
            if end - start >= self.min_speech_seconds:
                intervals.append(Interval(start, end))
        return intervals


def make_detector(name: str, **options: object) -> SpeechDetector:
    """The detector of that name: `silero` or `energy`.

    Raises:
        InputError: another name, or an option that the detector does not have.
    """
    detectors = {"silero": SileroDetector, "energy": EnergyDetector}
    if name not in detectors:
        raise InputError(f"unknown speech detector '{name}': choose one of {', '.join(detectors)}")
    try:
        return detectors[name](**options)
    except TypeError as error:
        raise InputError(f"speech detector '{name}': {error}") from error
