"""An AdamW optimiser's state as named tensors: safetensors holds nothing else, and a name outlives an order."""

from collections.abc import Callable, Mapping

import torch
from torch.distributed.tensor import DTensor

_KEYS = ("step", "exp_avg", "exp_avg_sq")


def optimiser_state(
    parameters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The state of named parameters; empty before the first step. What is cut over processes comes as it is."""
    return {
        f"{key}/{name}": value.detach() if isinstance(value, DTensor) else value.detach().cpu().clone()
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser_state(
    parameters: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Put back what `optimiser_state` gave; `place` puts a tensor where its parameter is (default: on its device).

    Raises:
        ValueError: a parameter's state is not whole or has another shape.
    """
    # A fused step counts on the device, any other on the CPU, as torch's own `load_state_dict` has it.
    counts_there = any(group.get("fused") or group.get("capturable") for group in optimiser.param_groups)
    for name, parameter in parameters.items():
        found = {key: state[f"{key}/{name}"] for key in _KEYS if f"{key}/{name}" in state}
        if found and (len(found) != len(_KEYS) or found["exp_avg"].shape != parameter.shape):
            raise ValueError(f"the optimiser state of '{name}' is not whole or of another shape")
        if found:
            optimiser.state[parameter] = {
                key: (value.to(parameter.device) if counts_there else value).clone()
                if key == "step"
                else (place or _on_device)(value, parameter).clone()
                for key, value in found.items()
            }


def _on_device(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return value.to(parameter.device)
