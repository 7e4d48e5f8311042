"""Mimi's SEANet decoder for a CPU: the modules' own weights, time before channels, every convolution a matrix product.

PyTorch's transposed convolutions on a CPU go through a column buffer and its ELU through `expm1`. With time as the
rows of a matrix, a causal convolution is one product for each tap, on shifted views of its input, and a transposed
convolution whose kernel is twice its stride is two, whose result already lies in the order of time. Nothing is padded,
unfolded or transposed on the way. The audio is the same within rounding (tested).

Shapes: `T` steps, `C` channels; one dialogue at a time, so that what is between two layers stays in a core's cache.
"""

from collections.abc import Callable, Iterable

import torch
from moshi.models.compression import MimiModel
from moshi.modules.conv import StreamingConv1d, StreamingConvTranspose1d
from moshi.modules.seanet import SEANetResnetBlock
from torch import nn

# A product with fewer columns leaves a core's vector units idle.
MIN_COLUMNS = 16

Layer = Callable[[torch.Tensor], torch.Tensor]


class UnknownLayerError(TypeError):
    """A layer that `SeanetDecoder` has no equal for."""


class SeanetDecoder:
    """The decoder of a Mimi, from latents to audio, outside streaming mode.

    Args:
        mimi: its weights are copied (reordered) as they are now.

    Raises:
        UnknownLayerError: a Mimi with layers that no released one has (weight norm, groups, another activation...).
    """

    def __init__(self, mimi: MimiModel) -> None:
        modules = list(mimi.decoder.model)
        with torch.no_grad():
            self._layers = [_layer(module) for module in modules]
        self._past = _past(modules)

    def __call__(self, latent: torch.Tensor, since: int = 0) -> torch.Tensor:
        """Latents `(C, T)` of one dialogue to audio `(N,)`, or to its end, from the latent `since` on."""
        first = max(0, since - self._past)  # what the audio from there on has heard of what was before
        signal = latent[:, first:].t()
        for layer in self._layers:
            signal = layer(signal)
        return signal[(since - first) * (len(signal) // (latent.shape[1] - first)) :, 0]


def _past(modules: Iterable[nn.Module]) -> int:
    """How many latents before its own a sample is made of; of layers that `_layer` knows."""
    steps = 0
    for module in reversed(list(modules)):
        if isinstance(module, SEANetResnetBlock):
            steps += _past(module.block)
        elif isinstance(module, StreamingConvTranspose1d):
            steps = -(-steps // module.convtr.convtr.stride[0]) + 1
        elif isinstance(module, StreamingConv1d):
            inner = module.conv.conv
            steps += (inner.kernel_size[0] - 1) * inner.dilation[0]
    return steps


def _layer(module: nn.Module) -> Layer:
    if isinstance(module, StreamingConv1d):
        return _convolution(module)
    if isinstance(module, StreamingConvTranspose1d):
        return _transposed(module)
    if isinstance(module, SEANetResnetBlock) and isinstance(module.shortcut, nn.Identity):
        return _residual([_layer(inner) for inner in module.block])
    if isinstance(module, nn.ELU) and module.alpha == 1.0:
        return _elu
    raise UnknownLayerError(f"no equal for {module}")


def _elu(signal: torch.Tensor) -> torch.Tensor:
    # For x < 0, exp(x) - 1 > x; for x >= 0 the clamp leaves exp(0) - 1 = 0.
    negative = signal.clamp(max=0).exp_().sub_(1)
    return torch.maximum(signal, negative, out=negative)


def _residual(block: Iterable[Layer]) -> Layer:
    layers = list(block)

    def apply(signal: torch.Tensor) -> torch.Tensor:
        inner = signal
        for layer in layers:
            inner = layer(inner)
        return inner.add_(signal)

    return apply


def _convolution(module: StreamingConv1d) -> Layer:
    """A causal convolution of stride 1; `pad_mode="constant"` is silence before the beginning."""
    inner = module.conv.conv
    plain = isinstance(inner, nn.Conv1d) and not hasattr(inner, "parametrizations") and module.conv.norm_type == "none"
    if not plain or inner.groups != 1 or inner.stride != (1,) or inner.bias is None or module.pad_mode != "constant":
        raise UnknownLayerError(f"no equal for {module}")
    taps = {
        (inner.kernel_size[0] - 1 - index) * inner.dilation[0]: inner.weight[:, :, index].detach()
        for index in range(inner.kernel_size[0])
    }
    columns = inner.out_channels
    group = -(-MIN_COLUMNS // columns) if len(taps) > 1 and 1 < columns < MIN_COLUMNS else 1
    single = _products(taps, inner.bias.detach(), 1)
    grouped = _products(taps, inner.bias.detach(), group)

    def apply(signal: torch.Tensor) -> torch.Tensor:
        steps, channels = signal.shape
        if group == 1 or steps % group or not signal.is_contiguous():
            return single(signal)
        return grouped(signal.view(steps // group, group * channels)).view(steps, columns)

    return apply


def _products(taps: dict[int, torch.Tensor], bias: torch.Tensor, group: int) -> Layer:
    """One product a delay; `group` steps side by side in a row make one wide product of several narrow ones.

    Args:
        taps: delay in steps to weight `(C_out, C_in)`.
        bias: `(C_out,)`.
        group: steps a row.
    """
    out_channels, in_channels = next(iter(taps.values())).shape
    weights: dict[int, torch.Tensor] = {}  # delay in rows to (group * C_in, group * C_out)
    for delay, weight in taps.items():
        for step in range(group):
            rows, place = divmod(step - delay, group)
            matrix = weights.setdefault(-rows, torch.zeros(group * in_channels, group * out_channels))
            matrix[place * in_channels : (place + 1) * in_channels, step * out_channels : (step + 1) * out_channels] = (
                weight.t()
            )
    now = weights.pop(0)
    offset = bias.repeat(group)

    def apply(signal: torch.Tensor) -> torch.Tensor:
        result = torch.addmm(offset, signal, now)
        for delay, weight in weights.items():
            if delay < len(signal):
                result[delay:].addmm_(signal[:-delay], weight)
        return result

    return apply


def _transposed(module: StreamingConvTranspose1d) -> Layer:
    """A transposed convolution whose kernel is twice its stride: an output step comes of two input steps."""
    inner = module.convtr.convtr
    stride, kernel = inner.stride[0], inner.kernel_size[0]
    plain = isinstance(inner, nn.ConvTranspose1d) and not hasattr(inner, "parametrizations")
    plain = plain and module.convtr.norm_type == "none" and inner.groups == 1 and inner.bias is not None
    if not plain or kernel != 2 * stride or inner.dilation != (1,):
        raise UnknownLayerError(f"no equal for {module}")
    weight = inner.weight.detach().permute(0, 2, 1)  # (C_in, kernel, C_out)
    now, before = (half.reshape(inner.in_channels, -1).contiguous() for half in weight.split(stride, dim=1))
    bias = inner.bias.detach().repeat(stride)

    def apply(signal: torch.Tensor) -> torch.Tensor:
        result = torch.addmm(bias, signal, now)
        result[1:].addmm_(signal[:-1], before)
        return result.view(-1, inner.out_channels)

    return apply
