"""The whole recipe: speech, codec, tokenizer, language model, bundle and recordings, each stage from the one before.

python -m experiments.nano [--stage speech codec ...] [--work DIR] [--bundle DIR] [--data DIR]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from moshi.models.compression import MimiModel

from . import bank, codec, language_model, release, tokenizer, voices
from .dialogues import NOISE_LEVELS, AgentVoice, Spoken, Track, agent_voice, speak, user_track

KINDS = ("turn", "pause", "long", "interrupt")
TRAIN_UTTERANCES = 350  # of each kind
HELD_OUT_UTTERANCES = {"turn": 140, "pause": 70, "long": 70, "interrupt": 70}
SEGMENTS = (26, 50)  # an axis, in the shipped train and held-out parts
PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_duplex"


def make_speech(work: Path) -> None:
    """Synthesise the user utterances of both parts and everything the agent says."""
    voices.check_tools()
    jobs = [(kind, False, k * 100_000 + i) for k, kind in enumerate(KINDS) for i in range(TRAIN_UTTERANCES)]
    jobs += [(kind, True, k * 100_000 + i) for k, kind in enumerate(KINDS) for i in range(HELD_OUT_UTTERANCES[kind])]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        spoken = pool.map(_speak, jobs, chunksize=20)
    split = TRAIN_UTTERANCES * len(KINDS)
    bank.save(work / "speech.npz", bank.Bank(spoken[:split], spoken[split:], agent_voice()))


def make_codec(work: Path) -> None:
    """Train Mimi on single pieces of the training utterances and on the agent."""
    train, _, agent = _speech(work)
    pieces = [audio for spoken in train for audio in spoken.audio]
    lines = [audio for renditions in agent.audio.values() for audio in renditions]
    codec.train(pieces + lines * 3, work / "codec.safetensors")


def make_tokenizer(work: Path) -> None:
    """Train the text tokenizer."""
    tokenizer.train(work / "tokenizer.model")


def encoded_users(
    train: list[Spoken], mimi: MimiModel, every: int = 1
) -> tuple[list[language_model.UserCodes], language_model.Room]:
    """The codes of the training tracks (of each `every`-th), of users who say nothing, and of the room."""
    users = language_model.encode_users(mimi, _tracks(train)[::every])
    for user in users:
        user.track.audio = user.track.audio[:0]
    for i in range(len(users) // 20):  # a user who says nothing
        nothing = Track("silent", np.zeros(0, np.float32))
        empty = np.zeros((codec.CODEBOOKS, 0), np.int16)
        users.append(language_model.UserCodes(nothing, empty, bool(i % 2), i % len(NOISE_LEVELS)))
    return users, language_model.encode_room(mimi)


def make_language_model(work: Path, begin: int) -> None:
    """Encode the training tracks once and train the LM on them, from its stage `begin` on."""
    train, _, agent = _speech(work)
    mimi = codec.load(work / "codec.safetensors")
    users, room = encoded_users(train, mimi)
    codes = language_model.encode_agent(mimi, agent)
    pieces = tokenizer.load(work / "tokenizer.model")
    words = {word for text in agent.audio for word, _, _ in voices.word_times(text, 0.0, 1.0)}
    word_ids = {word: pieces.encode(word)[0] for word in sorted(words)}
    language_model.train(users, room, agent, codes, word_ids, work / "lm.safetensors", begin=begin)


def make_bundle(work: Path, bundle: Path) -> None:
    """Write the bundle folder."""
    card = Path(__file__).with_name("MODEL_CARD.md").read_text()
    names = (work / "lm.safetensors", work / "codec.safetensors", work / "tokenizer.model")
    release.write_bundle(bundle, *names, card)


def make_data(work: Path, data: Path) -> None:
    """Write the shipped recordings."""
    train, held_out, agent = _speech(work)
    release.write_data(data, train, held_out, agent, SEGMENTS)


def main() -> None:
    stages = ("speech", "codec", "tokenizer", "lm", "bundle", "data")
    parser = argparse.ArgumentParser(prog="python -m experiments.nano", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=stages, default=stages, help="default: all, in order")
    parser.add_argument("--work", type=Path, default=Path("runs/nano_recipe"), help="the stages' results")
    parser.add_argument("--bundle", type=Path, default=PACKAGE / "nano")
    parser.add_argument("--data", type=Path, default=PACKAGE / "nano_data")
    parser.add_argument("--lm-stage", type=int, default=1, help="of the LM's training, to begin with")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    # Moshi compiles small functions when first called: on a CPU that takes longer than it saves here.
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
    actions = {
        "speech": lambda: make_speech(work),
        "codec": lambda: make_codec(work),
        "tokenizer": lambda: make_tokenizer(work),
        "lm": lambda: make_language_model(work, arguments.lm_stage),
        "bundle": lambda: make_bundle(work, arguments.bundle),
        "data": lambda: make_data(work, arguments.data),
    }
    for stage in arguments.stage:
        began = time.time()
        actions[stage]()
        print(f"{stage}: {time.time() - began:.0f} s", flush=True)


def _speak(job: tuple[str, bool, int]) -> Spoken:
    kind, held_out, number = job
    cast = voices.HELD_OUT_USERS if held_out else voices.TRAIN_USERS
    return speak(kind, cast[number % len(cast)], held_out, number + (10_000_000 if held_out else 0))


def _speech(work: Path) -> tuple[list[Spoken], list[Spoken], AgentVoice]:
    made = bank.load(work / "speech.npz")
    return made.train, made.held_out, made.agent


def _tracks(train: list[Spoken], seed: int = 5) -> list[tuple[Track, bool, int]]:
    """One track of every utterance: the track, whether digital silence leads in, and its noise level."""
    rng = np.random.default_rng(seed)
    turns = [spoken for spoken in train if spoken.kind == "turn"]
    out = []
    for spoken in train:
        utterances = [spoken]
        if spoken.kind == "interrupt":
            same = sorted((turn for turn in turns if turn.voice == spoken.voice), key=lambda turn: turn.seconds)
            same = same[: len(same) // 2 + 1]  # the short ones, as in the recordings
            utterances.insert(0, same[int(rng.integers(len(same)))])
        quiet, level = bool(rng.random() < 0.6), int(rng.integers(len(NOISE_LEVELS)))
        lead = 1.0 + rng.uniform(0, 0.16)
        track = user_track(spoken.kind, utterances, lead, 0.25, NOISE_LEVELS[level], rng, quiet)
        out.append((track, quiet, level))
    return out
