"""Hearing while somebody speaks: Silero frame by frame over B voices at once, its state kept between frames."""

import numpy as np
import torch

from envs.errors import InputError
from envs.speech import SileroDetector, SpeechDetector, VadState

END_THRESHOLD = 0.15  # as in Silero's own rule: speech ends so far below the threshold


class Ear:
    """Whether each of B voices is speaking, as the audio arrives.

    It hears a window of 32 ms at a time and says so at the end of the frame in which the window ends; a voice is
    speaking from the first window at the detector's threshold until windows below `threshold - 0.15` have lasted for
    `min_silence_seconds` (the rule of Silero's own iterator).

    Args:
        detector: Silero, with its thresholds.
        sample_rate: Hz of what is heard.

    Raises:
        InputError: another detector than Silero, which cannot hear a part of a clip.
    """

    def __init__(self, detector: SpeechDetector, sample_rate: int) -> None:
        if not isinstance(detector, SileroDetector):
            raise InputError("live dialogues are heard frame by frame, which only Silero can: set detector.name=silero")
        self._detector = detector
        self._source = sample_rate
        self._rate, self._window = detector.sample_rate, detector.window

    def __getstate__(self) -> dict[str, object]:
        # soxr's state cannot be copied: a copy (gymnasium makes one of an environment's arguments) hears from its own
        # `begin` on.
        return {name: vars(self)[name] for name in ("_detector", "_source", "_rate", "_window")}

    def begin(self, batch: int) -> None:
        """Hear B voices from their beginning."""
        import soxr

        same = self._rate == self._source
        self._resampler = None if same else soxr.ResampleStream(self._source, self._rate, batch, dtype="float32")
        self._pending: np.ndarray = np.zeros((batch, 0), dtype=np.float32)
        self._state: VadState | None = None
        self._speaking: np.ndarray = np.zeros(batch, dtype=bool)
        self._quiet: np.ndarray = np.zeros(batch)

    def hear(self, audio: np.ndarray) -> np.ndarray:
        """The next audio `(B, N)`; gives `(B,)`, whether each is speaking at its end."""
        if self._resampler is not None:
            audio = self._resampler.resample_chunk(np.ascontiguousarray(audio.T)).T
        self._pending = np.concatenate([self._pending, audio], axis=1)
        ready = self._pending.shape[1] // self._window * self._window
        if ready:
            heard = torch.from_numpy(np.ascontiguousarray(self._pending[:, :ready]))
            self._pending = self._pending[:, ready:]
            probabilities, self._state = self._detector.advance(heard, self._state)
            for column in probabilities.numpy().T:
                self._hear_window(column)
        return self._speaking.copy()

    def _hear_window(self, probability: np.ndarray) -> None:
        threshold = self._detector.threshold
        loud = probability >= threshold
        self._quiet = np.where(probability < max(threshold - END_THRESHOLD, 0.01), self._quiet, 0.0)
        self._quiet += (probability < max(threshold - END_THRESHOLD, 0.01)) * (self._window / self._rate)
        ended = self._quiet >= self._detector.min_silence_seconds - 1e-9
        self._speaking = (self._speaking | loud) & ~ended
