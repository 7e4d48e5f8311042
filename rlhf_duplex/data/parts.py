"""What is done so far: one file for each dialogue or segment that is finished, so that a run that was stopped goes on.

The files lie in a folder named by everything that decides the pairs, so that pairs made in another way are never mixed
in. A finished run removes it.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from envs.files import replacing
from rlhf_duplex.data.pair import Pair

_PARTS = ("context", "chosen", "rejected")


@dataclass(frozen=True)
class Part:
    """What became of one dialogue or segment.

    Attributes:
        pairs: may be none.
        counts: what was seen and what was dropped and why, by name.
        error: why the recording could not be read, if so.
    """

    pairs: tuple[Pair, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    error: str = ""


def facts_fingerprint(facts: Mapping[str, Any]) -> str:
    """A short name of whatever JSON values decide the result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_state(*paths: Path) -> list[Any]:
    """Name, size and time of change of files: what tells that one was replaced."""
    state: list[Any] = []
    for path in paths:
        stat = path.stat() if path.is_file() else None
        state.append([str(path.resolve()), stat and stat.st_size, stat and stat.st_mtime_ns])
    return state


class PartStore:
    """Parts on disk, by key.

    Args:
        out: the file of pairs that they will become; the folder is `NAME.parts/FINGERPRINT` beside it.
        facts: see `facts_fingerprint`.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        self.folder = out.with_name(f"{out.stem}.parts") / facts_fingerprint(facts)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def read(self, key: str) -> Part | None:
        """The part of that key, or None where there is none that is whole."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                record = json.loads(file.metadata()["part"])
                pairs = [
                    Pair(
                        **row
                        | {name: file.get_tensor(f"{index}/{name}").long() for name in _PARTS}
                        | {name: tuple(row[name]) for name in ("chosen_span", "rejected_span")}
                    )
                    for index, row in enumerate(record["pairs"])
                ]
            return Part(tuple(pairs), Counter(record["counts"]), record["error"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None  # half-written by a power cut: made again

    def write(self, key: str, part: Part) -> None:
        """Keep a part, whole or not at all."""
        rows = [{name: value for name, value in vars(pair).items() if name not in _PARTS} for pair in part.pairs]
        record = json.dumps({"pairs": rows, "counts": part.counts, "error": part.error})
        tensors = {
            f"{index}/{name}": getattr(pair, name).to(torch.int32).contiguous()
            for index, pair in enumerate(part.pairs)
            for name in _PARTS
        }
        with replacing(self._path(key)) as temporary:
            temporary.write_bytes(save(tensors, metadata={"part": record}))

    def remove(self) -> None:
        """Forget everything of this folder, and the folder above if nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def assemble(
    parts: Sequence[tuple[str, Part]], dialogues: Sequence[str], heldout: float, balance: bool, seed: int
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of a run, in corpus order: no problem twice, split by dialogue, kinds balanced if wanted.

    Args:
        parts: with the dialogue that each is of.
        dialogues: all that the corpus has, done or not: a dialogue's side does not depend on how far a run has come.
        heldout: share of the dialogues (at least one where there are two or more and the share is not 0).
        balance: cut every kind, within each side, to as many pairs as the rarest that occurs there.
        seed: of the choices.

    Returns:
        The pairs, and how many were dropped as duplicates or for the balance.
    """
    held = held_out(dialogues, heldout, seed)
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    pairs: list[Pair] = []
    for dialogue, part in parts:
        for pair in part.pairs:
            key = _content(pair)
            if key in seen:
                counts["duplicate"] += 1
                continue
            seen.add(key)
            pairs.append(replace(pair, split="heldout" if dialogue in held else "train"))
    if not balance:
        return pairs, counts
    kept: set[str] = set()
    for split in ("train", "heldout"):
        by_kind: dict[str, list[Pair]] = {}
        for pair in pairs:
            if pair.split == split:
                by_kind.setdefault(pair.kind, []).append(pair)
        least = min(map(len, by_kind.values()), default=0)
        for members in by_kind.values():
            kept.update(p.id for p in sorted(members, key=lambda p: _order(p.id, seed))[:least])
    counts["cut for balance"] += len(pairs) - len(kept)
    return [pair for pair in pairs if pair.id in kept], +counts


def held_out(dialogues: Sequence[str], share: float, seed: int) -> set[str]:
    """The dialogues of the held-out side: the first by a hash of seed and name, so many as the share says."""
    names = sorted(set(dialogues), key=lambda name: _order(name, seed))
    count = round(share * len(names))
    if share > 0 and len(names) > 1:
        count = min(max(count, 1), len(names) - 1)
    return set(names[:count])


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _content(pair: Pair) -> bytes:
    """What makes two pairs one: the same problem in the same dialogue (kind, context and rejected)."""
    # A drawn reply differs from one copy of a recording to the next, and with it the frame at which the two part.
    tokens = torch.cat([pair.context, pair.rejected], dim=1).to(torch.int32).contiguous()
    return hashlib.sha256(f"{pair.kind} {tuple(tokens.shape)}".encode() + tokens.numpy().tobytes()).digest()
