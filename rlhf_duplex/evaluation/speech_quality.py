"""How the agent's speech sounds: a predicted mean opinion score, behind the optional extra `mos`.

UTMOSv2 (what Full-Duplex-Bench v1.5 and arXiv 2606.11167's field use) where its package is installed and its weights
can be had; otherwise DNSMOS P.808 of Microsoft's `speechmos`, whose weights come with the package. The result names the
predictor: the two are on the same scale of 1 to 5 but are not to be compared with each other.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from envs.audio import resample
from envs.errors import InputError
from envs.frames import samples_in
from envs.speech import SpeechDetector

RATE = 16000
MIN_SECONDS = 0.5  # of speech; less is too little to judge
PREDICTORS = ("utmosv2", "dnsmos")


@dataclass(frozen=True)
class Predictor:
    """A mean opinion score from speech.

    Attributes:
        name: `utmosv2` or `dnsmos`.
        predict: `(N,)` float32 speech at 16 kHz in [-1, 1] to a score of 1 to 5.
    """

    name: str
    predict: Callable[[np.ndarray], float]


def load_predictor(name: str | None = None) -> Predictor:
    """The predictor of that name, or the first that is installed.

    Raises:
        InputError: none is installed, or its weights cannot be had.
    """
    if name is not None and name not in PREDICTORS:
        raise InputError(f"speech quality predictor '{name}' is not known: choose {' or '.join(PREDICTORS)}")
    wanted = PREDICTORS if name is None else (name,)
    packages = {"utmosv2": "utmosv2", "dnsmos": "speechmos"}
    for predictor in wanted:
        if importlib.util.find_spec(packages[predictor]) is not None:
            return Predictor(predictor, _utmosv2() if predictor == "utmosv2" else _dnsmos())
    raise InputError(
        "speech quality needs a predictor: pip install 'rlhf-duplex[mos]' (DNSMOS), or UTMOSv2 from its repository"
    )


def _utmosv2() -> Callable[[np.ndarray], float]:
    import utmosv2

    try:
        model: Any = utmosv2.create_model(pretrained=True)
    except Exception as error:  # the hub's, the network's and torch's errors share no base
        first = " ".join(str(error).split())[:200]
        raise InputError(f"the weights of UTMOSv2 cannot be had ({type(error).__name__}: {first})") from error

    def predict(speech: np.ndarray) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            soundfile.write(str(path), speech, RATE)
            return float(model.predict(input_path=str(path)))

    return predict


def _dnsmos() -> Callable[[np.ndarray], float]:
    from speechmos import dnsmos

    def predict(speech: np.ndarray) -> float:
        return float(dnsmos.run(np.clip(speech, -1.0, 1.0), RATE)["p808_mos"])

    return predict


def predict_quality(
    predictor: Predictor, audio: Sequence[np.ndarray], rates: Sequence[int], detector: SpeechDetector
) -> list[float | None]:
    """The score of the speech in each clip `(N,)`: silence is cut out first, as Full-Duplex-Bench does.

    None where there is less than half a second of speech: silence has no quality.
    """
    clips = [resample(np.asarray(clip, dtype=np.float32), rate, RATE) for clip, rate in zip(audio, rates, strict=True)]
    scores: list[float | None] = []
    for clip, speech in zip(clips, detector.detect(clips, RATE), strict=True):
        parts = [clip[samples_in(i.start, RATE) : samples_in(i.end, RATE)] for i in speech]
        spoken = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
        enough = len(spoken) >= MIN_SECONDS * RATE
        scores.append(predictor.predict(spoken) if enough else None)
    return scores
