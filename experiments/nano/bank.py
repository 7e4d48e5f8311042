"""Everything that was synthesised, in one file: samples as int16, the rest as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from envs.files import replacing

from .dialogues import AgentVoice, Spoken
from .sentences import Piece
from .voices import Voice


@dataclass
class Bank:
    """User utterances for training, user utterances held out, and the agent's lines."""

    train: list[Spoken]
    held_out: list[Spoken]
    agent: AgentVoice


def save(path: Path, bank: Bank) -> None:
    """Write a bank, through a temporary name."""
    audio: list[np.ndarray] = []

    def users(spoken: list[Spoken]) -> list[dict]:
        rows = []
        for one in spoken:
            audio.extend(one.audio)
            rows.append({"kind": one.kind, "voice": asdict(one.voice), "pieces": [asdict(p) for p in one.pieces]})
        return rows

    described = {"train": users(bank.train), "held_out": users(bank.held_out), "agent": {}}
    for text, renditions in bank.agent.audio.items():
        audio.extend(renditions)
        described["agent"][text] = len(renditions)
    samples = np.clip(np.concatenate(audio) * 32767, -32768, 32767).round().astype(np.int16)
    lengths = np.array([len(part) for part in audio])
    with replacing(path) as temporary, temporary.open("wb") as file:  # to a name, NumPy would add a suffix
        np.savez(file, samples=samples, lengths=lengths, described=np.array(json.dumps(described)))


def load(path: Path) -> Bank:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as data:
        samples = data["samples"].astype(np.float32) / 32767
        parts = iter(np.split(samples, np.cumsum(data["lengths"])[:-1]))
        described = json.loads(str(data["described"]))

    def users(rows: list[dict]) -> list[Spoken]:
        out = []
        for row in rows:
            pieces = tuple(Piece(**piece) for piece in row["pieces"])
            audio = tuple(next(parts) for _ in pieces)
            out.append(Spoken(row["kind"], Voice(**row["voice"]), pieces, audio))
        return out

    train, held_out = users(described["train"]), users(described["held_out"])
    return Bank(
        train, held_out, AgentVoice({text: [next(parts) for _ in range(n)] for text, n in described["agent"].items()})
    )
