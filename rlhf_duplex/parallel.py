"""How the members of a learner group share an update: alone, data parallel, or with the weights cut over them.

Every member has the whole batch (tokens are small) and the same order of minibatches; it computes the gradients of its
share of the microbatches, and the sum over the members is that of one process up to rounding.
"""

from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from moshi.models.lm import LMModel
from torch import nn

from envs.cores import map_on_cores
from rlhf_duplex.policy.moshi import MoshiPolicy


class Alone:
    """One process, and what the other two have in common."""

    rank, world = 0, 1

    def prepare(self, policy: MoshiPolicy, reference: MoshiPolicy) -> tuple[MoshiPolicy, MoshiPolicy]:
        """Policy and reference as the update uses them; called once, before the optimiser is made."""
        return policy, reference

    def share(self, parts: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, bool]]:
        """This member's microbatches, and whether each counts.

        All members get as many, since they meet in every one; what is missing at the end is filled up with one that
        does not count.
        """
        own = [(part, True) for part in parts[self.rank :: self.world]]
        return own + [(parts[0], False)] * (-(-len(parts) // self.world) - len(own))

    def map(self, function: Callable[[Any], Any], parts: Iterable[Any], device: torch.device) -> Iterator[Any]:
        """The function's results in the order of the parts."""
        return map_on_cores(function, parts, device)

    def gradients(self, loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
        """Of a microbatch; those that the parameters hold already are left out."""
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the parameters' gradients over the members."""

    def total(self, value: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        """The sum (or maximum) of a tensor over the members."""
        return value

    def whole(self, tensors: Mapping[str, torch.Tensor], everywhere: bool = False) -> dict[str, torch.Tensor]:
        """The tensors uncut; all members take part, and unless `everywhere` only the first need be given any."""
        return dict(tensors)

    def cut(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A whole tensor as this member holds it, on the device of `like`."""
        return value.to(like.device)


class DataParallel(Alone):
    """Every member has all weights; gradients are summed (what PyTorch's DDP does at the end of an accumulation).

    Args:
        device: of the weights; decides the backend, `nccl` or `gloo`.
        timeout: seconds that a member waits for the others.
    """

    def __init__(self, rank: int, world: int, address: str, device: torch.device, timeout: float) -> None:
        self.rank, self.world, self.device = rank, world, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, value: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
        return value


class Sharded(DataParallel):
    """Weights, gradients and optimiser cut over the members (FSDP2, `fully_shard`), gathered layer by layer.

    Args:
        half: compute in bfloat16 (the weights that are kept, and the sums of gradients, stay float32).
    """

    def __init__(
        self, rank: int, world: int, address: str, device: torch.device, timeout: float, half: bool = False
    ) -> None:
        super().__init__(rank, world, address, device, timeout)
        self.half = half

    def prepare(self, policy: MoshiPolicy, reference: MoshiPolicy) -> tuple[MoshiPolicy, MoshiPolicy]:
        for one in (policy, reference):
            shard(one.lm, self.device, self.world, self.half)
        cut = [ShardedPolicy(one.lm, one.sampling, one.prompt) for one in (policy, reference)]
        return cut[0], cut[1]

    def map(self, function: Callable[[Any], Any], parts: Iterable[Any], device: torch.device) -> Iterator[Any]:
        return map(function, parts)  # the members must gather in the same order

    def gradients(self, loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
        loss.backward()
        return ()

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        from torch.distributed.tensor import DTensor

        # FSDP has summed those of what is cut; the rest (a value head) is whole on every member.
        super().reduce([p for p in parameters if not isinstance(p, DTensor)])

    def whole(self, tensors: Mapping[str, torch.Tensor], everywhere: bool = False) -> dict[str, torch.Tensor]:
        from torch.distributed.tensor import DTensor

        found = {}
        for name, value in tensors.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.rank == 0 or everywhere:
                found[name] = full.detach() if everywhere else full.detach().cpu()
        return found

    def cut(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        value = value.to(device=like.device, dtype=like.dtype)
        return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def shard(lm: LMModel, device: torch.device, world: int, half: bool) -> None:
    """Cut a language model's weights over the members, in place, each layer of the transformers a unit.

    The layers are not called as modules here (`rlhf_duplex.policy.transformer`), so that each gets a method `gathered`,
    inside which its weights are whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)
    depth = [] if lm.depformer is None else list(lm.depformer.layers)
    units = [*lm.transformer.layers, *depth, lm]
    for unit in units:
        _allow_fsdp(type(unit))
        unit.gathered = MethodType(_call, unit)
        fully_shard(unit, mesh=mesh, mp_policy=precision)
        register_fsdp_forward_method(unit, "gathered")
        # Microbatches are weighted with their share of the minibatch: sums, not means.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _allow_fsdp(cls: type) -> None:
    """Let `fully_shard` take modules of a class of Moshi's.

    It gives a module the class `(FSDPModule, cls)`. Moshi's classes begin with `abc.ABC`, whose instances Python lays
    out differently ("object layout differs"); with the bases the other way round they are alike. `fully_shard` looks
    in this table before it makes a class.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fully_shard

    table = _fully_shard.cls_to_fsdp_cls
    if cls not in table and not issubclass(cls, FSDPModule):
        table[cls] = ABCMeta(f"FSDP{cls.__name__}", (cls, FSDPModule), {})


def _call(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


class ShardedPolicy(MoshiPolicy):
    """A policy whose weights are cut; it evaluates, and does not act."""

    def whole(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """See `MoshiPolicy.whole`; what the function gives must be tensors."""
        return self.lm.gathered(function, *inputs)
