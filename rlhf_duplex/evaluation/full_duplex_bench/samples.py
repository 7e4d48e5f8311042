"""The benchmark's own folders: `{task}/{ID}/` with `input.wav`, an annotation, and a system's `output.wav` and `.json`.

The folders are named as in the official download (`candor_pause_handling`, ...) or as in the official examples
(`pause_handling`, `smooth_turn_taking`, ...). What is read is checked, and an error names the file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.audio import audio_info, read_audio
from envs.episode import Word
from envs.errors import InputError
from envs.files import write_text
from envs.segments import Segment
from envs.speech import Interval
from rlhf_duplex.evaluation.full_duplex_bench.metrics import UnendedWord

# Folder of the download or of the examples -> axis of the result.
TASKS = {
    "fdb-v1": {
        "candor_pause_handling": "pause_handling_candor",
        "synthetic_pause_handling": "pause_handling_synthetic",
        "pause_handling": "pause_handling",
        "icc_backchannel": "backchannel",
        "backchannel": "backchannel",
        "candor_turn_taking": "turn_taking",
        "smooth_turn_taking": "turn_taking",
        "turn_taking": "turn_taking",
        "synthetic_user_interruption": "user_interruption",
        "user_interruption": "user_interruption",
    },
    "fdb-v1.5": {
        name: name for name in ("user_interruption", "user_backchannel", "talking_to_other", "background_speech")
    },
}
_ANNOTATIONS = {
    "pause_handling": "pause.json",
    "turn_taking": "turn_taking.json",
    "user_interruption": "interrupt.json",
}


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    Attributes:
        task: axis of the result; base: the same without the name of a subset.
        id: name of its folder.
        folder: with `input.wav`.
        event: what the annotation gives: `[turn end, ...]` of turn-taking, the interruption, the overlap of v1.5.
        texts: `context` and `interrupt` (what the user says before and on barging in), where they are known.
        clean: of v1.5, the variant without the overlap, `clean_input.wav`.
    """

    task: str
    id: str
    folder: Path
    event: Interval | None = None
    texts: dict[str, str] = field(default_factory=dict)
    clean: bool = False

    @property
    def base(self) -> str:
        return "pause_handling" if self.task.startswith("pause_handling") else self.task

    @property
    def name(self) -> str:
        """Unique in a benchmark."""
        return f"{self.folder.parent.name}/{self.id}"

    @property
    def input(self) -> Path:
        return self.folder / f"{'clean_' if self.clean else ''}input.wav"

    @property
    def seconds(self) -> float:
        return audio_info(self.input)[2]

    def outputs(self, root: Path) -> tuple[Path, Path]:
        """A system's `output.wav` and `output.json` for it, below the system's own folder."""
        stem = "clean_output" if self.clean else "output"
        folder = root / self.folder.parent.name / self.id
        return folder / f"{stem}.wav", folder / f"{stem}.json"

    def segment(self) -> Segment:
        """The user's input as a segment that an environment can play; the whole of it is scored."""
        axis = self.base if self.base in ("pause_handling", "backchannel", "turn_taking") else "user_interruption"
        name = f"{self.name}{'-clean' if self.clean else ''}"
        return Segment(name, axis, self.input, 0, 0.0, self.seconds, agent_recording=self.input)


def read_benchmark(data: Path, suite: str) -> list[Sample]:
    """All samples of a benchmark, by task, then by id.

    Args:
        data: folder of task folders.
        suite: `fdb-v1` or `fdb-v1.5`.

    Raises:
        InputError: no such folder, no task in it, or an annotation that is missing or damaged.
    """
    if not data.is_dir():
        raise InputError(f"--data {data} does not exist: give the folder of the benchmark's task folders")
    known = TASKS[suite]
    folders = [folder for folder in sorted(data.iterdir()) if folder.is_dir() and folder.name in known]
    samples = [
        _sample(suite, known[folder.name], sample)
        for folder in folders
        for sample in sorted((s for s in folder.iterdir() if _is_sample(s)), key=_by_number)
    ]
    if not samples:
        raise InputError(
            f"--data {data} holds no sample of {suite}: it needs folders such as {', '.join(list(known)[:3])} with "
            "{ID}/input.wav in them"
        )
    names = {(sample.task, sample.folder.parent.name) for sample in samples}
    doubled = sorted({task for task, _ in names if sum(other == task for other, _ in names) > 1})
    if doubled:
        raise InputError(f"--data {data} has two folders of {doubled[0]}: keep one")
    return samples


def _is_sample(folder: Path) -> bool:
    return not folder.name.startswith(".") and (folder / "input.wav").exists()


def _by_number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else 1 << 60, folder.name)


def _sample(suite: str, task: str, folder: Path) -> Sample:
    audio_info(folder / "input.wav")
    if suite == "fdb-v1.5":
        record = read_json(folder / "metadata.json")
        if not isinstance(record, dict):
            raise InputError(f"{folder / 'metadata.json'} must be an object with `timestamps`, found {record!r:.80}")
        texts = {"context": record.get("context_text"), "interrupt": record.get("current_turn_text")}
        event = _interval(record.get("timestamps"), folder / "metadata.json")
        return Sample(task, folder.name, folder, event, _texts(texts))
    base = "pause_handling" if task.startswith("pause_handling") else task
    if base not in _ANNOTATIONS:
        return Sample(task, folder.name, folder)
    path = folder / _ANNOTATIONS[base]
    record = read_json(path)
    try:
        first = record[0]
        return Sample(task, folder.name, folder, _interval(first["timestamp"], path), _texts(first))
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path} is no annotation of {base} ({type(error).__name__}: {error})") from error


def _texts(record: Any) -> dict[str, str]:
    return {name: text for name in ("context", "interrupt") if isinstance(text := record.get(name), str)}


def _interval(value: Any, path: Path) -> Interval:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(t, int | float) for t in value)
    if not numbers or not all(math.isfinite(t) for t in value):
        raise InputError(f"{path}: a timestamp must be [start, end] in seconds, found {value!r}")
    return Interval(float(value[0]), float(value[1]))


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def read_words(path: Path) -> list[Word]:
    """The words of an `output.json`. One without an end is an `UnendedWord`; one without a beginning is left out.

    Raises:
        InputError: missing or damaged.
    """
    record = read_json(path)
    words = []
    try:
        for chunk in record["chunks"]:
            start, end = chunk["timestamp"]
            if start is None:
                continue
            kind = UnendedWord if end is None else Word
            word = kind(str(chunk["text"]), float(start), float(start if end is None else end))
            if not (math.isfinite(word.start) and math.isfinite(word.end)):
                raise ValueError(f"a word's times are {chunk['timestamp']}")
            words.append(word)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no transcript ({type(error).__name__}: {error}): it needs "
            '{"chunks": [{"text": ..., "timestamp": [start, end]}]}'
        ) from error
    return words


def write_words(path: Path, words: Sequence[Word]) -> None:
    """The words as `output.json`, which the official scripts read."""
    chunks = [{"text": word.text, "timestamp": [round(word.start, 3), round(word.end, 3)]} for word in words]
    record = {"text": " ".join(word.text for word in words), "chunks": chunks}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False))


def read_output(path: Path) -> tuple[np.ndarray, int]:
    """A system's audio `(N,)` at the rate of its file (Hz).

    Raises:
        InputError: missing, corrupt or empty.
    """
    rate = audio_info(path)[0]
    return read_audio(path, 0, rate, channels=1), rate
