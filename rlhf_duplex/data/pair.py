"""The preference pair, and the files that hold many: JSON Lines beside safetensors shards.

A pair is one dialogue that goes on in two ways. All token streams of a frame are kept (text, agent's codebooks, user's
codebooks), undelayed, in the order in which `MoshiPolicy.evaluate_actions` and `Episode` have them, so that
`torch.cat([pair.context, pair.chosen], dim=1)[None]` is what the policy evaluates. Column n of the streams holds the
tokens of step n: text token n, the agent's codes that are heard in frame n + max_delay, and the user's codes of frame
n + 1 (the user's first frame is never model input).

`pairs.jsonl` has a pair a line, the tokens lie in `pairs.shards/`::

    {"id": "log3-0", "kind": "interruption", "split": "train", "shard": "pairs.shards/3f2a....safetensors",
     "frames": [61, 80, 55], "chosen_span": [0, 80], "rejected_span": [0, 55],
     "streams": {"tokenizer": "9c...", "codec": "77...", ...}, "provenance": {"recording": "log3.wav", ...}}

Shape letters: `K` streams of a frame; `Tc`, `Tw`, `Tl` frames of context, chosen (won) and rejected (lost).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from envs.errors import InputError
from envs.files import read_json_lines, replacing, write_text
from envs.segments import SEGMENT_AXES
from rlhf_duplex.policy.bundle import Bundle
from rlhf_duplex.policy.codec import mimi_fingerprint

CONVERSATION_KINDS = ("interruption", "unresponsive", "content")
KINDS = CONVERSATION_KINDS + SEGMENT_AXES  # a pair from rollouts has its segment's axis as kind
SPLITS = ("train", "heldout")
SHARD_PAIRS = 256
_REQUIRED = ("id", "kind", "split", "shard", "frames", "chosen_span", "rejected_span", "streams", "provenance")
_PARTS = ("context", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two continuations of one dialogue, of which the first is to be preferred.

    Attributes:
        id: unique in its file.
        kind: one of `KINDS`.
        split: `train` or `heldout`; pairs of one dialogue are all in one.
        context: `(K, Tc)` int64, what both have in common; Tc may be 0.
        chosen, rejected: `(K, Tw)` and `(K, Tl)` int64, what follows the context.
        chosen_span, rejected_span: frames [start, end) of `chosen` and `rejected` (the context not counted) that the
            loss covers: from where the two part to the end of the agent's reply.
        provenance: where it came from and why, JSON values.
    """

    id: str
    kind: str
    split: str
    context: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_span: tuple[int, int]
    rejected_span: tuple[int, int]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamFormat:
    """What token streams mean: of which tokenizer and codec they are, and the sizes of the model that reads them.

    Two bundles with equal formats can share pairs; weights of the language model do not matter.

    Attributes:
        tokenizer, codec: fingerprints of the SentencePiece model and of Mimi's weights.
        agent_codebooks, user_codebooks: audio streams after the text stream.
        text_cardinality, audio_cardinality: tokens of a stream.
        max_delay: frames by which the agent's codes are heard after their step.
    """

    tokenizer: str
    codec: str
    agent_codebooks: int
    user_codebooks: int
    text_cardinality: int
    audio_cardinality: int
    max_delay: int

    @property
    def streams(self) -> int:
        """K."""
        return 1 + self.agent_codebooks + self.user_codebooks


def stream_format(bundle: Bundle) -> StreamFormat:
    """The format of the streams that a bundle's policy reads and writes."""
    codec = bundle.codec
    return StreamFormat(
        hashlib.sha256(bundle.tokenizer.serialized_model_proto()).hexdigest()[:16],
        mimi_fingerprint(bundle.mimi)[:16],
        codec.agent_codebooks,
        codec.user_codebooks,
        codec.text_cardinality,
        codec.audio_cardinality,
        max(bundle.lm.delays),
    )


def check_pair(pair: Pair, streams: StreamFormat) -> None:
    """Hold a pair against the format of its streams.

    Raises:
        InputError: what is wrong, without the place (the reader adds file and line).
    """
    if pair.kind not in KINDS:
        raise InputError(f"unknown kind {pair.kind!r}: the kinds are {', '.join(KINDS)}")
    if pair.split not in SPLITS:
        raise InputError(f"unknown split {pair.split!r}: choose {' or '.join(SPLITS)}")
    for part in _PARTS:
        tokens = getattr(pair, part)
        if tokens.dim() != 2 or tokens.shape[0] != streams.streams or tokens.is_floating_point():
            raise InputError(
                f"`{part}` must be whole numbers of shape ({streams.streams}, frames), found {tuple(tokens.shape)} "
                f"{tokens.dtype}"
            )
        _check_range(part, tokens, streams)
    for part in ("chosen", "rejected"):
        start, end = getattr(pair, f"{part}_span")
        frames = getattr(pair, part).shape[1]
        if not 0 <= start < end <= frames:
            raise InputError(f"`{part}_span` [{start}, {end}) is empty or lies outside its {frames} frames")
    if torch.equal(pair.chosen[0], pair.rejected[0]):
        raise InputError("chosen and rejected have the same text stream: there is nothing to prefer")


def _check_range(part: str, tokens: torch.Tensor, streams: StreamFormat) -> None:
    if tokens.shape[1] == 0:
        return
    limits = ((0, tokens[:1], 0, streams.text_cardinality), (1, tokens[1:], -1, streams.audio_cardinality))
    for first, rows, low, high in limits:  # -1: an audio code that never came to be, at an episode's end
        wrong = ((rows < low) | (rows >= high)).nonzero()
        if len(wrong):
            row, frame = wrong[0].tolist()
            raise InputError(
                f"`{part}` holds token {int(rows[row, frame])} in stream {first + row}, frame {frame}: "
                f"the stream's tokens are {low} to {high - 1}"
            )


def write_pairs(path: Path, pairs: Sequence[Pair], streams: StreamFormat) -> None:
    """Write `path` (JSON Lines) and the shards beside it; the file appears whole, replacing one of that name.

    Shards are named by their content and written first, so that an older file's shards stay until nothing needs them.

    Raises:
        InputError: a pair that does not fit the format, or an id that occurs twice.
    """
    path = Path(path)
    seen: set[str] = set()
    for pair in pairs:
        if not pair.id or pair.id in seen:
            raise InputError(f"pair id {pair.id!r} is empty or used twice: ids must be unique")
        seen.add(pair.id)
        try:
            check_pair(pair, streams)
        except InputError as error:
            raise InputError(f"pair '{pair.id}': {error}") from error
    folder = shard_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, kept = [], set()
    for first in range(0, len(pairs), SHARD_PAIRS):
        part = pairs[first : first + SHARD_PAIRS]
        tensors = {f"{p.id}/{n}": getattr(p, n).to(torch.int32).contiguous() for p in part for n in _PARTS}
        data = save(tensors)
        shard = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        kept.add(shard)
        with replacing(shard) as temporary:
            temporary.write_bytes(data)
        lines += [_line(pair, f"{folder.name}/{shard.name}", streams) for pair in part]
    write_text(path, "".join(lines))
    for old in set(folder.glob("*.safetensors")) - kept:
        old.unlink()


def shard_folder(path: Path) -> Path:
    """Where the tokens of a file of pairs lie: `pairs.shards` for `pairs.jsonl`."""
    return path.with_name(f"{path.stem}.shards")


def _line(pair: Pair, shard: str, streams: StreamFormat) -> str:
    row = {
        "id": pair.id,
        "kind": pair.kind,
        "split": pair.split,
        "shard": shard,
        "frames": [getattr(pair, part).shape[1] for part in _PARTS],
        "chosen_span": list(pair.chosen_span),
        "rejected_span": list(pair.rejected_span),
        "streams": asdict(streams),
        "provenance": pair.provenance,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_pairs(path: Path, streams: StreamFormat | None = None) -> list[Pair]:
    """All pairs of a file, in its order, each checked.

    Args:
        path: the JSON Lines file; its shards are found relative to its folder.
        streams: the format of the model that will read them (`stream_format(bundle)`); None takes each pair's own.

    Raises:
        InputError: the file is missing or empty, one of its lines or shards is wrong (with the line's number), or a
            pair is of another tokenizer or codec.
    """
    path = Path(path)
    shards: dict[Path, Callable[[str], torch.Tensor]] = {}
    return read_json_lines(
        path,
        "list of pairs",
        "make them with rlhf-duplex pairs",
        lambda row: _parse(row, path.parent, streams, shards),
    )


def _parse(
    row: Any, folder: Path, streams: StreamFormat | None, shards: dict[Path, Callable[[str], torch.Tensor]]
) -> Pair:
    if not isinstance(row, dict):
        raise InputError(f"a pair must be a JSON object, found {type(row).__name__}")
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
        raise InputError(f"missing {', '.join(f'`{key}`' for key in missing)}")
    unknown = sorted(set(row) - set(_REQUIRED))
    if unknown:
        raise InputError(f"unknown key `{unknown[0]}`: the keys are {', '.join(_REQUIRED)}")
    for key in ("id", "kind", "split", "shard"):
        if not isinstance(row[key], str) or not row[key]:
            raise InputError(f"`{key}` must be a non-empty string, found {row[key]!r}")
    for key, count in (("frames", 3), ("chosen_span", 2), ("rejected_span", 2)):
        value = row[key]
        if not (isinstance(value, list) and len(value) == count and all(type(v) is int and v >= 0 for v in value)):
            raise InputError(f"`{key}` must be {count} whole numbers of at least 0, found {value!r}")
    if not isinstance(row["provenance"], dict):
        raise InputError(f"`provenance` must be an object, found {row['provenance']!r}")
    found = _parse_format(row["streams"])
    if streams is not None:
        _check_format(found, streams)
    parts: dict[str, torch.Tensor] = {}
    for part, frames in zip(_PARTS, row["frames"], strict=True):
        tokens = _tensor(folder / row["shard"], f"{row['id']}/{part}", shards)
        if tokens.shape != (found.streams, frames):
            raise InputError(
                f"`{part}` in {row['shard']} has shape {tuple(tokens.shape)}, ({found.streams}, {frames}) is announced"
            )
        if tokens.is_floating_point() or tokens.is_complex():
            raise InputError(f"`{part}` in {row['shard']} must be of whole numbers, found {tokens.dtype}")
        parts[part] = tokens.long()
    pair = Pair(
        id=row["id"],
        kind=row["kind"],
        split=row["split"],
        chosen_span=(row["chosen_span"][0], row["chosen_span"][1]),
        rejected_span=(row["rejected_span"][0], row["rejected_span"][1]),
        provenance=row["provenance"],
        **parts,
    )
    check_pair(pair, found)
    return pair


def _parse_format(value: Any) -> StreamFormat:
    names = {name: int if "str" not in str(kind) else str for name, kind in StreamFormat.__annotations__.items()}
    if not isinstance(value, dict) or set(value) != set(names):
        raise InputError(f"`streams` must be an object of {', '.join(names)}, found {value!r}")
    for name, kind in names.items():
        if type(value[name]) is not kind:
            raise InputError(f"`streams.{name}` must be of type {kind.__name__}, found {value[name]!r}")
    return StreamFormat(**value)


def _check_format(found: StreamFormat, wanted: StreamFormat) -> None:
    for name, value in asdict(found).items():
        mine = getattr(wanted, name)
        if value != mine:
            raise InputError(
                f"the pair is of another model: its {name} is {value}, the checkpoint's is {mine}. "
                "Make the pairs anew with this checkpoint"
            )


def _tensor(path: Path, name: str, shards: dict[Path, Callable[[str], torch.Tensor]]) -> torch.Tensor:
    try:
        if path not in shards:
            shards[path] = safe_open(str(path), framework="pt").get_tensor
        return shards[path](name)
    except (OSError, SafetensorError, UnicodeError) as error:  # the last: an id with half of a character
        raise InputError(f"tokens {name!a} cannot be read from {path} ({' '.join(str(error).split())})") from error
