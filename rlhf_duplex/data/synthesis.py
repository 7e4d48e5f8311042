"""Speech for rewritten replies: a small protocol, Moshi's own text-to-speech, and the packaged voice of nano."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from envs.audio import resample
from envs.episode import Word
from envs.errors import InputError
from envs.speech import Interval, SpeechDetector

SYNTHESISERS = ("hibari", "moshi")
MOSHI_TTS = "kyutai/tts-1.6b-en_fr"


@dataclass(frozen=True)
class Speech:
    """What a synthesiser said.

    Attributes:
        audio: `(N,)` float32.
        sample_rate: Hz.
        words: with times in seconds of `audio`; None where the synthesiser does not know them.
    """

    audio: np.ndarray
    sample_rate: int
    words: tuple[Word, ...] | None = None


class Synthesiser(Protocol):
    """Says a text in the agent's voice."""

    def speak(self, text: str) -> Speech:
        """Speech of `text`, which has at least one word."""
        ...


class HibariSynthesiser:
    """The voice that nano's agent was trained on (the package `hibari-tts`, of the extra `nano`).

    Attributes:
        pace: relative to the voice's own; nano's agent speaks slowly, so that a word has two or three frames.
        seed: of the voice's noise.

    Raises:
        InputError: the package is not installed.
    """

    def __init__(self, pace: float = 0.85, seed: int = 0) -> None:
        try:
            from hibari import Hibari
        except ImportError as error:
            raise InputError(
                "rewrites for nano are spoken by hibari-tts, which is not installed: pip install 'rlhf-duplex[nano]'"
            ) from error
        self._model = Hibari()
        self.pace, self.seed = pace, seed

    def speak(self, text: str) -> Speech:
        audio = np.asarray(self._model(text, speed=self.pace, seed=self.seed), dtype=np.float32)
        return Speech(audio, int(self._model.sample_rate))


class MoshiSynthesiser:
    """Moshi's delayed-streams text-to-speech (`moshi.models.tts.TTSModel`), for rewrites of the 7B.

    The word times are the model's own: the frame at which it began each word. (Needs the weights of a hub repository
    and a GPU for anything like real time; checked against the API of moshi 0.2.13, not run by the tests.)

    Args:
        repository: of the model, on the hub.
        voice: a name in the model's voice repository, or the path of a voice embedding.
        device: where it runs.

    Raises:
        InputError: the model or the voice cannot be had.
    """

    def __init__(self, voice: str, repository: str = MOSHI_TTS, device: str = "cuda") -> None:
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        from moshi.models.loaders import CheckpointInfo
        from moshi.models.tts import TTSModel

        try:
            info = CheckpointInfo.from_hf_repo(repository)
            # 32 codebooks are decoded to audio only, which the policy's own Mimi then encodes at its own depth.
            self._model: Any = TTSModel.from_checkpoint_info(info, n_q=32, temp=0.6, device=device)
            voice_path = self._model.get_voice_path(voice)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"the synthesiser {repository} with voice '{voice}' cannot be had ({first})") from error
        if not self._model.multi_speaker:
            raise InputError(f"the synthesiser {repository} takes no voice embedding: choose one such as {MOSHI_TTS}")
        distilled = bool(self._model.valid_cfg_conditionings)
        if not distilled:
            self._model.cfg_coef = 2.0
        self._attributes = self._model.make_condition_attributes([voice_path], cfg_coef=2.0 if distilled else None)

    def speak(self, text: str) -> Speech:
        import torch

        model = self._model
        entries = model.prepare_script([text], padding_between=1)
        result = model.generate([entries], [self._attributes])
        codes = torch.cat(result.frames[model.delay_steps :], dim=-1)[:, 1:]
        with torch.no_grad():
            audio = model.mimi.decode(codes.clamp(min=0))[0, 0].float().cpu().numpy()
        rate = float(model.mimi.frame_rate)
        end = len(audio) / model.mimi.sample_rate
        onsets = [(word, step / rate) for word, step in result.all_transcripts[0] if step / rate < end]
        following = [start for _, start in onsets[1:]] + [end]
        words = tuple(Word(word, start, stop) for (word, start), stop in zip(onsets, following, strict=True))
        return Speech(audio, int(model.mimi.sample_rate), words)


def make_synthesiser(name: str, voice: str | None, device: str) -> Synthesiser:
    """The synthesiser of that name.

    Raises:
        InputError: another name, or Moshi's without a voice.
    """
    if name == "hibari":
        return HibariSynthesiser()
    if name == "moshi":
        if not voice:
            raise InputError("synthesiser moshi needs a voice of its voice repository: give --voice NAME")
        return MoshiSynthesiser(voice, device=device)
    raise InputError(f"synthesiser '{name}' is not known: choose {' or '.join(SYNTHESISERS)}")


def fitted(speech: Speech, text: str, sample_rate: int, level: float, detector: SpeechDetector) -> Speech:
    """Speech at the codec's sample rate and the agent's level, without silence at its ends, with word times.

    Where the synthesiser gives no times, the detected speech is shared out by letters (`share_out`).

    Args:
        speech: of `text`.
        text: what was said.
        sample_rate: Hz.
        level: root mean square within speech.
        detector: finds where the speech begins and ends.

    Raises:
        InputError: nothing was said.
    """
    audio = resample(speech.audio, speech.sample_rate, sample_rate)
    intervals = detector.detect([audio], sample_rate)[0]
    if not intervals:
        raise InputError(f"the synthesiser said nothing for {text!r}")
    first, last = intervals[0].start, intervals[-1].end
    if speech.words is None:
        words = share_out(text.split(), intervals)
    else:
        words = [Word(w.text, max(w.start, first), max(w.end, first)) for w in speech.words if w.start < last]
    audio = audio[round(first * sample_rate) : round(last * sample_rate)]
    loudness = float(np.sqrt(np.mean(audio**2)))
    moved = tuple(Word(w.text, w.start - first, w.end - first) for w in words)
    return Speech((audio * (level / max(loudness, 1e-6))).astype(np.float32), sample_rate, moved)


def share_out(words: Sequence[str], speech: Sequence[Interval]) -> list[Word]:
    """Word times where nobody knows them: the seconds of speech, without the silences, shared out by letters.

    A word weighs its letters and two more; one before a comma or full stop two more again, for the lengthening there
    (as `experiments/nano` does it). A word never begins in a silence.
    """
    weights = np.array([2.0 + len(w.strip(".,?!")) + (2.0 if w[-1] in ".,?!" else 0.0) for w in words])
    edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()]) * sum(i.duration for i in speech)
    starts, ends = _spoken_to_time(edges[:-1], speech, False), _spoken_to_time(edges[1:], speech, True)
    named = [w.strip(".,?!") for w in words]
    return [Word(w, s, e) for w, s, e in zip(named, starts, ends, strict=True) if w]


def _spoken_to_time(spoken: np.ndarray, speech: Sequence[Interval], at_end: bool) -> list[float]:
    """Moments at which so many seconds of speech have passed; at a silence its end, or its beginning (`at_end`)."""
    passed = np.concatenate([[0.0], np.cumsum([i.duration for i in speech])])
    times = []
    for value in spoken:
        index = int(np.searchsorted(passed, value - 1e-9, "left") if at_end else np.searchsorted(passed, value + 1e-9))
        index = min(max(index - 1, 0), len(speech) - 1)
        times.append(float(speech[index].start + value - passed[index]))
    return times
