"""Log-probabilities of all pairs under the reference, computed once and kept in a file bound to what they depend on."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from envs.files import replacing
from rlhf_duplex.data.pair import Pair
from rlhf_duplex.policy.lora import merge_weights
from rlhf_duplex.warmstart.config import WarmstartConfig
from rlhf_duplex.warmstart.data import PairCollator
from rlhf_duplex.warmstart.model import PairModel, make_objective, stream_ids


def reference_key(
    weights: Mapping[str, torch.Tensor],
    pairs: Sequence[Pair],
    config: WarmstartConfig,
    prompt: torch.Tensor | None = None,
) -> str:
    """Changes with anything that the log-probabilities depend on: tokens, spans, weights, streams, number types.

    Args:
        weights: the language model's state dict; adapters in it do not count.
        pairs: in their order.
        config: of the warm start.
        prompt: columns before every dialogue.
    """
    digest = hashlib.sha256()
    loss = config.loss
    decides = (loss.streams, loss.objective, loss.onset_frames, loss.span, config.dtype, config.training.autocast)
    digest.update(repr(decides).encode())
    if prompt is not None:
        digest.update(_bytes(prompt))
    for name, value in sorted(merge_weights(weights, 0.0).items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(_bytes(value))
    for pair in pairs:
        digest.update(repr((pair.chosen_span, pair.rejected_span)).encode())
        for tokens in (pair.context, pair.chosen, pair.rejected):
            digest.update(f"{tuple(tokens.shape)}".encode())
            digest.update(_bytes(tokens))
    return digest.hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def read_references(path: Path, key: str) -> torch.Tensor | None:
    """What `write_references` wrote under the same key, `(pairs, 2)`; None where there is no file or it is stale."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.get_tensor("log_probs") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None


def write_references(path: Path, key: str, log_probs: torch.Tensor) -> None:
    """Keep log-probabilities `(pairs, 2)` of chosen and rejected; the file appears whole."""
    with replacing(path) as temporary:
        save_file({"log_probs": log_probs}, str(temporary), metadata={"key": key})


@torch.no_grad()
def score_pairs(
    lm: torch.nn.Module,
    pairs: Sequence[Pair],
    config: WarmstartConfig,
    on_pairs: Callable[[int], None] | None = None,
    prompt: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of log-probabilities over the loss's targets, `(pairs, 2)` float32 for chosen and rejected, in their order.

    Args:
        lm: Moshi's language model, as it is.
        pairs: to score.
        config: streams, span, batch size and number types.
        on_pairs: called with the number of pairs after each batch.
        prompt: columns before every dialogue.
    """
    model = PairModel(lm, config.loss.streams, make_objective(lm, config.loss), prompt)
    was_training = lm.training
    model.eval()
    collate = PairCollator(stream_ids(lm, config.loss.streams), config.loss.span)
    device = next(lm.parameters()).device
    # Similar lengths together: less padding.
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].context.shape[1] + pairs[i].chosen.shape[1])
    found = torch.zeros(len(pairs), 2)
    half = config.training.autocast == "bfloat16"
    for start in range(0, len(order), config.training.microbatch):
        rows = order[start : start + config.training.microbatch]
        batch = collate([(pairs[i], None) for i in rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = model(**{name: value.to(device) for name, value in batch.items()})
        found[rows] = torch.stack(output.log_probs.sum(dim=1).chunk(2), dim=1).float().cpu()
        if on_pairs is not None:
            on_pairs(len(rows))
    lm.train(was_training)
    return found
