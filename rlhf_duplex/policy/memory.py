"""How many dialogues a GPU has room for."""

import torch

from rlhf_duplex.policy.moshi import MoshiPolicy

ON_A_CPU = 256
# Of what is free; the rest is for fragments, and for audio that is decoded meanwhile (`codec.DECODED_FRAMES`).
USED = 0.8
# Copies of a frame's text logits in float32 that drawing holds: scaled, softmax, its sum, log-softmax and work space.
_LOGITS = 6


def dialogue_bytes(policy: MoshiPolicy, frames: int) -> int:
    """What one dialogue more takes on the device: caches, tokens, uniform numbers, and the work of a frame."""
    lm = policy.lm
    positions = frames + (0 if policy.prompt is None else policy.prompt.shape[1])
    size = next(lm.parameters()).element_size()
    attention = lm.transformer.layers[0].self_attn
    width = attention.embed_dim // attention.kv_repeat
    cache = 2 * len(lm.transformer.layers) * width * positions * size
    depth = lm.depformer.layers
    cache += 2 * len(depth) * depth[0].self_attn.embed_dim * lm.dep_q * size
    tokens = 8 * (1 + lm.n_q) * (positions + policy.max_delay + 1)
    noise = 4 * frames * (2 + policy.agent_codebooks)
    work = 4 * _LOGITS * lm.text_linear.out_features + 16 * lm.dim * size
    return cache + tokens + noise + work


def dialogues_that_fit(policy: MoshiPolicy, frames: int) -> int:
    """Dialogues of so many frames that can be played at once, at least 1.

    On a GPU by what is free of its memory now, in eights; on a CPU a number that its caches like.
    """
    if policy.device.type != "cuda":
        return ON_A_CPU
    with torch.cuda.device(policy.device):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
    count = int(USED * free / dialogue_bytes(policy, frames))
    return max(1, count // 8 * 8 if count >= 8 else count)
