"""A causal transformer of Moshi's with its own modules' weights, without the streaming machinery.

Moshi's streaming modules serve rows that advance independently: ring buffers, execution masks, and an attention mask
and rotations made anew in every layer of every call. In a rollout all dialogues stand at the same frame, and in an
update all begin at 0. So the caches are plain tensors as long as the longest episode, attention reads what has been
written and needs no mask, and the rotations of all positions are computed once. Values are those of Moshi's modules
(tested: to the bit for whole sequences). A CUDA graph needs shapes that do not change: it is told the position by a
tensor on the device, and attention reads a part of the cache that several positions share, behind a mask.

Shapes: `n` rows, `T` positions, `D` width, `H` heads, `d` width of a head.
"""

import math
from collections.abc import Callable

import torch
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
from torch.utils.checkpoint import checkpoint

from envs.errors import InputError


class PlainTransformer:
    """A `StreamingTransformer`, for one position after another or for whole sequences.

    Args:
        transformer: its weights are read at every call.
        positions: T, at most.
        batch: rows that the caches of `step` are for; 0 where only `whole` is called.

    Raises:
        InputError: a model with cross attention or other layers that Moshi's models do not have.
    """

    def __init__(self, transformer: StreamingTransformer, positions: int, batch: int = 0) -> None:
        self._transformer = transformer
        self._layers = [
            _GatheredLayer(layer, positions) if hasattr(layer, "gathered") else _Layer(layer, positions, batch)
            for layer in transformer.layers
        ]
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

    def step(self, inputs: torch.Tensor, position: int | torch.Tensor, seen: int = 0) -> torch.Tensor:
        """Inputs `(n, D)` at a position to outputs `(n, D)`; all earlier positions of these rows came before.

        Args:
            inputs: of n rows.
            position: a number, or `(1,)` on the device.
            seen: with a tensor: how many positions of the cache are read at most; more than the position.
        """
        signal, mask = inputs, None
        if self._sine is not None:
            signal = signal + self._sine[position]
        if isinstance(position, torch.Tensor):
            behind = position - torch.arange(seen, device=position.device)
            wanted = ((behind >= 0) & (behind < self._layers[0].context))[None, None, None]
            # What is added to the scores: attention would make it of the booleans anew in every layer.
            mask = torch.zeros_like(wanted, dtype=signal.dtype).masked_fill(~wanted, float("-inf"))
        for layer in self._layers:
            signal = layer.step(signal, position, self._rotation, mask)
        return signal.to(inputs.dtype)

    def prefill(self, inputs: torch.Tensor) -> None:
        """Inputs `(n, T, D)` at the first T positions into the caches, so that `step` goes on at T.

        One row for each dialogue, or one that all of them begin with.
        """
        signal = inputs if self._sine is None else inputs + self._sine[: inputs.shape[1]]
        for layer in self._layers:
            signal = layer.whole(signal, self._rotation, keep=True)

    def whole(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs `(n, T, D)` to outputs `(n, T, D)`."""
        signal = inputs if self._sine is None else inputs + self._sine[: inputs.shape[1]]
        for layer in self._layers:
            if self._transformer.checkpointing and torch.is_grad_enabled():
                signal = checkpoint(layer.whole, signal, self._rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                signal = layer.whole(signal, self._rotation)
        return signal.to(inputs.dtype)


class _Layer:
    """A `StreamingTransformerLayer`."""

    def __init__(self, layer: StreamingTransformerLayer, positions: int, batch: int) -> None:
        if layer.cross_attention is not None or layer.skip_self_attn:
            raise InputError("a model with cross attention, or without self attention, is not supported")
        attention = layer.self_attn
        self._heads, self._kept = attention.num_heads, attention.num_heads // attention.kv_repeat
        self.context = attention.context or positions
        self._norm1, self._norm2 = plain_norm(layer.norm1), plain_norm(layer.norm2)
        self._scale1, self._scale2 = _scale(layer.layer_scale_1), _scale(layer.layer_scale_2)
        steps = layer.weights_per_step
        schedule = layer.weights_per_step_schedule or list(range(steps))
        self._in, self._out = list(attention.in_projs), list(attention.out_projs)
        # As in `apply_weights_per_step`: a single set of weights is for all steps.
        self._index = schedule if steps and len(self._in) > 1 else [0] * positions
        gates = layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]
        self._feed = [_feed_forward(layer, gate) for gate in gates]
        weight = next(layer.parameters())
        shape = (2, batch, self._kept, positions, attention.embed_dim // self._heads)
        self._cache = torch.zeros(shape, device=weight.device, dtype=weight.dtype)

    def step(
        self,
        signal: torch.Tensor,
        position: int | torch.Tensor,
        rotation: "_Rotation | None",
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = len(signal)
        index = self._index[position] if isinstance(position, int) else self._index[0]
        queries, keys, values = self._project(self._norm1(signal), index, rotation, position)
        cache = self._cache[:, :rows]
        if isinstance(position, int):
            cache[0, :, :, position] = keys
            cache[1, :, :, position] = values
            seen = cache[:, :, :, max(0, position + 1 - self.context) : position + 1]
        else:
            cache.index_copy_(3, position, torch.stack([keys, values])[:, :, :, None])
            seen = cache[:, :, :, : mask.shape[-1]]  # type: ignore[union-attr]
        attended = functional.scaled_dot_product_attention(queries[:, :, None], *self._repeated(*seen), mask)
        signal = signal + self._scale1(self._out[index](attended.reshape(rows, -1)))
        return signal + self._scale2(self._feed[index](self._norm2(signal)))

    def whole(self, signal: torch.Tensor, rotation: "_Rotation | None", keep: bool = False) -> torch.Tensor:
        length = signal.shape[1]
        projected = self._project(self._norm1(signal), 0, rotation, slice(0, length))
        queries, keys, values = (part.transpose(1, 2) for part in projected)
        if keep:
            self._cache[0, :, :, :length] = keys
            self._cache[1, :, :, :length] = values
        mask = None
        if length > self.context:
            steps = torch.arange(length, device=signal.device)
            delta = steps[:, None] - steps
            mask = (delta >= 0) & (delta < self.context)
        keys, values = self._repeated(keys, values)
        attended = functional.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None)
        signal = signal + self._scale1(self._out[0](attended.transpose(1, 2).flatten(-2)))
        return signal + self._scale2(self._feed[0](self._norm2(signal)))

    def _project(
        self, signal: torch.Tensor, index: int, rotation: "_Rotation | None", place: int | slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(..., H, d)` of `(..., D)`."""
        projected = self._in[index](signal).unflatten(-1, (self._heads + 2 * self._kept, -1))
        turned, values = projected.split((self._heads + self._kept, self._kept), dim=-2)
        if rotation is not None:
            turned = rotation(turned, place)
        queries, keys = turned.split((self._heads, self._kept), dim=-2)
        return queries, keys, values

    def _repeated(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        repeat = self._heads // self._kept
        return (keys, values) if repeat == 1 else (expand_repeated_kv(keys, repeat), expand_repeated_kv(values, repeat))


class _GatheredLayer(_Layer):
    """A layer whose weights are cut over several processes (`rlhf_duplex.parallel`): whole only while it runs."""

    def __init__(self, layer: StreamingTransformerLayer, positions: int) -> None:
        self._cut, self._positions = layer, positions

    def whole(self, signal: torch.Tensor, rotation: "_Rotation | None", keep: bool = False) -> torch.Tensor:
        return self._cut.gathered(lambda inputs: _Layer(self._cut, self._positions, 0).whole(inputs, rotation), signal)


class _Rotation:
    """Rotary position embedding with the angles of all positions at hand (arXiv 2104.09864; `moshi.modules.rope`)."""

    def __init__(self, positions: int, width: int, max_period: float, interleave: bool, device: torch.device) -> None:
        half = torch.arange(width // 2, device=device, dtype=torch.float32)
        frequencies = torch.exp(half * (-math.log(max_period) * 2 / width))
        angles = frequencies * torch.arange(positions, device=device, dtype=torch.float32)[:, None, None]
        self._table = torch.complex(torch.cos(angles), torch.sin(angles))  # (positions, 1, width / 2)
        self._interleave = interleave

    def __call__(self, vectors: torch.Tensor, place: int | slice | torch.Tensor) -> torch.Tensor:
        """Vectors `(n, H, d)` at one position (a number, or `(1,)`), or `(n, T, H, d)` at several, turned."""
        pairs = vectors.float().unflatten(-1, (-1, 2) if self._interleave else (2, -1))
        if not self._interleave:
            pairs = pairs.transpose(-1, -2).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * self._table[place])
        if not self._interleave:
            turned = turned.transpose(-1, -2)
        return turned.flatten(-2).to(vectors.dtype)


def plain_norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm over `(..., D)`; Moshi's own RMS norm takes three dimensions only."""
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
        raise InputError(f"a feed-forward layer of the kind {type(gate).__name__} is not supported")

    def apply(signal: torch.Tensor) -> torch.Tensor:
        opened, passed = gate.linear_in(signal).chunk(2, dim=-1)
        return gate.linear_out(gate.activation(opened) * passed)

    return apply
