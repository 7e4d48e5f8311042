"""Silero's network over many windows at once, its convolutions as matrix products.

The stock network sees one window of 32 ms at a time. Its convolutions run over four positions only, where the general
routines spend more on order than on arithmetic: here each position of a window is a matrix with a row for every
window, and a convolution is one product a tap. The weights are those of the package; the probabilities are the same
within rounding (tested).
"""

import torch
from torch.nn import functional

# Windows at a time: their activations stay in a core's cache.
CHUNK = 1024


class SileroNetwork:
    """The network of one sample rate.

    Args:
        network: of `silero_vad.load_silero_vad()`, `_model` for 16 kHz or `_model_8k`.
    """

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        basis = network.stft.forward_basis_buffer[:, 0]
        self._basis = basis.t().contiguous()  # (filter, 2 * bins): real, then imaginary parts
        self._hop = int(network.stft.hop_length)
        self._encoder = []
        for index in range(4):
            convolution = getattr(network.encoder, str(index)).reparam_conv
            taps = [
                convolution.weight.detach()[:, :, tap].t().contiguous() for tap in range(convolution.weight.shape[2])
            ]
            self._encoder.append((taps, convolution.bias.detach(), convolution.stride[0]))
        cell = network.decoder.rnn
        self._recurrent = torch.nn.LSTM(cell.weight_ih.shape[1], cell.weight_hh.shape[1], batch_first=True)
        self._recurrent.load_state_dict({f"{name}_l0": value.detach() for name, value in cell.named_parameters()})
        self._recurrent.to(basis.device).eval()
        last = getattr(network.decoder.decoder, "2")
        self._weight, self._bias = last.weight.detach()[0, :, 0], last.bias.detach()

    def __call__(
        self, windows: torch.Tensor, hidden: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Windows with their context `(B, windows, samples)` to speech probabilities `(B, windows)`.

        hidden: what came back for the windows before these (None at the beginning); the new one comes back.
        """
        batch, count, samples = windows.shape
        flat = windows.reshape(batch * count, samples)
        features = torch.cat([self._features(part) for part in flat.split(CHUNK)])
        output, hidden = self._recurrent(features.view(batch, count, -1), hidden)
        return torch.sigmoid(output.relu() @ self._weight + self._bias), hidden

    def _features(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows `(n, samples)` to what the LSTM sees, `(n, features)`."""
        signal = functional.pad(windows, (0, self._hop // 2), mode="reflect")
        width = len(self._basis)
        positions = []
        for start in range(0, signal.shape[1] - width + 1, self._hop):
            real, imaginary = (signal[:, start : start + width] @ self._basis).chunk(2, dim=1)
            positions.append((real.square() + imaginary.square()).sqrt_())
        for taps, bias, stride in self._encoder:
            positions = [_at(positions, place, taps, bias) for place in range(0, len(positions), stride)]
        (features,) = positions
        return features


def _at(positions: list[torch.Tensor], place: int, taps: list[torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
    """A convolution (zeros on either side) and its ReLU at one place."""
    result = torch.addmm(bias, positions[place], taps[1])
    for tap, offset in ((0, -1), (2, 1)):
        if 0 <= place + offset < len(positions):
            result.addmm_(positions[place + offset], taps[tap])
    return result.relu_()
