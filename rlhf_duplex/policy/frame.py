"""One frame of B dialogues with an `LMModel`'s own modules: temporal step, then the depth transformer's steps.

Dialogues that have ended cost nothing, all embeddings of a frame are summed in one operation, and the rest is as in
`rlhf_duplex.policy.transformer`. Tokens are those of stock `LMGen` (tested).

Shapes: `B` dialogues, `n` of them going on (the first rows), `K` streams, `T` frames, `D` width, `V` text vocabulary.
"""

from collections.abc import Callable

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import ScaledEmbedding
from torch.nn import functional

from rlhf_duplex.policy.transformer import PlainTransformer, plain_norm


class FrameStep:
    """The caches of B dialogues and what is the same in all their frames.

    Args:
        lm: Moshi's language model; its weights must stay as they are while this lives.
        batch: B.
        frames: T, of the longest dialogue.

    Raises:
        InputError: a model with layers that are not supported.
    """

    def __init__(self, lm: LMModel, batch: int, frames: int) -> None:
        self.lm = lm
        self.temporal = PlainTransformer(lm.transformer, frames, batch)
        self.depth = PlainTransformer(lm.depformer, lm.dep_q, batch)
        self._embed = _summed_embedding([*lm.emb, lm.text_emb])
        self._norm = plain_norm(lm.out_norm)
        self._depth_embed = [_summed_embedding([table]) for table in (lm.depformer_text_emb, *lm.depformer_emb)]
        schedule = lm.depformer_weights_per_step_schedule or list(range(lm.dep_q))
        self._depth_in = [index if lm.depformer_multi_linear else 0 for index in schedule]
        self._depth_norms = [plain_norm(norm) for norm in lm.depformer_norms]

    def prefill(self, tokens: torch.Tensor) -> None:
        """Put tokens `(K, T, n)` of the first T frames, text first, into the temporal transformer's cache.

        n is B, or 1 where all dialogues begin with the same.
        """
        embedded = self._embed(tokens.roll(-1, 0).flatten(1).t()).unflatten(0, tokens.shape[1:])
        self.temporal.prefill(embedded.transpose(0, 1))

    def text(self, tokens: torch.Tensor, frame: int | torch.Tensor, seen: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(K, n)` of a frame, text first, to hidden states `(n, D)` and text logits `(n, V)`.

        `frame` and `seen` as in `PlainTransformer.step`.
        """
        # Audio first, then text: the order in which Moshi adds them up.
        hidden = self._norm(self.temporal.step(self._embed(tokens.roll(-1, 0).t()), frame, seen))
        return hidden, self.lm.text_linear(hidden)

    def project(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states `(n, D)` as the depth transformer takes them, for each of its steps (shared where equal)."""
        projected = {index: self.lm.depformer_in[index](hidden) for index in dict.fromkeys(self._depth_in)}
        return [projected[index] for index in self._depth_in]

    def audio(self, step: int, previous: torch.Tensor, projected: list[torch.Tensor]) -> torch.Tensor:
        """Logits `(n, card)` of a codebook, from the token before it `(n,)` and `project`'s result."""
        inputs = projected[step] + self._depth_embed[step](previous[:, None])
        return self.lm.linears[step](self._depth_norms[step](self.depth.step(inputs, step)))


def _summed_embedding(tables: list[ScaledEmbedding]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Tokens `(n, K)`, none of them missing, to the sum of their K embeddings `(n, D)`."""
    if any(t.norm is not None or t.low_rank is not None or t.demux_second_stream for t in tables):
        return lambda tokens: sum(table(column) for table, column in zip(tables, tokens.t(), strict=True))
    if len(tables) == 1:
        weight = tables[0].weight
        return lambda tokens: functional.embedding(tokens[:, 0], weight)
    joined = torch.cat([table.weight for table in tables])
    sizes = torch.tensor([0, *(len(table.weight) for table in tables[:-1])], device=joined.device)
    starts = sizes.cumsum(0)
    return lambda tokens: functional.embedding_bag(tokens + starts, joined, mode="sum")
