"""The metrics of Full-Duplex-Bench v1 (arXiv 2503.04721) as pure functions of words and speech.

`compatible=True` gives what the official scripts give, with their faults; the corrected values differ in these alone:

1. The takeover of backchannel is decided there by the *last* short interval; corrected, by any.
2. There Silero is told that the audio has 16 kHz whatever it has: at 24 kHz all times are 1.5 times too long.
3. There the intervals after one of more than 3 s are not looked at, so that backchannels that follow a takeover count
   neither in the frequency nor in the timing.
4. Means over nothing stop the script there with a division by zero; corrected, there is no value.

Faults 1, 2 and 4 are those that arXiv 2606.11167 and others name; 3 is in `eval_backchannel.py` as well. Everything
else is shared, the rounding of Silero's times to 0.1 s included.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.interpolate import interp1d
from scipy.spatial.distance import jensenshannon

from envs.audio import resample
from envs.episode import Word
from envs.speech import Interval, SileroDetector

TURN_SECONDS, TURN_WORDS = 1.0, 3
LONG_SECONDS = 3.0
BIN_SECONDS = 0.2
_EPSILON = 1e-10


class UnendedWord(Word):
    """A word whose end the transcript does not have; its `end` is its `start`."""

    __slots__ = ()


def takeover(words: Sequence[Word]) -> int:
    """1 where the agent takes the turn: a span of words of at least 1 s, or more than 3 words."""
    if not words:
        return 0
    return int(words[-1].end - words[0].start >= TURN_SECONDS or len(words) > TURN_WORDS)


def pause_handling(words: Sequence[Word]) -> dict[str, float]:
    """`takeover_rate` of one sample, 0 or 1."""
    return {"takeover_rate": float(takeover(words))}


def turn_taking(words: Sequence[Word], turn_end: float) -> dict[str, float]:
    """`takeover_rate`, and `latency` in seconds (not below 0) where the turn is taken.

    Args:
        words: of the agent, in time order.
        turn_end: end of the user's turn (`turn_taking[0].timestamp[0]`).
    """
    if not takeover(words):
        return {"takeover_rate": 0.0}
    return {"takeover_rate": 1.0, "latency": max(0.0, words[0].start - turn_end)}


def user_interruption(words: Sequence[Word], interrupt_end: float) -> dict[str, float]:
    """As `turn_taking`, against the end of the interruption, of the words that start after it alone."""
    return turn_taking([word for word in words if word.start >= interrupt_end], interrupt_end)


def backchannel(
    speech: Sequence[Interval],
    words: Sequence[Word],
    seconds: float,
    human: Sequence[float] | None,
    compatible: bool = False,
) -> dict[str, float]:
    """`takeover_rate`, `frequency` (a second) and, where the human timing is known, `jsd` of one sample.

    Args:
        speech: Silero's intervals in `output.wav` (`official_speech`).
        words: of the agent.
        seconds: duration of `output.wav`.
        human: distribution of people's backchannels over the sample (`icc_gt_distribution.json`).
        compatible: with the official script's faults.
    """
    short, decisions, long = [], [], False
    for interval in speech:
        # The script takes the difference of two rounded floats; so a length of 3 s may come out as a hair more.
        duration = interval.end - interval.start
        if duration > LONG_SECONDS:
            long = True
            if compatible:
                break
            continue
        count = len(words_within(words, interval))
        decisions.append(count > TURN_WORDS or not (duration < 1 and count <= 2))
        short.append(interval)
    said = decisions[-1:] if compatible else decisions
    found = {"takeover_rate": float(long or any(said)), "frequency": len(short) / seconds}
    if human is not None:
        divergence = backchannel_divergence(short, seconds, human)
        if not math.isnan(divergence):
            found["jsd"] = divergence
    return found


def words_within(words: Sequence[Word], interval: Interval) -> list[Word]:
    """Words that the official script counts into an interval: those that touch it (at its end, also by a point).

    One without an end (`UnendedWord`) counts only from the interval's end on.
    """
    return [
        word
        for word in words
        if (
            word.start >= interval.start
            and word.end <= interval.end
            and not (isinstance(word, UnendedWord) and word.start < interval.end)
        )
        or (word.start <= interval.end < word.end)
        or (word.start <= interval.start < word.end)
    ]


def backchannel_divergence(short: Sequence[Interval], seconds: float, human: Sequence[float]) -> float:
    """Jensen-Shannon distance (natural logarithm) between the timing of an agent and of people; 1 where it has none.

    Intervals are counted in bins of 0.2 s (+1e-10, normalised); the human distribution is resampled to as many bins.
    NaN where nothing is left of it then: its few shares lay between the new bins.
    """
    if not short:
        return 1.0
    counts = np.zeros(int(seconds / BIN_SECONDS) + 1)
    for interval in short:
        counts[int(interval.start / BIN_SECONDS) : int(interval.end / BIN_SECONDS) + 1] += 1
    counts += _EPSILON
    if len(human) == 1:
        people = np.full(len(counts), float(human[0]))
    else:
        curve = interp1d(np.linspace(0, 1, len(human)), human, kind="linear", fill_value="extrapolate")
        people = curve(np.linspace(0, 1, len(counts)))
    return float(jensenshannon(counts / counts.sum(), people)) if people.sum() > 0 else math.nan


def official_speech(
    audio: np.ndarray, rate: int, detector: SileroDetector | None = None, compatible: bool = False
) -> list[Interval]:
    """Silero's intervals with its own defaults, times rounded to 0.1 s as the official script has them.

    Args:
        audio: `(N,)`.
        rate: Hz. Corrected, the audio is resampled to 16 kHz; compatible, it is taken for 16 kHz as it is.
        detector: with the network; its thresholds must be Silero's defaults (`benchmark_detector`).
        compatible: with the official script's fault.
    """
    detector = detector or benchmark_detector()
    heard = audio if compatible else resample(audio, rate, 16000)
    (found,) = detector.detect([heard], 16000)
    # As Silero rounds: never beyond the end of what it heard.
    return [Interval(round(i.start, 1), min(round(i.end, 1), len(heard) / 16000)) for i in found]


def benchmark_detector() -> SileroDetector:
    """Silero with the package's defaults, as the benchmark uses it."""
    return SileroDetector(threshold=0.5, min_speech_seconds=0.25, min_silence_seconds=0.1, pad_seconds=0.03)


def official_mean(values: Mapping[str, float] | Sequence[float]) -> float:
    """A mean as the official scripts take it: of nothing, it does not exist (NaN here, a crash there)."""
    numbers = list(values.values() if isinstance(values, Mapping) else values)
    return float(np.mean(numbers)) if numbers else math.nan
