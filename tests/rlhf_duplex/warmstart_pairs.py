"""Pairs of random tokens, and a trainer on them, for the tests of the warm start."""

import tempfile

import torch

from rlhf_duplex.data.pair import Pair
from rlhf_duplex.warmstart.config import load_warmstart_config
from rlhf_duplex.warmstart.run import warmstart
from rlhf_duplex.warmstart.trainer import PairDataset, PreferenceTrainer

KINDS = ("interruption", "pause_handling", "turn_taking")


def make_pairs(lm, count=8, seed=0):
    """Pairs of random tokens: 3 frames of context, replies of 8 and 6 frames, every fourth held out."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(frames):
        text = torch.randint(0, 300, (1, frames), generator=generator)
        text[:, ::2] = lm.text_padding_token_id
        return torch.cat([text, torch.randint(0, lm.card, (lm.n_q, frames), generator=generator)])

    return [
        Pair(
            f"p{i}", KINDS[i % 3], "heldout" if i % 4 == 3 else "train", tokens(3), tokens(8), tokens(6), (1, 8), (2, 6)
        )
        for i in range(count)
    ]


def config_of(**keys):
    return load_warmstart_config(None, [f"{k.replace('__', '.')}={v}" for k, v in keys.items()])


def trainer_of(bundle, pairs, references=None, run_dir=None, **keys):
    config = config_of(training__microbatch=2, training__batch_size=2, **keys)
    return PreferenceTrainer(bundle, config, PairDataset(pairs, references), None, run_dir or tempfile.mkdtemp())


def run(folder, **keys):
    """A warm start of three steps in `folder / run` on `folder / pairs.jsonl`, without axes."""
    defaults = {
        "pairs": folder / "pairs.jsonl",
        "run_dir": folder / "run",
        "training__batch_size": 2,
        "training__microbatch": 1,
        "evaluation__segments": "null",
        "evaluation__every": 1,
        "checkpointing__every": 1,
        "checkpointing__keep": 9,
        "optimiser__warmup_steps": 0,
    }
    return warmstart(config_of(**(defaults | keys)))
