"""`rlhf-duplex curate`: from a corpus of two-channel recordings to a manifest of segments.

Two steps. First every recording's speech is detected, in parallel, each result in a file of its own: that is what takes
hours, what a stop interrupts and the next start goes on with. Then the criteria, the choice and the transcripts, which
take seconds, are worked out anew from those files, in an order that does not depend on how they came to be; so a
manifest is the same to the byte whatever was interrupted, and thresholds can be changed without detecting again.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from envs.episode import Word
from envs.errors import InputError
from envs.files import check_replaced
from envs.segments import SEGMENT_AXES, Segment, write_manifest
from rlhf_duplex.data.corpora import CORPORA, find_corpus
from rlhf_duplex.data.corpora.layout import Transcript
from rlhf_duplex.data.criteria import find_candidates, speaker_utterances
from rlhf_duplex.data.curate_options import CurateOptions
from rlhf_duplex.data.detection import Detection, detect
from rlhf_duplex.data.recordings import Problem, Recording, Unread
from rlhf_duplex.data.selection import Found, held_out_recordings, spread
from rlhf_duplex.data.summary import Summary, print_summary
from rlhf_duplex.options import check_options, flag
from rlhf_duplex.run_folder import make_console

STALLED_SECONDS = 3600.0
CONTEXT_SECONDS = 30.0  # the longest context of arXiv 2606.11167
_RETRIES = 1
_MANIFEST = ("a manifest", {"axis", "recording"})  # of what is replaced


def curate(corpus: Path, out: Path, options: CurateOptions, console: Console | None = None) -> Summary:
    """Write the manifest `out` and a page beside it, from the recordings of a corpus.

    Args:
        corpus: a .jsonl or a folder (see `rlhf_duplex.data.corpora`).
        out: path of the manifest; what is found of each recording is kept in a folder beside it (`NAME.work`).
        options: see `rlhf_duplex.data.curate_options`.
        console: where progress and the summary go.

    Raises:
        InputError: what the user can fix; with `options.strict` also the first recording that is wrong.
    """
    console = console or make_console()
    check_curate_options(options)
    work = _prepare(out, bool(options.heldout))
    with console.status(Text(f"looking through {corpus}")):
        layout, recordings, problems = find_corpus(corpus, options.format)
    wrong = [problem for problem in problems if not isinstance(problem, Unread)]
    if options.strict and wrong:
        raise InputError(f"{wrong[0].recording}: {wrong[0].message}")
    summary = Summary(layout, problems=problems)
    detections = detect_all(layout, recordings, options, work, summary, console)
    found = _candidates(recordings, detections, options, summary)
    used = [recording for recording in recordings if recording.id in detections]
    held = held_out_recordings(used, options.users, options.heldout, options.seed) if options.heldout else set()
    chosen = _choose(found, options, lambda item: item.recording.id not in held, 1 - options.heldout)
    evaluated = _choose(found, options, lambda item: item.recording.id in held, options.heldout)
    summary.kept.update(item.candidate.axis for item in chosen)
    summary.held_out.update(item.candidate.axis for item in evaluated)
    summary.problems.sort()
    print_summary(console, summary)
    if not chosen:
        raise InputError(f"{corpus} has no segment that meets the criteria: the table above says why; see --help")
    if held and not evaluated:
        raise InputError(f"--heldout {options.heldout:g}: no segment of the {len(held)} held-out recordings: raise it")
    segments, others = _segments(layout, chosen), _segments(layout, evaluated)
    write_manifest(out, segments)
    if held:
        write_manifest(heldout_path(out), others)
    else:
        _put_aside(heldout_path(out), console)
    if options.encode:
        _encode([*segments, *others], options, console)
    from rlhf_duplex.report.segments import build_segments_page

    by_segment = {
        item.id: (load_detection(detections[item.recording.id]), item.user) for item in _shown(chosen, options)
    }
    page = build_segments_page(out.with_suffix(".html"), segments, by_segment, summary, options)
    apart = f", {len(others)} held-out ones to {heldout_path(out)}" if held else ""
    console.print(f"wrote {len(segments)} segments to {out}{apart}, a page to look at to {page}", soft_wrap=True)
    return summary


def heldout_path(out: Path) -> Path:
    """The manifest of the held-out recordings, beside that of the others."""
    return out.with_suffix(".heldout.jsonl")


def _put_aside(path: Path, console: Console) -> None:
    """Rename the held-out manifest of an earlier choice: its recordings are trained on now."""
    try:
        check_replaced(path, *_MANIFEST)
    except InputError:  # something else has the name
        return
    if path.is_file():
        old = path.with_suffix(".jsonl.old")
        os.replace(path, old)
        console.print(f"! nothing is held out any more: {path} is now {old.name}", soft_wrap=True, highlight=False)


def _choose(
    found: Mapping[str, Sequence[Found]], options: CurateOptions, wanted: Callable[[Found], bool], share: float
) -> list[Found]:
    """What a manifest takes of the candidates that are wanted: of each axis a share of `--per-axis`."""
    count = max(1, round(share * options.per_axis))
    return [
        item
        for axis in SEGMENT_AXES
        for item in spread([candidate for candidate in found[axis] if wanted(candidate)], count, options.seed)
    ]


def check_curate_options(options: CurateOptions) -> None:
    """Values that no type can rule out.

    Raises:
        InputError: the first that is wrong.
    """
    check_options(options, flag)
    if options.criteria.min_silence > options.criteria.max_pause:
        raise InputError(
            f"--min-silence {options.criteria.min_silence:g} is above --max-pause {options.criteria.max_pause:g}: "
            "there would be no pauses"
        )
    if options.encode:
        from rlhf_duplex.data.codes import cache_folder
        from rlhf_duplex.policy.bundle import find_bundle

        if cache_folder(options.codes_cache) is None:
            raise InputError("--encode needs a folder to keep the codes in: give --codes-cache FOLDER")
        find_bundle(options.encode)


def _prepare(out: Path, heldout: bool) -> Path:
    """The work folder beside the manifest, made and writable."""
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out} must end in .jsonl: a page and a work folder of that name are written beside it")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give the path of the manifest to write")
    for path in (out, heldout_path(out)) if heldout else (out,):
        check_replaced(path, *_MANIFEST)
    work = out.with_suffix(".work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{work} cannot be written ({error}): choose another --out") from error
    return work


Outcome = tuple[Recording, tuple[Path, float | None] | Problem]


def detect_all(
    layout: str,
    recordings: Sequence[Recording],
    options: CurateOptions,
    work: Path,
    summary: Summary,
    console: Console,
) -> dict[str, Path]:
    """The speech of every recording that can be used, in files by id; the rest goes to the summary.

    Raises:
        InputError: none can be used, or one cannot and `options.strict` is set.
    """
    run = _detect_with_ray if options.workers else _detect_here
    files: dict[str, Path] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("detecting speech", total=len(recordings), rate="")
        begun, worked = time.monotonic(), 0.0
        for recording, outcome in run(layout, recordings, options, work):
            if isinstance(outcome, Problem):
                _report(outcome, summary, options)
            else:
                files[recording.id], seconds = outcome
                for message in load_detection(files[recording.id]).warnings:
                    _report(Problem(recording.id, message), summary, options)
                summary.done_before += seconds is None
                worked += seconds or 0.0
            rate = worked / 3600 / max(time.monotonic() - begun, 1e-9)
            bar.update(task, advance=1, rate=f"{worked / 3600:.1f} h, {rate:.3f} hours/s")
    if not files:
        first = summary.problems[0]
        raise InputError(f"none of {len(recordings)} recordings can be used; {first.recording}: {first.message}")
    if worked:
        elapsed = time.monotonic() - begun
        speed = worked / 3600 / elapsed
        console.print(f"heard {worked / 3600:.4g} hours in {elapsed:.1f} s, {speed:.4f} hours/s", soft_wrap=True)
    return files


def _report(problem: Problem, summary: Summary, options: CurateOptions) -> None:
    if options.strict:
        raise InputError(f"{problem.recording}: {problem.message}")
    summary.problems.append(problem)


def _detect_one(
    layout: str, recording: Recording, options: CurateOptions, work: Path
) -> tuple[Path, float | None] | Problem:
    try:
        return detect(layout, recording, options.voice, work)
    except InputError as error:
        return Problem(recording.id, str(error))


def _detect_here(layout: str, recordings: Sequence[Recording], options: CurateOptions, work: Path) -> Iterator[Outcome]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: however many there are, the result is the same to the bit
    try:
        for recording in recordings:
            yield recording, _detect_one(layout, recording, options, work)
    finally:
        torch.set_num_threads(threads)


def _detect_with_ray(
    layout: str, recordings: Sequence[Recording], options: CurateOptions, work: Path
) -> Iterator[Outcome]:
    """A Ray task a recording, a few more in flight than there are workers; in the order in which they are done."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray warns will be its default
    import ray
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    started = not ray.is_initialized()
    if started:
        # Results are paths: the object store needs next to nothing. Local, or Ray would join what runs on this machine.
        ray.init(
            address="local",
            num_cpus=options.workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=100 * 2**20,
        )
    try:
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_detect_one)
        waiting = iter(recordings)
        running: dict = {}
        while True:
            while len(running) < 2 * options.workers and (recording := next(waiting, None)) is not None:
                running[remote.remote(layout, recording, options, work)] = recording
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=STALLED_SECONDS)
            if not done:
                names = ", ".join(r.id for r in running.values())
                raise RuntimeError(f"curate: no worker finished a recording within {STALLED_SECONDS:g} s; at: {names}")
            recording = running.pop(done[0])
            try:
                yield recording, ray.get(done[0], timeout=STALLED_SECONDS)
            except (WorkerCrashedError, OutOfMemoryError) as error:
                yield recording, Problem(recording.id, f"a worker died over it {_RETRIES + 1} times ({error})")
            except RayTaskError as error:
                raise RuntimeError(f"curate worker, recording {recording.id}:\n{error}") from error
    finally:
        if started:
            ray.shutdown()


def _candidates(
    recordings: Sequence[Recording], detections: dict[str, Path], options: CurateOptions, summary: Summary
) -> dict[str, list[Found]]:
    """Everything that meets the criteria, by axis; counts what does not."""
    found: dict[str, list[Found]] = {axis: [] for axis in SEGMENT_AXES}
    for recording in recordings:
        if recording.id not in detections:
            continue
        detection = load_detection(detections[recording.id])
        summary.recordings += 1
        summary.seconds += detection.seconds
        summary.transcripts += detection.words > 0
        summary.utterances += sum(len(speaker_utterances(side, options.criteria)) for side in detection.speech)
        for user in options.users:
            speech = detection.speech
            candidates, rejected = find_candidates(speech[user], speech[1 - user], options.criteria)
            for candidate in candidates:
                found[candidate.axis].append(Found(recording, user, candidate))
                summary.found[candidate.axis] += 1
            for axis, reasons in rejected.items():
                summary.rejected[axis] += reasons
    return found


def load_detection(path: Path) -> Detection:
    """A detection that was there a moment ago.

    Raises:
        InputError: it is not there any more.
    """
    detection = Detection.load(path)
    if detection is None:
        raise InputError(f"{path} was there and is not any more: is another curate of the same --out running?")
    return detection


def _segments(layout: str, chosen: Sequence[Found]) -> list[Segment]:
    """The manifest's lines, in order of axis, recording, direction and time."""
    made: list[tuple[tuple, Segment]] = []
    # Recording by recording, so that one transcript at a time is in memory.
    for _, group in itertools.groupby(sorted(chosen, key=lambda f: f.recording.id), key=lambda f: f.recording.id):
        items = list(group)
        recording = items[0].recording
        words = _words(layout, recording)
        for item in items:
            user, agent = recording.sides[item.user], recording.sides[1 - item.user]
            found = item.candidate
            segment = Segment(
                id=item.id,
                axis=found.axis,
                recording=user.path,
                user_channel=user.channel,
                start=found.start,
                end=found.end,
                events=found.events,
                transcript=tuple(transcript_of(words, item.user, found.start, found.end)),
                agent_recording=agent.path if recording.is_split else None,
            )
            made.append(((SEGMENT_AXES.index(found.axis), recording.id, item.user, found.start), segment))
    return [segment for _, segment in sorted(made, key=lambda entry: entry[0])]


def _shown(chosen: Sequence[Found], options: CurateOptions) -> list[Found]:
    """The segments of the page: `spread` drew them in random order, so the first of an axis are a random handful."""
    axes = {axis: [item for item in chosen if item.candidate.axis == axis] for axis in SEGMENT_AXES}
    return [item for own in axes.values() for item in own[: options.examples]]


def _words(layout: str, recording: Recording) -> Transcript:
    try:
        return CORPORA[layout].words(recording) if recording.sidecars else ([], [])
    except InputError:  # reported when the recording was read
        return [], []


def transcript_of(words: Sequence[Sequence[Word]], user: int, start: float, end: float) -> Iterator[tuple]:
    """The words of both sides whose middle lies in a segment, their times cut to it, as a manifest has them.

    Before them the user's words in the context: whoever judges what an agent says there must know what it was told.
    """
    said = [(word, side) for side, own in enumerate(words) for word in own]
    for word, side in sorted(said, key=lambda entry: (entry[0].start, entry[1])):
        first = max(0.0, start - CONTEXT_SECONDS) if side == user and (word.start + word.end) / 2 < start else start
        if first <= (word.start + word.end) / 2 <= end:
            times = [round(max(word.start, first), 3), round(min(word.end, end), 3)]
            yield word.text, times, "user" if side == user else "agent"


def _encode(segments: Sequence[Segment], options: CurateOptions, console: Console) -> None:
    """The codes of every segment's user, in the cache."""
    from envs.dialogues import padded_user_audio
    from rlhf_duplex.data.codes import open_cache
    from rlhf_duplex.policy.bundle import load_bundle

    assert options.encode is not None
    codec = load_bundle(options.encode, options.device).codec
    cache = open_cache(options.codes_cache, codec)
    assert cache is not None  # `check_curate_options`
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for segment in bar.track(segments, description="encoding users"):
            cache.encode(codec, padded_user_audio(segment, codec, options.lead_in))
    damaged = f" ({cache.damaged} of them damaged before)" if cache.damaged else ""
    console.print(
        f"encoded {cache.encoded} segments{damaged}, {cache.reused} were in {cache.folder} already", soft_wrap=True
    )
