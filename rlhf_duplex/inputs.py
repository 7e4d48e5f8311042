"""What a run works on: manifests, audio, reward axes and detector, checked before a model is loaded."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.audio import audio_info, resample
from envs.errors import InputError
from envs.events import complete_events, no_user_speech
from envs.segments import Segment, read_manifest
from envs.speech import SpeechDetector, make_detector
from rewards.aggregate import RewardFunction, RewardSpec
from rlhf_duplex.config import Config
from rlhf_duplex.evaluation.metrics import read_results
from rlhf_duplex.held_out import segment_stretches, trained_on
from rlhf_duplex.policy.bundle import bundle_info, check_bundle, find_bundle
from rlhf_duplex.policy.codec import first_tokens
from rlhf_duplex.policy.prompt import check_prompt
from rlhf_duplex.tracking import check_trackers

NANO_DATA = Path(__file__).parent / "nano_data"
SILENT_PEAK = 1e-3  # of full scale, -60 dB: no speech is that soft throughout
_LOOK_SECONDS, _LOOK_RATE = 3.0, 16000  # of a segment, where it is loudest, that the detector hears first
_TOGETHER = 256  # segments whose audio is in memory at once
_NAMED = 3  # segments that a warning names


@dataclass
class Inputs:
    """What a run works on, checked."""

    segments: list[Segment]
    trained: list[Segment]  # those of `segments` that are trained on
    held_out: list[Segment]
    held_out_trained: int  # held-out segments of audio that is trained on
    reward_function: RewardFunction
    detector: SpeechDetector
    notes: list[str] = field(default_factory=list)  # what is odd, though it can be used: for the terminal

    @property
    def held_out_is_training(self) -> bool:
        return self.held_out_trained == len(self.held_out)


def load_inputs(config: Config) -> Inputs:
    """Manifests, audio, reward axes and detector, each held against what is wrong with it, with no model loaded.

    Raises:
        InputError: the first thing that is wrong.
    """
    check_machine(config)
    check_prompt(config.prompt)
    if config.trainer.onset_words:
        first_tokens(bundle_info(config.checkpoint).get_text_tokenizer(), config.trainer.onset_words)
    specs = {name: RewardSpec.from_config(options) for name, options in config.rewards.items()}
    reward_function = RewardFunction(specs)
    detector = make_detector(config.detector.name, **config.detector.options)
    notes: list[str] = []
    segments = load_segments(config.segments, "train", detector, notes, config.resume)
    evaluation = config.evaluation.segments
    if evaluation is None and config.segments == "nano":
        evaluation = "nano"
    held_out = segments
    if evaluation is not None:
        held_out = load_segments(evaluation, "heldout", detector, notes, config.resume)
    held_out = first_of_each(held_out, config.evaluation.limit)
    if config.env == "live" and config.live.user != "scripted":
        find_bundle(config.live.user)
    if config.evaluation.before is not None:
        check_before("evaluation.before", Path(config.evaluation.before), config, held_out)
    missing = sorted(set(config.train_axes) - {segment.axis for segment in segments})
    if missing:
        raise InputError(f"train_axes: {config.segments} has no segment of the axis '{missing[0]}'")
    trained = [segment for segment in segments if not config.train_axes or segment.axis in config.train_axes]
    reward_function.prepare([*segments, *held_out])
    shared = len(held_out) if evaluation is None else trained_on(held_out, segment_stretches(trained))
    return Inputs(segments, trained, held_out, shared, reward_function, detector, notes)


def check_before(key: str, path: Path, config: Config, held_out: list[Segment]) -> None:
    """Hold a result that is to stand for the evaluation before training against what would have been measured.

    Raises:
        InputError: it is of something else; `key` says what brought it in.
    """
    record = {"seed": config.evaluation.seed, **read_results(path)}  # those of earlier versions do not name it
    mine = {
        "checkpoint": config.checkpoint,
        "lead_in_seconds": config.context.lead_in,
        "samples": config.evaluation.samples,
        "seed": config.evaluation.seed,
        "update": 0,
    }
    for name, value in mine.items():
        if record.get(name) != value:
            raise InputError(f"{key}: {path} was measured with {name} {record.get(name)}, not {value}")
    measured = {
        name for metrics in record.get("segments", {}).values() for values in metrics.values() for name in values
    }
    missing = [segment.id for segment in held_out if segment.id not in measured]
    if missing:
        raise InputError(
            f"{key}: {path} has nothing of {len(missing)} of {len(held_out)} held-out segments, such as "
            f"'{missing[0]}': it was measured on others"
        )


def check_machine(config: Any) -> None:
    """Device, trackers and the checkpoint's file headers.

    With workers on Ray the device is theirs: the process that starts them may stand on a machine without one.

    Raises:
        InputError: the first that cannot be used.
    """
    elsewhere = getattr(getattr(config, "cluster", None), "workers", 0)
    try:
        torch.empty(0, device="cpu" if elsewhere and torch.device(config.device).type == "cuda" else config.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device '{config.device}' cannot be used ({first}): choose another") from error
    check_trackers(config.trackers)
    check_bundle(bundle_info(config.checkpoint))


def first_of_each(segments: list[Segment], limit: int) -> list[Segment]:
    """The first `limit` segments of every axis (0: all)."""
    seen: dict[str, int] = {}
    kept = []
    for segment in segments:
        seen[segment.axis] = seen.get(segment.axis, 0) + 1
        if not limit or seen[segment.axis] <= limit:
            kept.append(segment)
    return kept


def manifest_path(name: str, part: str) -> Path:
    """Of a manifest, or of the `part` of nano's."""
    return NANO_DATA / part / "segments.jsonl" if name == "nano" else Path(name)


def load_segments(
    name: str, part: str, detector: SpeechDetector, notes: list[str] | None = None, resumed: bool = False
) -> list[Segment]:
    """A manifest, or the `part` (`train`, `heldout`) of nano's, with its audio read once and its events completed.

    Where the detector hears nobody in most segments, their `user_channel` is wrong. In a few it may miss whom another
    detector, another threshold or a transcript found; that is only noted. So is either in a run that goes on: its
    manifest must stay as it was.

    Args:
        name, part: which.
        detector: of speech.
        notes: what is odd about the segments, though they can be used, is added here.
        resumed: whether a run goes on.

    Raises:
        InputError: the first thing that is wrong.
    """
    segments = read_manifest(manifest_path(name, part))
    if name != "nano":  # what ships with the package is as it was built
        unheard = _unheard(segments, detector)
        if 2 * len(unheard) > len(segments) and not resumed:
            raise no_user_speech(unheard, len(segments))
        if unheard and notes is not None:
            named = ", ".join(f"'{segment.id}'" for segment in unheard[:_NAMED])
            more = ", ..." if len(unheard) > _NAMED else ""
            notes.append(
                f"{name}: the detector hears no user in {len(unheard)} of {len(segments)} segments ({named}{more}): "
                "look at them, or leave them out of the next run"
            )
    return complete_events(segments, detector)


def _unheard(segments: list[Segment], detector: SpeechDetector) -> list[Segment]:
    """Those in which nobody speaks as the user. Reads what the header cannot tell: truncated files, NaN samples.

    Room noise is no speech, which the detector alone can tell. It hears the loudest seconds of each segment: nearly
    always they are enough, and decoding the segment takes twenty times as long.

    Raises:
        InputError: the audio of one cannot be read, or is silent.
    """
    unheard = []
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        for begin in range(0, len(segments), _TOGETHER):
            part = segments[begin : begin + _TOGETHER]
            found = detector.detect(list(pool.map(_loudest, part)), _LOOK_RATE)
            for segment, speech in zip(part, found, strict=True):
                if not speech and not detector.detect([segment.user_audio(_LOOK_RATE)], _LOOK_RATE)[0]:
                    unheard.append(segment)
    return unheard


def _loudest(segment: Segment) -> np.ndarray:
    """The user's loudest seconds of a segment, all of which was read.

    Raises:
        InputError: it cannot be read, or is silent.
    """
    rate = audio_info(segment.recording)[0]
    audio = segment.user_audio(rate)
    peak = float(abs(audio).max(initial=0.0))
    if peak < SILENT_PEAK:
        raise InputError(
            f"segment '{segment.id}' of {segment.recording} is silent on channel {segment.user_channel} (peak "
            f"{peak:.1g}), where the user should speak: is `user_channel` right?"
        )
    length = round(_LOOK_SECONDS * rate)
    energy = np.cumsum(np.square(audio, dtype=np.float64))
    begin = int(np.argmax(energy[length:] - energy[:-length])) if len(audio) > length else 0
    return resample(audio[begin : begin + length], rate, _LOOK_RATE)
