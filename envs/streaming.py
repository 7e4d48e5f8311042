"""Speech in recordings of any length, in memory that does not grow: audio in blocks, Silero with carried state.

The same intervals as `SileroDetector.detect` on the whole audio (tested): resampler and network keep their state from
block to block, and probabilities become intervals piece by piece, cut only in silences where the rule starts anew.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from envs.audio import audio_info, check_length
from envs.errors import InputError
from envs.speech import Interval, SileroDetector, VadState

BLOCK_SECONDS = 30.0
_PIECE_WINDOWS = 1000


def channel_blocks(path: Path, channels: Sequence[int], block_seconds: float) -> Iterator[np.ndarray]:
    """Some channels of a recording as blocks `(len(channels), N)` of float32, in order.

    Raises:
        InputError: the audio is corrupt, ends before its header says, or holds NaN or infinite samples.
    """
    rate, found, duration = audio_info(path)
    if max(channels) >= found:
        raise InputError(f"channel {max(channels)} of {path} is out of range: the file has {found} channel(s)")
    read = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            # Not `file.blocks`: it counts on what the header says, and repeats the last whole block of a file that ends
            # before.
            while len(block := file.read(round(block_seconds * rate), dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise InputError(
                        f"recording {path} holds NaN or infinite samples after {read / rate:.1f} s: repair or remove it"
                    )
                read += len(block)
                yield np.ascontiguousarray(block.T[list(channels)])
    except soundfile.LibsndfileError as error:
        raise InputError(f"recording {path} cannot be read after {read / rate:.1f} s ({error}): truncated?") from error
    check_length(path, read / rate, duration)


class SpeechStream:
    """The speech of some channels that arrive block by block.

    Args:
        detector: whose network and rule are used.
        rates: sample rate of each channel.
    """

    def __init__(self, detector: SileroDetector, rates: Sequence[int]) -> None:
        import soxr

        self._detector = detector
        self._rate, self._window = detector.sample_rate, detector.window
        self._resamplers = [
            None if rate == self._rate else soxr.ResampleStream(rate, self._rate, 1, dtype="float32", quality="HQ")
            for rate in rates
        ]
        self._pending: list[np.ndarray] = [np.zeros(0, dtype=np.float32) for _ in rates]
        self._samples = [0 for _ in rates]  # of each channel, at the network's rate
        self._state: VadState | None = None
        self._pieces = [_Piece(detector) for _ in rates]

    def push(self, blocks: Sequence[np.ndarray]) -> None:
        """The next audio `(N,)` of each channel; the channels need not be equally far."""
        self._take(blocks, last=False)
        ready = min(len(p) for p in self._pending) // self._window * self._window
        if ready:
            self._advance(ready)

    def finish(self) -> list[list[Interval]]:
        """The speech of each channel in seconds; the stream is at its end after it."""
        self._take([np.zeros(0, dtype=np.float32) for _ in self._pending], last=True)
        longest = max(len(p) for p in self._pending)
        longest += -longest % self._window
        self._pending = [np.pad(p, (0, longest - len(p))) for p in self._pending]
        self._advance(longest)
        return [piece.finish(samples) for piece, samples in zip(self._pieces, self._samples, strict=True)]

    def _take(self, blocks: Sequence[np.ndarray], last: bool) -> None:
        for channel, (block, resampler) in enumerate(zip(blocks, self._resamplers, strict=True)):
            heard = block if resampler is None else resampler.resample_chunk(block, last=last)
            self._samples[channel] += len(heard)
            self._pending[channel] = np.concatenate([self._pending[channel], heard])

    def _advance(self, samples: int) -> None:
        audio = torch.from_numpy(np.stack([p[:samples] for p in self._pending]))
        self._pending = [p[samples:] for p in self._pending]
        probabilities, self._state = self._detector.advance(audio, self._state)
        for piece, row in zip(self._pieces, probabilities.numpy(), strict=True):
            piece.push(row)


class _Piece:
    """Probabilities of one channel that are not intervals yet, and the intervals so far."""

    def __init__(self, detector: SileroDetector) -> None:
        self._detector, self._rate, self._window = detector, detector.sample_rate, detector.window
        self._waiting: np.ndarray = np.zeros(0, dtype=np.float32)
        self._begins = 0  # sample at which what waits begins
        self._found: list[Interval] = []

    def push(self, row: np.ndarray) -> None:
        self._waiting = np.concatenate([self._waiting, row])
        if len(self._waiting) > _PIECE_WINDOWS:
            cut = self._last_cut()
            if cut:
                self._stamp(cut, cut * self._window)

    def finish(self, samples: int) -> list[Interval]:
        left = samples - self._begins  # below 0 where another channel is longer
        self._stamp(max(0, -(-left // self._window)), max(0, left))
        # What a shorter channel was padded with is no audio.
        end = samples / self._rate
        return [Interval(i.start, min(i.end, end)) for i in self._found if i.start < end]

    def _last_cut(self) -> int:
        """Window in the last long silence at which the rule is sure to be at its beginning, or 0."""
        seconds = self._window / self._rate
        detector = self._detector
        pad = int(np.ceil(detector.pad_seconds / seconds)) + 1
        before = int(np.ceil(detector.min_silence_seconds / seconds)) + pad
        # Below the package's lower threshold (`neg_threshold`) an interval ends after `min_silence_seconds`.
        quiet = self._waiting < max(detector.threshold - 0.15, 0.01)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
        for start, end in reversed(list(zip(edges[::2], edges[1::2], strict=True))):
            if end - start >= before + pad:
                return int(end - pad)
        return 0

    def _stamp(self, windows: int, samples: int) -> None:
        offset = self._begins / self._rate
        found = self._detector.stamps(self._waiting[:windows], samples)
        self._found += [Interval(i.start + offset, i.end + offset) for i in found]
        self._waiting = self._waiting[windows:]
        self._begins += samples


def stream_speech(
    sources: Sequence[tuple[Path, Sequence[int]]], detector: SileroDetector, block_seconds: float = BLOCK_SECONDS
) -> tuple[list[list[Interval]], list[float]]:
    """The speech of every channel of a recording, and the seconds that each was found to last.

    Args:
        sources: files and which of their channels, such as `[(stereo, [0, 1])]` or `[(one, [0]), (other, [0])]`.
        detector: Silero with its thresholds.
        block_seconds: how much audio is in memory at once.

    Raises:
        InputError: as in `channel_blocks`.
    """
    rates = [audio_info(path)[0] for path, channels in sources for _ in channels]
    stream = SpeechStream(detector, rates)
    readers = [channel_blocks(path, channels, block_seconds) for path, channels in sources]
    nothing = [np.zeros((len(channels), 0), dtype=np.float32) for _, channels in sources]
    samples = np.zeros(len(rates), dtype=np.int64)
    while True:
        blocks = [next(reader, None) for reader in readers]
        if all(block is None for block in blocks):
            break
        rows = [
            row for block, empty in zip(blocks, nothing, strict=True) for row in (empty if block is None else block)
        ]
        samples += [len(row) for row in rows]
        stream.push(rows)
    return stream.finish(), [float(n / rate) for n, rate in zip(samples, rates, strict=True)]
