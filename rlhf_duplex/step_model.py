"""How long an update takes: a model of the step from a few constants of the machine, pure functions.

A frame of a rollout reads every weight that acts once, whatever the batch, and each episode's keys and values so far;
it takes at least the launches of its kernels. An update multiplies every token with every weight: forward (2 operations
a weight and token), backward (twice that), the reference's forward, and another forward where activations are computed
again. With full sharding the weights of every pass come over the network while the layer before computes. Weights go to
the workers as fast as the slowest link.

`experiments/scaling` measures and fits the constants of a machine, and says what the defaults rest on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU (or CPU), and what connects it. Defaults: an H100 of 80 GB, eight to a node, 400 Gb/s a GPU between nodes.

    Attributes:
        bandwidth: bytes a second of its memory; flops: operations a second (bfloat16, dense): the maker's figures.
        read_share, compute_share: of these that is reached.
        frame_overhead: seconds a frame takes beside reading weights (launches, sampling).
        near, far: bytes a second that one GPU exchanges within its node and between nodes.
        node: GPUs of a node.
    """

    bandwidth: float = 3.35e12
    flops: float = 989e12
    read_share: float = 0.6
    compute_share: float = 0.4
    frame_overhead: float = 0.003
    near: float = 300e9
    far: float = 40e9
    node: int = 8

    def link(self, gpus: int) -> float:
        """Bytes a second between so many GPUs: the slowest link on the way."""
        return self.near if gpus <= self.node else self.far


@dataclass(frozen=True)
class Size:
    """A model, in bytes and parameters.

    Attributes:
        temporal, depth: parameters of the parts (text logits with the temporal part).
        trained: parameters that are trained, LoRA or all.
        read_bytes: weights that one frame reads.
        cache_bytes: keys and values of one frame of one episode.
        sync_bytes: of what workers are given after an update.
        gathered_bytes: of the weights in the type that products are computed in.
    """

    temporal: int
    depth: int
    trained: int
    read_bytes: int
    cache_bytes: int
    sync_bytes: int
    gathered_bytes: int


def rollout_seconds(size: Size, machine: Machine, episodes: int, frames: int) -> float:
    """One worker plays so many episodes of so many frames at once."""
    reading = frames * size.read_bytes + episodes * size.cache_bytes * frames * (frames + 1) / 2
    computing = 2 * (size.temporal + size.depth) * episodes * frames
    busy = max(reading / (machine.bandwidth * machine.read_share), computing / (machine.flops * machine.compute_share))
    return busy + frames * machine.frame_overhead


def update_seconds(
    size: Size,
    machine: Machine,
    tokens: int,
    learners: int,
    passes: int = 1,
    forwards_before: int = 0,
    recompute: bool = False,
    sharded: bool = False,
    microbatches: int = 1,
    steps: int = 1,
) -> tuple[float, float]:
    """One update of a group of learners: seconds of computing, and of exchanging that it cannot hide.

    Args:
        tokens: frames of all episodes, padding included.
        passes: over the episodes; forwards_before: without gradients, before them (value function, importance).
        recompute: activations are computed again.
        sharded: full sharding; else the gradients of what is trained are summed once an optimiser step.
        microbatches: of one learner in a pass; steps: optimiser steps in a pass.
    """
    # Forward and reference 2 each; backward: 2 through every weight, and 2 for those that are trained.
    backward = 2 + 2 * min(1.0, size.trained / size.temporal)
    operations = passes * (2 + 2 + backward + (2 if recompute else 0)) + 2 * forwards_before
    computing = operations * size.temporal * tokens / learners / (machine.flops * machine.compute_share)
    if learners == 1:
        return computing, 0.0
    link = machine.link(learners)
    if sharded:  # gathered for forward, backward and reference, gradients scattered in float32
        moved = passes * microbatches * (3 * size.gathered_bytes + 4 * size.trained)
    else:
        moved = passes * steps * 2 * 4 * size.trained
    moving = moved * (learners - 1) / learners / link
    return computing, max(0.0, moving - computing) if sharded else moving


def sync_seconds(size: Size, machine: Machine, workers: int, how: str) -> float:
    """Weights from the learners to so many workers.

    Args:
        how: `shared` (the same process), `object_store` (one copy a node, node after node from one sender, then within
            the node), or `broadcast` (a pipelined collective: every link carries the weights once).
    """
    if how == "shared":
        return 0.0
    nodes = -(-workers // machine.node)
    within = size.sync_bytes / machine.near
    if how == "broadcast":
        return size.sync_bytes / machine.link(workers + 1) + within
    return nodes * size.sync_bytes / machine.far + min(workers, machine.node) * within
