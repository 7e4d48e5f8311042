"""PersonaPlex: Moshi's architecture whose depth transformer predicts the user's codes too (`dep_q` = `n_q`).

Its own loader makes such a model of weights for the agent's codes alone; the names and the order are those of
`get_moshi_lm` in NVIDIA's repository `personaplex`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from moshi.models.lm import LMModel

_PROJECTION = re.compile(r"(.*\.self_attn\.)(in|out)_projs\.(\d+)\.weight")
_FUSED = {"in": "in_proj_weight", "out": "out_proj.weight"}
_COUNTED = re.compile(
    r"(.*\b(?:gating|linears|depformer_in|depformer_emb|in_projs|out_projs|depformer_norms)\.)(\d+)(\..*)"
)


def is_personaplex(config: Mapping[str, Any]) -> bool:
    """Whether a bundle's configuration is of a model that predicts the user's codes too."""
    return bool(config.get("n_q")) and config.get("n_q") == config.get("dep_q")


def expand_depth(weights: Mapping[str, torch.Tensor], lm: LMModel) -> dict[str, torch.Tensor]:
    """Weights of a model for the agent's codes alone as those of one for the user's too.

    The attention's fused weights are doubled by repeating them, and of what is counted by codebook the missing entries
    8 to 15 are copies of 0 to 7. Weights that are whole come back as they are, and what cannot be filled stays missing.

    Args:
        weights: by name, as on disk (on the meta device too).
        lm: the larger model.
    """
    if lm.dep_q != lm.n_q:
        return dict(weights)
    expected = lm.state_dict()
    half = lm.dep_q // 2
    found = dict(weights)
    for name, value in weights.items():
        if name.startswith("depformer.") and name.endswith((_FUSED["in"], _FUSED["out"], "in_proj.weight")):
            count = sum(key.startswith(f"{name.rpartition('self_attn.')[0]}self_attn.in_projs.") for key in expected)
            rows = value.shape[1] * (1 if name.endswith(_FUSED["out"]) else 3)
            if value.shape[0] * 2 == rows * count:
                found[name] = torch.cat([value, value])
    for name in expected:
        match = _COUNTED.fullmatch(name)
        if name in found or match is None or not name.startswith(("depformer", "linears")):
            continue
        before, number, after = match.group(1), int(match.group(2)), match.group(3)
        if any(f"{before}{other}{after}" in weights for other in range(half, lm.dep_q)):
            continue  # not a smaller model's: this one is damaged
        # The agent's last codebook is no input where the user's first is not predicted: the embedding before it.
        first_new = before == "depformer_emb." and number == half - 1
        source = number - half if number >= half else number - 1 if first_new else number
        if f"{before}{source}{after}" in weights:
            found[name] = weights[f"{before}{source}{after}"]
    return found


def fuse_projections(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The attention's projections under the names that PersonaPlex's own `moshi` reads; stock Moshi reads both."""
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in weights.items():
        match = _PROJECTION.fullmatch(name)
        if match is None:
            found[name] = value
        else:
            fused = match.group(1) + _FUSED[match.group(2)]
            parts.setdefault(fused, {})[int(match.group(3))] = value
    for name, numbered in parts.items():
        found[name] = torch.cat([numbered[number] for number in sorted(numbered)])
    return found
