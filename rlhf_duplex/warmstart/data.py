"""Pairs as batches of tensors, in the layout that TRL's `DPOTrainer` expects: chosen rows first, then rejected.

Shapes: `P` pairs of a batch, `K` streams of a frame, `T` frames, `S` streams that the loss is about, `N = S T` targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_duplex.data.pair import KINDS, Pair

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class StreamIds:
    """What the collator must know of a model.

    Attributes:
        targets: rows of a frame that the loss is about, the text stream first.
        padding: text tokens that stand for no word (PAD and EPAD).
        missing: token of a code that never came to be.
    """

    targets: tuple[int, ...]
    padding: tuple[int, ...]
    missing: int = -1


class PairCollator:
    """Makes a batch of examples `(pair, reference log-probabilities of chosen and rejected or None)`.

    The batch has
        codes `(2P, K, T)`: context and reply, -1 behind the end;
        loss_mask `(2P, N)` bool: targets whose log-probability is in the sum;
        reply_mask `(2P, T)` bool: frames of the reply;
        input_ids `(2P, 1 + N)`: the targets behind one column that no loss sees (TRL predicts token n + 1 at n; Moshi's
            logits stand at the token that they predict);
        completion_mask `(2P, 1 + N)`: targets that count in |y|;
        attention_mask `(2P, 1 + N)`: targets that exist;
        kinds `(P,)`: index in `KINDS`;
        ref_chosen_logps, ref_rejected_logps `(P,)`, where the examples have them.

    Args:
        ids: of the model.
        span: `pair` or `reply`, see `LossConfig`.
        count_pad: see `LossConfig`.
    """

    def __init__(self, ids: StreamIds, span: str = "pair", count_pad: bool = True) -> None:
        self.ids, self.span, self.count_pad = ids, span, count_pad

    def __call__(self, examples: Sequence[tuple[Pair, tuple[float, float] | None]]) -> dict[str, torch.Tensor]:
        pairs = [pair for pair, _ in examples]
        rows = [(pair, side) for side in SIDES for pair in pairs]
        frames = max(pair.context.shape[1] + getattr(pair, side).shape[1] for pair, side in rows)
        streams = pairs[0].context.shape[0]
        codes = torch.full((len(rows), streams, frames), self.ids.missing)
        span = torch.zeros(len(rows), 1, frames, dtype=torch.bool)
        replies = torch.zeros(len(rows), frames, dtype=torch.bool)
        for row, (pair, side) in enumerate(rows):
            reply, before = getattr(pair, side), pair.context.shape[1]
            codes[row, :, : before + reply.shape[1]] = torch.cat([pair.context, reply], dim=1)
            start, end = getattr(pair, f"{side}_span") if self.span == "pair" else (0, reply.shape[1])
            span[row, 0, before + start : before + end] = True
            replies[row, before : before + reply.shape[1]] = True
        targets = codes[:, list(self.ids.targets)]
        exists = targets != self.ids.missing
        mask = exists & span
        counted = mask.clone()
        if not self.count_pad:
            for token in self.ids.padding:
                counted[:, 0] &= targets[:, 0] != token
        batch = {
            "codes": codes,
            "loss_mask": mask.flatten(1),
            "reply_mask": replies,
            "input_ids": _behind_a_column(targets.clamp(min=0)),
            "completion_mask": _behind_a_column(counted.long()),
            "attention_mask": _behind_a_column(exists.long()),
            "kinds": torch.tensor([KINDS.index(pair.kind) for pair in pairs]),
        }
        references = [reference for _, reference in examples if reference is not None]
        if references:
            batch["ref_chosen_logps"] = torch.tensor([chosen for chosen, _ in references])
            batch["ref_rejected_logps"] = torch.tensor([rejected for _, rejected in references])
        return batch


def _behind_a_column(values: torch.Tensor) -> torch.Tensor:
    flat = values.flatten(1)
    return torch.cat([torch.zeros_like(flat[:, :1]), flat], dim=1)
