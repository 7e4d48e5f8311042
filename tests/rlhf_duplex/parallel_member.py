"""One learner of a group of two, as a process of its own: `python parallel_member.py RANK FOLDER ADDRESS ADDRESS`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf_duplex.batch import Batch
from rlhf_duplex.config import OptimiserConfig, TrainerConfig
from rlhf_duplex.learner import Learner
from rlhf_duplex.parallel import Alone, DataParallel, Sharded
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.lora import add_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling

CASES = (("grpo", 0, False), ("ppo", 0, True), ("grpo", 4, False))
"""Algorithm, rank of the adapters, whether activations are computed again."""


def run(case, batch: Batch, parallel: Alone | None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Two updates, a restart from what was saved between them; metrics and weights."""
    algorithm, rank, again = case
    trainer = TrainerConfig(algorithm=algorithm, minibatch=3, microbatch=1, updates=3)
    optimiser = OptimiserConfig(learning_rate=1e-4, warmup_updates=0)

    def make() -> Learner:
        lm = load_bundle("nano").lm
        if rank:
            add_lora(lm, rank)
        lm.transformer.checkpointing = again
        return Learner(MoshiPolicy(lm, Sampling(text_temperature=1.5)), trainer, optimiser, 0, parallel=parallel)

    learner = make()
    found = [learner.update(batch, 0)]
    # As a checkpoint has it: whole, from the first member; and every member reads all of it.
    weights, state = learner.weights(), learner.state()
    critic = None if learner.critic is None else learner.critic.state()
    if parallel is not None:
        held = [(weights, state)]
        dist.broadcast_object_list(held, src=0)
        weights, state = held[0]
    learner = make()
    learner.load_weights(weights)
    learner.load_state(state)
    if learner.critic is not None and critic is not None:
        learner.critic.load_state(critic)
    found.append(learner.update(batch, 1))
    return found, learner.weights()


def main() -> None:
    rank, folder, addresses = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    tensors = load_file(folder / "batch.safetensors")
    batch = Batch(**{name: value.bool() if name == "mask" else value for name, value in tensors.items()})
    for kind, address in zip((DataParallel, Sharded), addresses, strict=True):
        parallel = kind(rank, 2, address, torch.device("cpu"), 300.0)
        for number, case in enumerate(CASES):
            metrics, weights = run(case, batch, parallel)
            if rank == 0:
                name = f"{kind.__name__}_{number}"
                (folder / f"{name}.json").write_text(json.dumps(metrics))
                save_file({n: v.contiguous().clone() for n, v in weights.items()}, folder / f"{name}.safetensors")
        dist.monitored_barrier()  # the other may not go while the first still reads what it sent
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
