"""Segments and their manifest: which window of which recording shows which of the four axes.

A manifest is JSON Lines, one segment a line::

    {"id": "d0-turn", "axis": "turn_taking", "recording": "d0.flac", "user_channel": 1, "start": 17.36, "end": 29.41,
     "events": {"user_turn_end": 23.95}, "transcript": [["hello", [17.4, 17.9], "user"]]}

`recording` is relative to the manifest. Where each speaker has a mono file, `recording` is the user's, `user_channel`
is 0, and `agent_recording` is the agent's. `start`, `end` and all `events` are seconds in the *recording*. `events` and
`transcript` may be left out: what a reward needs and the manifest does not give is detected in the recording
(`envs.events.complete_events`).
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.audio import audio_info, read_audio
from envs.errors import InputError
from envs.files import read_json_lines, write_text

SEGMENT_AXES = ("pause_handling", "turn_taking", "backchannel", "user_interruption")
_REQUIRED = ("id", "axis", "recording", "user_channel", "start", "end")
_OPTIONAL = ("events", "transcript", "agent_recording")


@dataclass(frozen=True)
class Segment:
    """A window of a two-channel recording that shows one axis.

    Attributes:
        id: unique in its manifest.
        axis: one of `SEGMENT_AXES`.
        recording: path of the audio file.
        user_channel: channel of the user; the agent's recorded channel is the other of the first two.
        start, end: seconds in the recording.
        events: by name, in seconds of the recording: `pauses` [[s, e], ...], `user_turn_end` s,
            `true_backchannels` [[s, e], ...], `interruption` [s, e] (the user's interrupting utterance).
        transcript: `[[word, [start, end], "user" | "agent"], ...]`, empty where it is not known.
        agent_recording: path of the agent's own mono file, on the same clock; None where one file holds both.
    """

    id: str
    axis: str
    recording: Path
    user_channel: int
    start: float
    end: float
    events: dict[str, Any] = field(default_factory=dict)
    transcript: tuple = ()
    agent_recording: Path | None = None

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def agent_channel(self) -> int:
        return 1 - self.user_channel if self.user_channel in (0, 1) and self.agent_recording is None else 0

    def user_audio(self, sample_rate: int, start: float | None = None) -> np.ndarray:
        """The user's side `(N,)` float32 at `sample_rate`, from `start` (the segment's, if None) to the segment's end.

        Raises:
            InputError: as in `envs.audio.read_audio`.
        """
        return self._audio(self.recording, self.user_channel, sample_rate, start)

    def agent_audio(self, sample_rate: int) -> np.ndarray:
        """The side of the person whose place the model takes, as recorded; see `user_audio`."""
        return self._audio(self.agent_recording or self.recording, self.agent_channel, sample_rate, None)

    def _audio(self, path: Path, channel: int, sample_rate: int, start: float | None) -> np.ndarray:
        channels = 2 if self.agent_recording is None else 1
        return read_audio(path, channel, sample_rate, self.start if start is None else start, self.end, channels)

    def to_json(self, relative_to: Path | None = None) -> dict[str, Any]:
        """The manifest's line as a dictionary, with the recording relative to a folder."""

        def shown(path: Path) -> str:
            return (path if relative_to is None else relative_path(path, relative_to)).as_posix()

        row = {
            "id": self.id,
            "axis": self.axis,
            "recording": shown(self.recording),
            "user_channel": self.user_channel,
            "start": self.start,
            "end": self.end,
            "events": self.events,
            "transcript": list(self.transcript),
        }
        return row if self.agent_recording is None else row | {"agent_recording": shown(self.agent_recording)}


def relative_path(path: Path, folder: Path) -> Path:
    """The path as it is seen from a folder; where that is a link, ".." leads out of what it points to."""
    real = folder.resolve()
    if real != Path(os.path.abspath(folder)):
        path = path.parent.resolve() / path.name
    return Path(os.path.relpath(path, real))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


# What each event that a built-in axis reads must look like; events of a user's own axis may take any of these forms.
_EVENT_FORMS = {
    "pauses": "intervals",
    "user_turn_end": "time",
    "true_backchannels": "intervals",
    "interruption": "interval",
}
_FORM_NAMES = {
    "time": "a time",
    "interval": "one interval [start, end]",
    "intervals": "a list of intervals [[start, end], ...]",
}


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


def _has_form(value: Any, form: str) -> bool:
    if form == "time":
        return _number(value)
    if form == "interval":
        return _interval(value)
    return isinstance(value, list) and all(map(_interval, value))


def _check_events(events: Any, start: float, end: float) -> str | None:
    """What is wrong with the events of a segment, or None."""
    if not isinstance(events, dict):
        return f"`events` must be an object, found {type(events).__name__}"
    for name, value in events.items():
        moments = [value] if _number(value) else value
        if not isinstance(moments, list):
            return f"event '{name}' must be a time, an interval or a list of them, found {value!r}"
        for moment in moments:
            times = moment if isinstance(moment, list) else [moment]
            if not all(_number(t) for t in times):
                return f"event '{name}' holds {moment!r}, which is not a time in seconds"
            if any(not start - 1e-3 <= t <= end + 1e-3 for t in times):
                return (
                    f"event '{name}' at {moment} lies outside the segment {start}-{end} s "
                    "(events are in seconds of the recording)"
                )
        form = _EVENT_FORMS.get(name)
        if form and not _has_form(value, form):
            return f"event '{name}' must be {_FORM_NAMES[form]}, found {value!r}"
    return None


def parse_segment(row: Any, folder: Path) -> Segment:
    """A segment from a line's JSON value.

    Raises:
        InputError: what is wrong, without the line number (the manifest reader adds it).
    """
    if not isinstance(row, dict):
        raise InputError(f"a segment must be a JSON object, found {type(row).__name__}")
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
        raise InputError(f"missing {', '.join(f'`{key}`' for key in missing)}")
    unknown = sorted(set(row) - set(_REQUIRED) - set(_OPTIONAL))
    if unknown:
        raise InputError(f"unknown key `{unknown[0]}`: the keys are {', '.join(_REQUIRED + _OPTIONAL)}")
    if not isinstance(row["id"], str) or not row["id"]:
        raise InputError(f"`id` must be a non-empty string, found {row['id']!r}")
    if row["axis"] not in SEGMENT_AXES:
        raise InputError(f"unknown axis {row['axis']!r}: the axes of segments are {', '.join(SEGMENT_AXES)}")
    if not isinstance(row["recording"], str) or not row["recording"]:
        raise InputError(f"`recording` must be a path, found {row['recording']!r}")
    channel = row["user_channel"]
    if not isinstance(channel, int) or isinstance(channel, bool) or channel < 0:
        raise InputError(f"`user_channel` must be a channel index from 0, found {channel!r}")
    start, end = row["start"], row["end"]
    if not (_number(start) and _number(end) and 0 <= start < end):
        raise InputError(f"`start` and `end` must be seconds with 0 <= start < end, found {start!r} and {end!r}")
    events = row.get("events") or {}
    wrong = _check_events(events, start, end)
    if wrong:
        raise InputError(wrong)
    transcript = row.get("transcript") or []
    if not isinstance(transcript, list) or not all(
        isinstance(word, list)
        and len(word) == 3
        and isinstance(word[0], str)
        and _interval(word[1])
        and word[2] in ("user", "agent")
        for word in transcript
    ):
        raise InputError('`transcript` must be a list of [word, [start, end], "user" or "agent"], in seconds')
    agent = row.get("agent_recording")
    if agent is not None and (not isinstance(agent, str) or not agent):
        raise InputError(f"`agent_recording` must be a path, found {agent!r}")
    return Segment(
        row["id"],
        row["axis"],
        folder / row["recording"],
        channel,
        float(start),
        float(end),
        events,
        tuple(tuple(word) for word in transcript),
        folder / agent if agent else None,
    )


def read_manifest(path: Path) -> list[Segment]:
    """All segments of a manifest, each checked against the header of its recording.

    Raises:
        InputError: the manifest is missing or empty, or one of its lines is wrong (with the line's number).
    """
    headers: dict[Path, tuple[int, int, float]] = {}

    def parse(row: Any) -> Segment:
        segment = parse_segment(row, path.parent)
        for recording in filter(None, (segment.recording, segment.agent_recording)):
            if recording not in headers:
                headers[recording] = audio_info(recording)
        _check_recording(segment, headers)
        return segment

    return read_json_lines(path, "manifest", "give the path of a segments.jsonl", parse)


def _check_recording(segment: Segment, headers: dict[Path, tuple[int, int, float]]) -> None:
    channels = headers[segment.recording][1]
    if segment.agent_recording is None and channels < 2:
        raise InputError(
            f"recording {segment.recording} has {channels} channel(s), 2 are needed (one a speaker): "
            "give a file with the two speakers on separate channels, or the other speaker's as `agent_recording`"
        )
    if segment.user_channel >= channels:
        raise InputError(
            f"`user_channel` {segment.user_channel} is out of range: {segment.recording} has channels "
            f"0 to {channels - 1}"
        )
    for path in filter(None, (segment.recording, segment.agent_recording)):
        if segment.end > headers[path][2] + 0.05:
            raise InputError(
                f"segment {segment.start}-{segment.end} s lies outside {path}, which lasts {headers[path][2]:.3f} s"
            )


def write_manifest(path: Path, segments: Iterable[Segment]) -> None:
    """Write a manifest atomically, recordings relative to its folder."""
    rows = (json.dumps(segment.to_json(path.parent), ensure_ascii=False) for segment in segments)
    write_text(path, "".join(f"{row}\n" for row in rows))
