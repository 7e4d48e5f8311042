"""The text tokenizer: SentencePiece with Moshi's special ids (EPAD 0, PAD 3), a piece for every word the agent says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import sentencepiece

from . import sentences
from .voices import word_times

PIECES = 480
PAD = 3
EPAD = 0


def train(path: Path, seed: int = 0) -> None:
    """Write a tokenizer to `path`, trained on the closed set and on a sample of user sentences."""
    rng = np.random.default_rng(seed)
    lines = (*sentences.REPLIES, *sentences.BACKCHANNELS)
    agent = [word for text in lines for word, _, _ in word_times(text, 0.0, 1.0)]
    user = [
        word
        for kind in ("turn", "pause", "long", "interrupt") * 100
        for piece in sentences.user_sentence(kind, rng, False)
        for word, _, _ in word_times(piece.text, 0.0, 1.0)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Words on their own lines, the agent's many times over: each then becomes a piece of its own.
        sentence_iterator=iter(agent * 200 + user), model_writer=model, vocab_size=PIECES, model_type="bpe",
        unk_id=EPAD, bos_id=1, eos_id=2, pad_id=PAD, character_coverage=1.0, split_by_unicode_script=False,
        normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    tokenizer = load(path)
    split = [word for word in set(agent) if len(tokenizer.encode(word)) != 1]
    if split:
        raise RuntimeError(f"agent words without a piece of their own: {sorted(split)}")


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(path))
