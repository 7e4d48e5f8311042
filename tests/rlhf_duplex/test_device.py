"""What a frame must not do on a GPU, shown on the meta device: read a value back, or mix in a tensor of the host.

On the meta device tensors have shapes and no values: whoever asks for a value is refused, and so is an operation on
tensors of two devices. A CUDA graph of a frame can be recorded only without either.
"""

from pathlib import Path

import pytest
import torch

from rlhf_duplex.config import load_config
from rlhf_duplex.memory_model import meta_model, model_config
from rlhf_duplex.policy.bundle import NANO_FOLDER
from rlhf_duplex.policy.lora import add_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling

CONFIGS = Path(__file__).parents[2] / "configs"


def model(checkpoint, adapters=None, **changes):
    lm = meta_model(model_config(str(checkpoint)).lm | changes, torch.bfloat16)
    if adapters:
        add_lora(lm, 4, flavour=adapters)
    return lm


MODELS = {
    "nano": lambda: model(NANO_FOLDER),
    "nano with adapters of Moshi's kind": lambda: model(NANO_FOLDER, "moshi"),
    "nano with adapters of PEFT's": lambda: model(NANO_FOLDER, "peft"),
    "the 7B": lambda: model(load_config(CONFIGS / "moshi_7b_paper.yaml", []).checkpoint),
    "a PersonaPlex": lambda: model(NANO_FOLDER, dep_q=16, depformer_weights_per_step_schedule=None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [0, 5])
def test_a_frame_waits_for_nothing(name, prompt):
    lm = MODELS[name]()
    columns = torch.zeros(1 + lm.n_q, prompt, dtype=torch.long, device="meta") if prompt else None
    policy = MoshiPolicy(lm, Sampling(audio_top_k=250, text_top_k=25), columns, fixed=True)
    frames, batch = policy.max_delay + 3, 3
    policy.begin([1, 2, 3], [frames, frames, 2])
    users = torch.zeros(batch, lm.n_q - policy.agent_codebooks, dtype=torch.long, device="meta")
    for _ in range(frames):
        actions = policy.act(users)
        assert (actions.shape, actions.device.type) == ((batch, 1 + policy.agent_codebooks), "meta")
    found = policy.trajectory()
    assert (found.codes.device.type, found.log_probs.device.type) == ("meta", "meta")
    scores, distribution = policy.evaluate_actions(found.codes)
    assert scores.shape == (batch, frames)
    assert distribution.shape[:2] == scores.shape


def test_the_check_would_notice():
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.zeros(1, device="meta").item()
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device="meta") + torch.zeros(2)
