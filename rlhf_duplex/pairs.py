"""The runs of `rlhf-duplex pairs` and `rlhf-duplex converse`: from a corpus to a file of pairs and a page.

Everything that can be checked is checked before the model is loaded.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from envs.dialogues import UserSides
from envs.errors import InputError
from envs.events import complete_events
from envs.files import check_replaced
from envs.segments import Segment, read_manifest
from envs.speech import SileroDetector
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import RewardFunction, RewardSpec
from rewards.judge import Judge, JudgeConfig
from rlhf_duplex.config import Config, PromptConfig
from rlhf_duplex.data.conversation import read_corpus, recorded_seconds
from rlhf_duplex.data.conversation_pairs import ConversationPairs
from rlhf_duplex.data.converse import LISTING, check_log_folder, converse, dialogue_frames
from rlhf_duplex.data.pair import stream_format, write_pairs
from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.data.parts import Part, PartStore, assemble, file_state
from rlhf_duplex.data.rollout_pairs import dialogue_of, rollout_parts
from rlhf_duplex.data.streams import Streams
from rlhf_duplex.data.synthesis import make_synthesiser
from rlhf_duplex.inputs import NANO_DATA
from rlhf_duplex.policy.bundle import Bundle, find_bundle, load_bundle, local_info
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.prompt import check_prompt, make_prompt
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.report.pairs import build_pairs_page
from rlhf_duplex.run_folder import make_console, progress

BATCH_SECONDS = 1800.0


def _options(arguments: argparse.Namespace) -> PairOptions:
    given = vars(arguments)
    return PairOptions(**{f.name: given[f.name] for f in fields(PairOptions) if f.name in given})


def run_converse(arguments: argparse.Namespace) -> Path:
    """`rlhf-duplex converse`. Gives the folder.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known.
    """
    options = _options(arguments)
    if arguments.samples < 1:
        raise InputError(f"--samples must be at least 1, found {arguments.samples}")
    if not 0 <= arguments.tail < 3600:
        raise InputError(f"--tail must be seconds from 0 to 3600, found {arguments.tail}")
    segments, _ = _segments(arguments.segments)
    check_log_folder(arguments.out, segments, arguments.samples)
    _check_writable(arguments.out / LISTING)
    bundle, policy, streams = _load(arguments, options)

    console = make_console()
    frames = dialogue_frames(
        segments, arguments.samples, options.lead_in, arguments.tail, float(bundle.mimi.frame_rate)
    )
    with progress(console, "conversations", frames) as advance:
        entries = converse(
            streams,
            policy,
            segments,
            arguments.out,
            arguments.samples,
            options.lead_in,
            arguments.tail,
            options.batch_size,
            options.seed,
            advance,
        )
    seconds = sum(entry.duration or 0.0 for entry in entries)
    console.print(f"wrote {len(entries)} conversations ({seconds / 60:.1f} min) and {arguments.out}/{LISTING}")
    return arguments.out


def run_pairs(arguments: argparse.Namespace) -> Path:
    """`rlhf-duplex pairs`. Gives the file of pairs.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known; and a judge that did
            not answer, after what is done was written.
    """
    options = _options(arguments)
    if arguments.page_pairs < 0:
        raise InputError(f"--page-pairs must be at least 0, found {arguments.page_pairs}")
    if arguments.out.suffix != ".jsonl":
        raise InputError(f"--out must end in .jsonl, found {arguments.out}")
    check_replaced(arguments.out, "a file of pairs", {"shard", "chosen_span"})
    run = _from_conversations if arguments.source == "conversations" else _from_rollouts
    if arguments.source == "rollouts" and (arguments.judge_url or arguments.judge_model):
        raise InputError("--judge-url and --judge-model are of --from conversations: rollouts are compared by rewards")
    return run(arguments, options)


def _segments(name: str) -> tuple[list[Segment], Path]:
    """The segments of a manifest (or nano's), and its folder."""
    path = NANO_DATA / "train" / "segments.jsonl" if name == "nano" else Path(name)
    return read_manifest(path), path.parent


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}): choose another with --out") from error


def _prompt(arguments: argparse.Namespace) -> PromptConfig:
    prompt = PromptConfig(voice=arguments.prompt_voice, text=arguments.prompt_text)
    check_prompt(prompt)
    return prompt


def _load(arguments: argparse.Namespace, options: PairOptions) -> tuple[Bundle, MoshiPolicy, Streams]:
    prompt = _prompt(arguments)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"device '{options.device}' cannot be used ({first}): choose another") from error
    bundle = load_bundle(arguments.checkpoint, options.device, getattr(torch, options.dtype))
    sampling = Sampling(options.text_temperature, 0, options.audio_temperature, options.audio_top_k)
    return bundle, MoshiPolicy(bundle.lm, sampling, make_prompt(bundle, prompt)), Streams(bundle)


def _from_conversations(arguments: argparse.Namespace, options: PairOptions) -> Path:
    entries = read_corpus(Path(arguments.corpus))
    judge = _judge(arguments)
    synthesiser = None
    if judge is not None:
        judge.check()
        name = arguments.synthesiser or _usual_synthesiser(arguments.checkpoint)
        synthesiser = make_synthesiser(name, arguments.voice, options.device)
    _check_writable(arguments.out)
    bundle, policy, streams = _load(arguments, options)

    builder = ConversationPairs(streams, policy, SileroDetector(), options, judge, synthesiser)
    asked = {"url": arguments.judge_url, "model": arguments.judge_model, "voice": arguments.voice}
    facts = _facts(arguments, options, bundle) | {"judge": asked, "synthesiser": type(synthesiser).__name__}
    store = PartStore(arguments.out, facts)
    keys = [
        "|".join([entry.id, str(entry.duration), *map(str, file_state(entry.path, entry.path.with_suffix(".json")))])
        for entry in entries
    ]
    try:
        lengths = [recorded_seconds(entry) for entry in entries]
        done = _make(store, keys, entries, builder.make, options.batch_size, "dialogues", judge is not None, lengths)
    finally:
        if judge is not None:
            judge.close()
    # What pairs are split by: logs of one user's recording are on one side.
    named = [(entry.source or entry.id, part) for entry, part in zip(entries, done, strict=True) if part is not None]
    errors = [(entry.id, part.error) for entry, part in zip(entries, done, strict=True) if part and part.error]
    missing = sum(part is None for part in done)
    why = judge.last_failure if judge is not None else ""
    dialogues = [entry.source or entry.id for entry in entries]
    return _finish(arguments, options, bundle, streams, store, named, dialogues, errors, missing, why)


def _usual_synthesiser(checkpoint: str) -> str:
    """Moshi's for Moshi's own Mimi; nano's voice for a Mimi of another size."""
    folder = find_bundle(checkpoint)
    return "hibari" if folder is not None and local_info(folder).mimi_config is not None else "moshi"


def _judge(arguments: argparse.Namespace) -> Judge | None:
    if not arguments.judge_url and not arguments.judge_model:
        return None
    if not arguments.judge_url or not arguments.judge_model:
        raise InputError("a judge needs both --judge-url and --judge-model")

    config = JudgeConfig(
        arguments.judge_url,
        arguments.judge_model,
        arguments.judge_key_variable,
        timeout=arguments.judge_timeout,
        retries=arguments.judge_retries,
    )
    return Judge(config)


def _from_rollouts(arguments: argparse.Namespace, options: PairOptions) -> Path:
    segments, folder = _segments(arguments.corpus)
    _check_writable(arguments.out)

    detector = SileroDetector()
    segments = complete_events(segments, detector)
    bundle, policy, streams = _load(arguments, options)
    specs = Config().rewards
    rewards = RewardFunction({name: RewardSpec.from_config(spec) for name, spec in specs.items()})
    users = UserSides(streams.codec, detector, options.lead_in)
    env = DuplexDialogueVectorEnv(segments, streams.codec, detector, user_sides=users)
    store = PartStore(arguments.out, _facts(arguments, options, bundle) | {"rewards": specs})
    keys = [str([s.to_json(), file_state(s.recording)]) for s in segments]

    def make(batch: Sequence[Segment]) -> list[Part]:
        return rollout_parts(policy, env, rewards, batch, options, folder)

    done = _make(store, keys, segments, make, max(1, options.batch_size // options.group_size), "segments")
    names = [dialogue_of(segment, folder) for segment in segments]
    named = [(name, part) for name, part in zip(names, done, strict=True) if part is not None]
    return _finish(arguments, options, bundle, streams, store, named, names, [], 0, "")


def _facts(arguments: argparse.Namespace, options: PairOptions, bundle: Bundle) -> dict[str, Any]:
    """Whatever decides the pairs of one dialogue or segment (not how they are put together)."""

    together = ("heldout", "balance", "batch_size", "strict")
    return {
        "source": arguments.source,
        "streams": asdict(stream_format(bundle)),
        "weights": file_state(*sorted(bundle.folder.glob("*.safetensors"))),
        "options": {name: value for name, value in asdict(options).items() if name not in together},
        "prompt": [arguments.prompt_text, *(file_state(Path(voice)) if (voice := arguments.prompt_voice) else [])],
    }


def _make(
    store: PartStore,
    keys: Sequence[str],
    items: Sequence[Any],
    make: Callable[[Sequence[Any]], Sequence[Part | None]],
    batch_size: int,
    unit: str,
    may_stop: bool = False,
    seconds: Sequence[float] | None = None,
) -> list[Part | None]:
    """A part for every item, those that are there already read, the others made and kept batch by batch.

    Args:
        store, keys: where they are kept.
        items: dialogues or segments; make: turns some of them into parts.
        batch_size: how many at once.
        unit: for the progress bar.
        may_stop: whether a full batch, or two in a row, without any part end it (a judge that is down).
        seconds: of each item's audio, which is all in memory while it is worked on; None: too little to matter.
    """

    parts = [store.read(key) for key in keys]
    missing = [index for index, part in enumerate(parts) if part is None]
    console = make_console()
    if len(missing) < len(items):
        console.print(f"going on: {len(items) - len(missing)} of {len(items)} {unit} are done")
    with _counting(console, unit, len(items), len(items) - len(missing)) as advance:
        failed: list[int] = []  # sizes of the last batches that gave nothing
        for batch in _batches(missing, batch_size, seconds):
            made = make([items[index] for index in batch])
            for index, part in zip(batch, made, strict=True):
                parts[index] = part
                if part is not None:
                    store.write(keys[index], part)
            advance(len(batch))
            failed = [*failed, len(batch)] if all(part is None for part in made) else []
            if may_stop and (len(failed) > 1 or sum(failed) >= batch_size):
                break
    return parts


def _batches(rows: Sequence[int], size: int, seconds: Sequence[float] | None) -> Iterator[list[int]]:
    """Rows in order, at most `size` together, and of more than one at most `BATCH_SECONDS` of audio."""
    batch: list[int] = []
    for row in rows:
        long = seconds is not None and sum(seconds[r] for r in [*batch, row]) > BATCH_SECONDS
        if batch and (long or len(batch) == size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@contextmanager
def _counting(console: Any, unit: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(unit, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _finish(
    arguments: argparse.Namespace,
    options: PairOptions,
    bundle: Bundle,
    streams: Streams,
    store: PartStore,
    parts: Sequence[tuple[str, Part]],
    dialogues: Sequence[str],
    errors: Sequence[tuple[str, str]],
    missing: int,
    why: str,
) -> Path:
    """Put the parts together, write pairs and page, and say what was done."""

    out: Path = arguments.out
    console = make_console()
    pairs, counts = assemble(parts, dialogues, options.heldout, options.balance, options.seed)
    for _, part in parts:
        counts.update(part.counts)
    for name, error in errors[:10]:
        console.print(f"skipped {name}: {error}", soft_wrap=True)
    if len(errors) > 10:
        console.print(f"... and {len(errors) - 10} more were skipped")
    console.print(_table(pairs, counts))
    if pairs:
        write_pairs(out, pairs, stream_format(bundle))
        written = str(out)
        if arguments.page_pairs:
            written += f" and {build_pairs_page(out, pairs, streams, arguments.page_pairs)}"
        console.print(f"wrote {len(pairs)} pairs to {written}", soft_wrap=True)
    if missing:
        kept = f"the {len(pairs)} pairs so far are in {out}" if pairs else "there is no pair yet"
        raise InputError(
            f"the judge did not answer for {missing} of {len(dialogues)} dialogues ({why}): {kept}; "
            "run the same command again to go on"
        )
    if not pairs:
        raise InputError(
            f"no pair could be made of {len(dialogues)} {'segments' if arguments.source == 'rollouts' else 'dialogues'}"
            + (f" ({len(errors)} could not be read; the first: {errors[0][1]})" if errors else _why_none(counts))
        )
    store.remove()
    return out


def _why_none(counts: Mapping[str, int]) -> str:
    if any(name.startswith(("problems: ", "dropped: ")) for name in counts):
        return ": the table above says what was dropped, and why"
    return ": no agent in them talks into a turn for a second or leaves one unanswered (--judge-url looks at the words)"


def _table(pairs: Sequence[Any], counts: Mapping[str, int]) -> Any:
    table = Table("", "count", title=None)
    kinds = Counter((pair.kind, pair.split) for pair in pairs)
    for kind in sorted({kind for kind, _ in kinds}):
        train, held = kinds[kind, "train"], kinds[kind, "heldout"]
        table.add_row(f"pairs: {kind}", f"{train + held} ({held} held out)")
    for name, count in sorted(counts.items()):
        table.add_row(name, str(count))
    return table
