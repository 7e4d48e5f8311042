"""One frame of B dialogues with an `LMModel`'s own modules, without its streaming machinery.

Moshi's streaming modules serve rows that advance independently: ring buffers, execution masks, and an attention mask
made anew in every layer of every frame. In a rollout all dialogues stand at the same frame. So the caches here are
plain tensors as long as the longest episode, attention reads what has been written and needs no mask, the rotations of
all positions are computed once, all embeddings of a frame are summed in one operation, and dialogues that have ended
cost nothing. The weights are the model's, at every call; tokens are those of stock `LMGen` (tested).

Shapes: `B` dialogues, `n` of them going on (the first rows), `T` frames, `D` width, `H` heads, `d` width of a head.
"""

import math
from collections.abc import Callable

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import ScaledEmbedding
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import (
    RMSNorm,
    StreamingTransformer,
    StreamingTransformerLayer,
    create_sin_embedding,
    expand_repeated_kv,
)
from torch import nn
from torch.nn import functional

from envs.errors import InputError


class FrameStep:
    """The caches of B dialogues and what is the same in all their frames.

    Args:
        lm: Moshi's language model; its weights must stay as they are while this lives.
        batch: B.
        frames: T, of the longest dialogue.

    Raises:
        InputError: a model with cross attention, which is not supported.
    """

    def __init__(self, lm: LMModel, batch: int, frames: int) -> None:
        self.lm = lm
        self.temporal = _Cached(lm.transformer, batch, frames)
        self.depth = _Cached(lm.depformer, batch, lm.dep_q)
        self._embed = _summed_embedding([*lm.emb, lm.text_emb])
        self._norm = _norm(lm.out_norm)
        self._depth_embed = [_summed_embedding([table]) for table in (lm.depformer_text_emb, *lm.depformer_emb)]
        schedule = lm.depformer_weights_per_step_schedule or list(range(lm.dep_q))
        self._depth_in = [index if lm.depformer_multi_linear else 0 for index in schedule]
        self._depth_norms = [_norm(norm) for norm in lm.depformer_norms]

    def text(self, tokens: torch.Tensor, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(K, n)` of a frame, text first, to hidden states `(n, D)` and text logits `(n, V)`."""
        # Audio first, then text: the order in which Moshi adds them up.
        hidden = self._norm(self.temporal(self._embed(tokens.roll(-1, 0).t()), frame))
        return hidden, self.lm.text_linear(hidden)

    def project(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states `(n, D)` as the depth transformer takes them, for each of its steps (shared where equal)."""
        projected = {index: self.lm.depformer_in[index](hidden) for index in dict.fromkeys(self._depth_in)}
        return [projected[index] for index in self._depth_in]

    def audio(self, step: int, previous: torch.Tensor, projected: list[torch.Tensor]) -> torch.Tensor:
        """Logits `(n, card)` of a codebook, from the token before it `(n,)` and `project`'s result."""
        inputs = projected[step] + self._depth_embed[step](previous[:, None])
        return self.lm.linears[step](self._depth_norms[step](self.depth(inputs, step)))


class _Cached:
    """A causal `StreamingTransformer` with keys and values of all positions so far."""

    def __init__(self, transformer: StreamingTransformer, batch: int, positions: int) -> None:
        self._transformer = transformer
        self._layers = [_Layer(layer, batch, positions) for layer in transformer.layers]
        kind = transformer.positional_embedding
        weight = next(transformer.parameters())
        attention = transformer.layers[0].self_attn
        self._rotation = self._sine = None
        if kind in ("rope", "sin_rope", "rope_concat"):
            width = attention.embed_dim // attention.num_heads
            self._rotation = _Rotation(positions, width, transformer.max_period, kind != "rope_concat", weight.device)
        if kind in ("sin", "sin_rope"):
            steps = torch.arange(positions, device=weight.device).view(1, -1, 1)
            table = create_sin_embedding(steps, attention.embed_dim, transformer.max_period, weight.dtype)[0]
            self._sine = transformer.positional_scale * table

    def __call__(self, inputs: torch.Tensor, position: int) -> torch.Tensor:
        """Inputs `(n, D)` at a position to outputs `(n, D)`."""
        signal = inputs if self._sine is None else inputs + self._sine[position]
        for layer in self._layers:
            signal = layer(signal, position, self._rotation)
        return signal.to(inputs.dtype)


class _Layer:
    """A `StreamingTransformerLayer`, one position at a time."""

    def __init__(self, layer: StreamingTransformerLayer, batch: int, positions: int) -> None:
        if layer.cross_attention is not None or layer.skip_self_attn:
            raise InputError("a model with cross attention, or without self attention, cannot act (no Moshi is one)")
        attention = layer.self_attn
        self._heads, self._repeat = attention.num_heads, attention.kv_repeat
        self._context = attention.context or positions
        self._norm1, self._norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self._scale1, self._scale2 = _scale(layer.layer_scale_1), _scale(layer.layer_scale_2)
        steps = layer.weights_per_step
        schedule = layer.weights_per_step_schedule or list(range(steps))
        self._index = schedule if steps else [0] * positions
        self._in, self._out = list(attention.in_projs), list(attention.out_projs)
        if steps and len(self._in) == 1:  # as `apply_weights_per_step`: one set of weights is for all steps
            self._index = [0] * positions
        gates = layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]
        self._feed = [_feed_forward(layer, gate) for gate in gates]
        weight = next(layer.parameters())
        width = attention.embed_dim // self._heads
        shape = (2, batch, self._heads // self._repeat, positions, width)
        self._cache = torch.zeros(shape, device=weight.device, dtype=weight.dtype)

    def __call__(self, signal: torch.Tensor, position: int, rotation: "_Rotation | None") -> torch.Tensor:
        index = self._index[position]
        signal = signal + self._scale1(self._attend(self._norm1(signal), position, index, rotation))
        return signal + self._scale2(self._feed[index](self._norm2(signal)))

    def _attend(self, signal: torch.Tensor, position: int, index: int, rotation: "_Rotation | None") -> torch.Tensor:
        rows, heads, kept = len(signal), self._heads, self._heads // self._repeat
        projected = self._in[index](signal).view(rows, heads + 2 * kept, -1)
        turned = projected[:, : heads + kept]  # queries and keys
        if rotation is not None:
            turned = rotation(turned, position)
        cache = self._cache[:, :rows]
        cache[0, :, :, position] = turned[:, heads:]
        cache[1, :, :, position] = projected[:, heads + kept :]
        keys, values = cache[:, :, :, max(0, position + 1 - self._context) : position + 1]
        if self._repeat > 1:
            keys, values = expand_repeated_kv(keys, self._repeat), expand_repeated_kv(values, self._repeat)
        seen = functional.scaled_dot_product_attention(turned[:, :heads, None], keys, values)
        return self._out[index](seen.reshape(rows, -1))


class _Rotation:
    """Rotary position embedding with the angles of all positions at hand (arXiv 2104.09864; `moshi.modules.rope`)."""

    def __init__(self, positions: int, width: int, max_period: float, interleave: bool, device: torch.device) -> None:
        half = torch.arange(width // 2, device=device, dtype=torch.float32)
        frequencies = torch.exp(half * (-math.log(max_period) * 2 / width))
        angles = frequencies * torch.arange(positions, device=device, dtype=torch.float32)[:, None]
        self._table = torch.complex(torch.cos(angles), torch.sin(angles))  # (positions, width / 2)
        self._interleave = interleave

    def __call__(self, vectors: torch.Tensor, position: int) -> torch.Tensor:
        """Vectors `(n, H, d)`, turned."""
        pairs = vectors.float().unflatten(-1, (-1, 2) if self._interleave else (2, -1))
        if not self._interleave:
            pairs = pairs.transpose(-1, -2).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * self._table[position])
        if not self._interleave:
            turned = turned.transpose(-1, -2)
        return turned.flatten(-2).to(vectors.dtype)


def _norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm of Moshi's over `(n, D)`; its RMS norm takes three dimensions only."""
    if not isinstance(module, RMSNorm):
        return module
    alpha, eps, dtype = module.alpha[0, 0], module.eps, module.dtype

    def apply(signal: torch.Tensor) -> torch.Tensor:
        wide = signal if dtype is None else signal.to(dtype)
        variance = wide.square().mean(dim=-1, keepdim=True).add_(eps)
        return (wide * (alpha.to(variance) * torch.rsqrt(variance))).to(signal.dtype)

    return apply


def _scale(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return (lambda update: update) if isinstance(module, nn.Identity) else module


def _feed_forward(layer: StreamingTransformerLayer, gate: nn.Module | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if gate is None:
        first, second, activation = layer.linear1, layer.linear2, layer.activation
        return lambda signal: second(activation(first(signal)))
    if not isinstance(gate, ActivationGating):
        raise InputError(f"a feed-forward layer of the kind {type(gate).__name__} cannot act (no Moshi has one)")

    def apply(signal: torch.Tensor) -> torch.Tensor:
        opened, passed = gate.linear_in(signal).chunk(2, dim=-1)
        return gate.linear_out(gate.activation(opened) * passed)

    return apply


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
