"""Drawing tokens, one uniform number a token, so that an episode's tokens depend on its own seed and nothing else."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        text_temperature: 0 takes the likeliest token.
        text_top_k: 0 draws from the whole vocabulary (the default in RL: a cut-off token can never be learned).
        audio_temperature, audio_top_k: the same for the agent's audio codes.
    """

    text_temperature: float = 0.7
    text_top_k: int = 0
    audio_temperature: float = 0.8
    audio_top_k: int = 250


def log_distribution(
    logits: torch.Tensor, temperature: float, top_k: int = 0, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of the distribution that tokens are really drawn from, `(..., V)` float32.

    Args:
        logits: `(..., V)`.
        temperature: 0 stands for greedy decoding; the log-probabilities are then the untempered ones.
        top_k: tokens outside the k likeliest get -inf; 0 keeps all.
        keep: `(...)` tokens that stay in the support whatever their rank: those that the behaviour policy drew, so
            that a ratio of probabilities never meets -inf.
    """
    scaled = logits.float() / (temperature if temperature > 0 else 1.0)
    if 0 < top_k < scaled.shape[-1]:
        outside = scaled < scaled.topk(top_k, dim=-1).values[..., -1:]
        if keep is not None:
            outside = outside.scatter(-1, keep[..., None], False)
        scaled = scaled.masked_fill(outside, float("-inf"))
    return torch.log_softmax(scaled, dim=-1)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int = 0) -> torch.Tensor:
    """Tokens `(B,)` from logits `(B, V)` by inverting the cumulative distribution at `uniform` `(B,)` in (0, 1].

    One number a token instead of one a vocabulary entry, and no generator shared between the rows of a batch: a row's
    token is the same whatever stands beside it.
    """
    if temperature <= 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def uniforms(seeds: list[int], frames: int, streams: int, device: torch.device) -> torch.Tensor:
    """Numbers in (0, 1] for every token of every episode, `(frames, streams, B)`, each row from its own seed."""
    rows = [torch.rand(frames, streams, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (1.0 - torch.stack(rows, dim=-1)).to(device)
