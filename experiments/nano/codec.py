"""The codec: Mimi at a small size, trained from nothing on synthesised speech at 8 kHz.

Training goes through four stages, because log-mel alone sits for thousands of steps on a plateau where the decoder
emits the mean spectrum: (a) waveform error over signal energy, (b) log-mel with the quantiser bypassed,
(c) quantised, (d) encoder and quantiser frozen, the decoder alone, on longer crops. After (c) the codes no longer
change, so that the language model can be trained while (d) still runs.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import librosa
import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from envs.files import replacing

SAMPLE_RATE = 8000
FRAME_SIZE = 640  # 80 ms
CODEBOOKS = 8
BINS = 256

CONFIG = {
    "sample_rate": SAMPLE_RATE,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1, "dimension": 128, "causal": True, "n_filters": 16, "n_residual_layers": 1, "activation": "ELU",
        "compress": 2, "dilation_base": 2, "disable_norm_outer_blocks": 0, "kernel_size": 7, "residual_kernel_size": 3,
        "last_kernel_size": 3, "norm": "none", "pad_mode": "constant", "ratios": [8, 5, 4, 2], "true_skip": True,
    },
    "quantizer": {
        "dimension": 64, "n_q": CODEBOOKS, "bins": BINS, "input_dimension": 128, "output_dimension": 128,
    },
    "transformer": {
        "d_model": 128, "num_heads": 4, "num_layers": 1, "causal": True, "layer_scale": 0.1, "context": 64,
        "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm",
        "positional_embedding": "rope", "dim_feedforward": 256, "input_dimension": 128, "output_dimensions": [128],
    },
}  # fmt: skip

# Steps, batch, frames of a crop.
STAGES = {"wave": (900, 24, 4), "mel": (700, 12, 8), "quantised": (2600, 12, 8), "decoder": (900, 8, 12)}


class MelLoss(nn.Module):
    """L1 between log-mel spectra at several resolutions. forward: audio [B, 1, N] twice -> scalar."""

    def __init__(self, sizes: tuple[int, ...] = (128, 256, 512)):
        super().__init__()
        self.sizes = sizes
        for size in sizes:
            mel = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=size, n_mels=size // 8 + 8)
            self.register_buffer(f"mel_{size}", torch.tensor(mel))
            self.register_buffer(f"window_{size}", torch.hann_window(size))

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        total = made.new_zeros(())
        for size in self.sizes:
            window, mel = getattr(self, f"window_{size}"), getattr(self, f"mel_{size}")
            spectra = [
                torch.stft(x[:, 0], size, size // 4, window=window, return_complex=True).abs() for x in (made, real)
            ]
            # The floor decides how much near-silence weighs: about 60 dB under speech.
            made_mel, real_mel = (torch.log(mel @ s + 3e-3 * math.sqrt(size / 256)) for s in spectra)
            total = total + (made_mel - real_mel).abs().mean()
        return total / len(self.sizes)


def crops(speech: list[np.ndarray], batch: int, frames: int, rng: np.random.Generator) -> Tensor:
    """Random stretches of speech [B, 1, N] with random gain, pitch, noise and silence around them."""
    length = frames * FRAME_SIZE
    out = np.zeros((batch, length), np.float32)
    for row in out:
        if rng.random() < 0.04:  # silence must stay silence
            row += rng.standard_normal(length).astype(np.float32) * (rng.random() < 0.5) * 10 ** rng.uniform(-5, -3)
            continue
        piece = speech[int(rng.integers(len(speech)))]
        rate = rng.uniform(0.85, 1.18) if rng.random() < 0.5 else 1.0
        need = math.ceil(length * rate) + 2
        start = int(rng.integers(-length // 2, max(1, len(piece) - need // 2)))
        part = np.zeros(need, np.float32)
        cut = piece[max(start, 0) : max(start + need, 0)]
        offset = max(-start, 0)
        part[offset : offset + len(cut)] = cut[: need - offset]
        if rate != 1.0:
            part = np.interp(np.arange(length) * rate, np.arange(need), part).astype(np.float32)
        row += part[:length] * 10 ** rng.uniform(-0.7, 0.35)
        if rng.random() < 0.4:
            row += rng.standard_normal(length).astype(np.float32) * 10 ** rng.uniform(-4.3, -2.7)
    return torch.from_numpy(np.clip(out, -1, 1))[:, None]


def wave_error(made: Tensor, real: Tensor) -> Tensor:
    """Squared error over signal energy, a batch row at a time, so that quiet rows count too."""
    energy = (real**2).mean((1, 2)) + 1e-4
    return (((made - real) ** 2).mean((1, 2)) / energy).mean()


def reconstruct(mimi: MimiModel, audio: Tensor, quantise: bool) -> tuple[Tensor, Tensor]:
    """Audio [B, 1, N] through the codec, in parallel. Returns the audio and the commitment penalty."""
    if quantise:
        result = mimi(audio)
        return result.x, result.penalty.mean()
    latent = mimi._to_encoder_framerate(mimi._encode_to_unquantized_latent(audio))
    (latent,) = mimi.decoder_transformer(latent)
    return mimi.decoder(latent)[..., : audio.shape[-1]], audio.new_zeros(())


class Average:
    """Exponential moving average of the weights: what is saved. Buffers (the codebooks) are taken as they are."""

    def __init__(self, model: nn.Module, decay: float = 0.995):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach(), 1 - self.decay)


def train(speech: list[np.ndarray], out: Path, stages: tuple[str, ...] = tuple(STAGES), seed: int = 0) -> None:
    """Train through `stages`, saving `out` (safetensors, float32) after every 500 steps and each stage.

    speech: utterances, float32 [N] at 8 kHz. A run that starts with `decoder` continues from `out`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    mimi = get_mimi(None, CONFIG, num_codebooks=CODEBOOKS)
    if stages[0] not in ("wave",):
        mimi.load_state_dict(load_file(out))
    mel_loss = MelLoss()
    began = time.time()
    for stage in stages:
        steps, batch, frames = STAGES[stage]
        mimi.train()
        if stage == "decoder":
            mimi.requires_grad_(False)
            for part in (mimi.decoder, mimi.decoder_transformer, mimi.upsample):
                part.requires_grad_(True)
            mimi.quantizer.eval()  # frozen: in training mode the codebooks would go on moving
        parameters = [p for p in mimi.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.99), weight_decay=0.0)
        average = Average(mimi)
        cooled = stage in ("quantised", "decoder")
        for step in range(1, steps + 1):
            scale = min(1.0, step / 50)
            if cooled:
                scale *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = 1e-3 * scale
            audio = crops(speech, batch, frames, rng)
            made, penalty = reconstruct(mimi, audio, stage in ("quantised", "decoder"))
            wave = wave_error(made, audio)
            if stage == "wave":
                loss = wave
            else:
                loss = mel_loss(made, audio) + (0.3 if stage == "mel" else 0.1) * wave + 0.1 * penalty
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            average.update(mimi)
            if step % 100 == 0:
                print(f"{time.time() - began:6.0f} s  {stage} {step}/{steps}  loss {loss.item():.3f}  "
                      f"wave {wave.item():.3f}", flush=True)  # fmt: skip
            if step % 500 == 0 or step == steps:
                save(mimi, out, average)


def save(mimi: MimiModel, path: Path, average: Average | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write the codec as safetensors; codebooks as plain centroids (usage 1), which 16 bits hold well."""
    state = {name: value.detach().clone() for name, value in mimi.state_dict().items()}
    if average is not None:
        state.update({name: value.clone() for name, value in average.weights.items()})
    for name in [n for n in state if n.endswith("embedding_sum")] if dtype != torch.float32 else []:
        usage = name.replace("embedding_sum", "cluster_usage")
        state[name] = state[name] / state[usage].clamp(min=1e-5)[:, None]
        state[usage] = torch.ones_like(state[usage])
    with replacing(path) as temporary:
        save_file({name: value.to(dtype).contiguous() for name, value in state.items()}, temporary)


def load(path: Path) -> MimiModel:
    """The codec as the loaders of Moshi build it, in evaluation mode."""
    return get_mimi(path, json.loads(json.dumps(CONFIG)), num_codebooks=CODEBOOKS)
