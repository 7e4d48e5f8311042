"""PPO's value function: a head of its own on the temporal transformer's output.

The output is taken as it is: the head's loss does not reach the policy, so that its learning rate is its own and the
weights that are served stay those of the policy loss. It is saved beside the bundle, not in it.
"""

import torch
from torch import nn

from rlhf_duplex.config import PpoConfig
from rlhf_duplex.optimiser_state import load_optimiser_state, optimiser_state


class Critic:
    """The value of each frame before its token is drawn, and its optimiser.

    Args:
        width: D, of the temporal transformer's output.
        config: its learning rate.
        seed: of its first weights; the last layer begins at 0, so that all values do.
        device: of the policy.
    """

    def __init__(self, width: int, config: PpoConfig, seed: int, device: torch.device) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(width, 1)
            self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head.to(device)
        self.parameters = dict(self.head.named_parameters())
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=config.value_learning_rate, weight_decay=0.0)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs `(..., D)` of the temporal transformer to values `(...)`."""
        return self.head(hidden.detach().float())[..., 0]

    def clip(self, clip_norm: float) -> float:
        """Clip the gradients that the head has; gives their norm."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip_norm))

    def state(self) -> dict[str, torch.Tensor]:
        """Weights (`head/NAME`) and optimiser as named tensors."""
        weights = {f"head/{name}": value.detach().cpu().clone() for name, value in self.parameters.items()}
        return weights | optimiser_state(self.parameters, self.optimiser)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another head.
        """
        self.head.load_state_dict({name: state[f"head/{name}"] for name in self.parameters})
        load_optimiser_state(self.parameters, self.optimiser, state)
