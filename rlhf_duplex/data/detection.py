"""One recording at a time: is it whole, who speaks when; kept in a file, so that nothing is done twice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path

from envs.audio import audio_info
from envs.episode import Word
from envs.errors import InputError
from envs.files import write_text
from envs.speech import Interval, SileroDetector
from envs.streaming import stream_speech
from envs.utterances import clip_intervals
from rlhf_duplex.data.corpora import CORPORA
from rlhf_duplex.data.corpora.layout import Transcript
from rlhf_duplex.data.curate_options import VoiceActivity
from rlhf_duplex.data.recordings import Recording, check_recording, files_fingerprint

# A new version throws away hours of work on every corpus. Only of mp3s the end was once read wrongly.
_VERSION, _MP3_VERSION = 1, 2
_ENOUGH_WORDS, _LEAST_AGREEMENT, _SLACK_SECONDS = 20, 0.5, 0.3
_SILENT_SECONDS, _SAME_SECONDS, _SAME_SHARE = 60.0, 5.0, 0.9


@dataclass(frozen=True)
class Detection:
    """What is known of a recording once it was read.

    Attributes:
        recording: its id.
        seconds: how long both sides last.
        speech: speech intervals of both sides, seconds in the recording.
        words: of its transcript.
        warnings: what is wrong, though the recording can be used.
    """

    recording: str
    seconds: float
    speech: tuple[list[Interval], list[Interval]]
    words: int
    warnings: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write it, all or nothing."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Detection | None":
        """What `save` wrote, or None where there is no whole file."""
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            first, second = ([Interval(*pair) for pair in side] for side in row["speech"])
            return cls(row["recording"], row["seconds"], (first, second), row["words"], tuple(row["warnings"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


def detection_path(folder: Path, layout: str, recording: Recording, voice: VoiceActivity) -> Path:
    """Where the detection of a recording is kept: named after its id, its files' content and what decides the result.

    Raises:
        InputError: one of its files cannot be read.
    """
    mp3 = any(path.suffix.lower() == ".mp3" for path in recording.audio_paths)
    deciding = (
        _MP3_VERSION if mp3 else _VERSION,
        layout,
        recording.id,
        recording.seconds,
        [side[1:] for side in recording.sides],
        astuple(voice),
    )
    files = files_fingerprint(recording.audio_paths + recording.sidecars)
    return folder / f"{hashlib.sha256(repr((deciding, files)).encode()).hexdigest()[:40]}.json"


def detect(layout: str, recording: Recording, voice: VoiceActivity, folder: Path) -> tuple[Path, float | None]:
    """The file with a recording's detection, made now unless it is there already.

    Returns:
        Its path, and the seconds of audio that were worked on (None where it was there).

    Raises:
        InputError: the recording cannot be used.
    """
    path = detection_path(folder, layout, recording, voice)
    if Detection.load(path) is not None:
        return path, None
    seconds = check_recording(recording, voice.length_tolerance)
    corpus = CORPORA[layout]
    warnings: list[str] = []
    speech = None
    words: Transcript = ([], [])
    if recording.sidecars:
        try:
            words = corpus.words(recording)
        except InputError as error:
            warnings.append(f"used without its transcript: {error}")
        try:
            speech = corpus.speech(recording) if voice.vad == "corpus" else None
        except InputError as error:
            warnings.append(f"its own speech times are not used: {error}")
    found = speech is not None
    if speech is None:
        detector = _detector(voice.vad_threshold, voice.vad_min_speech, _network_rate(recording))
        (first, second), lasts = stream_speech(_sources(recording), detector)
        speech, seconds = (first, second), min(seconds, *lasts)
    last = max(
        [word.end for side in words for word in side] + [i.end for side in speech for i in side if found], default=0.0
    )
    if last > seconds + voice.length_tolerance:
        warnings.append(f"its transcript or speech times go on to {last:.1f} s, the audio only to {seconds:.1f} s")
    warnings += disagreements(words, speech) + silent_sides(speech, seconds)
    if same_speaker(speech):
        raise InputError(
            f"{recording.audio_paths[0]}: both sides speak at the same times: one channel doubled, or both microphones "
            "hear both speakers; give a recording with one speaker a channel"
        )
    kept = [[Interval(round(s, 4), round(e, 4)) for s, e in clip_intervals(side, 0.0, seconds)] for side in speech]
    Detection(recording.id, seconds, (kept[0], kept[1]), sum(map(len, words)), tuple(warnings)).save(path)
    return path, seconds


@lru_cache(maxsize=2)
def _detector(threshold: float, min_speech: float, rate: int) -> SileroDetector:
    """One for all recordings of a process: loading it takes longer than a short recording."""
    return SileroDetector(threshold=threshold, min_speech_seconds=min_speech, sample_rate=rate)


def _network_rate(recording: Recording) -> int:
    """Of Silero's network: telephone recordings have their own; in noise, the other loses the ends of utterances."""
    return 8000 if all(audio_info(path)[0] == 8000 for path in recording.audio_paths) else 16000


def _sources(recording: Recording) -> list[tuple[Path, Sequence[int]]]:
    if recording.is_split:
        return [(side.path, [side.channel]) for side in recording.sides]
    return [(recording.sides[0].path, [side.channel for side in recording.sides])]


def silent_sides(speech: Sequence[Sequence[Interval]], seconds: float) -> list[str]:
    """A side on which nobody speaks, in a recording long enough to tell."""
    quiet = [side for side, intervals in enumerate(speech) if not intervals and seconds >= _SILENT_SECONDS]
    return [f"no speech on channel {side} in {seconds:.0f} s: is it the speaker's?" for side in quiet]


def same_speaker(speech: tuple[Sequence[Interval], Sequence[Interval]]) -> bool:
    """Whether nearly all speech of the two sides is at the same times, which people do not do for long."""
    both, i, j = 0.0, 0, 0
    while i < len(speech[0]) and j < len(speech[1]):
        one, other = speech[0][i], speech[1][j]
        both += one.overlap(other)
        i, j = (i + 1, j) if one.end <= other.end else (i, j + 1)
    either = sum(interval.duration for side in speech for interval in side) - both
    return both >= _SAME_SECONDS and both > _SAME_SHARE * either


def disagreements(words: Sequence[Sequence[Word]], speech: Sequence[Sequence[Interval]]) -> list[str]:
    """What tells of swapped channels or drifting clocks: words that lie where their speaker is silent.

    Args:
        words: of both sides, in order of time; fewer than 20 of a side say nothing.
        speech: intervals of both sides.
    """
    found = []
    for side, (own, intervals) in enumerate(zip(words, speech, strict=True)):
        if len(own) < _ENOUGH_WORDS:
            continue
        heard, position = 0, 0
        for word in own:  # both in order of time
            while position < len(intervals) and intervals[position].end < word.start - _SLACK_SECONDS:
                position += 1
            heard += position < len(intervals) and intervals[position].start < word.end + _SLACK_SECONDS
        if heard < _LEAST_AGREEMENT * len(own):
            found.append(
                f"only {100 * heard / len(own):.0f} % of the words of channel {side} lie in its speech: "
                "are the channels swapped, or do the clocks of audio and transcript drift?"
            )
    return found
