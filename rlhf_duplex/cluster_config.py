"""Where a run's work is done: the configuration's `cluster`."""

from dataclasses import dataclass

from envs.errors import InputError
from rlhf_duplex.options import option


@dataclass
class ClusterConfig:
    """Where the work is done; nothing here changes what is learned, but for rounding.

    Attributes:
        workers: rollout workers, each a process of Ray's; 0 does everything in the process itself.
        learners: members of the learner group.
        placement: `split`: workers and learners have processors of their own; `colocated`: a process for each worker
            rolls out its share and then learns from its share (`learners` is then `workers`).
        strategy: `ddp`: each learner has all weights; `fsdp`: they are cut over the learners (FSDP2).
        mixed_precision: `none` or `bfloat16` (of what `fsdp` computes with; the weights that it keeps are `dtype`).
        rollout_dtype: number type of the workers' copy of the policy, where it is not the run's `dtype`: `bfloat16`
            beside learners that keep float32 weights.
        weights: how workers get the learner's: `object_store` (what is trained, LoRA or all, through Ray's object
            store) or `broadcast` (a collective operation, for full fine-tuning over nodes).
        address: of a Ray cluster that runs already (`auto` finds it); empty starts one here and ends it with the run.
        cpus, gpus: of a process; GPUs count where `device` is cuda.
        timeout: seconds that a rollout, an update or a transfer may take before its process counts as hung.
        start_timeout: seconds that a process may take to start and load its model.
        max_failures: processes that may die or hang before the run gives up.
        object_store_gb: of the Ray that is started here; 0 is Ray's own choice.
        dashboard: start Ray's dashboard with it.
    """

    workers: int = 0
    learners: int = option(1, above=0)
    placement: str = option("split", choices=("split", "colocated"))
    strategy: str = option("ddp", choices=("ddp", "fsdp"))
    mixed_precision: str = option("none", choices=("none", "bfloat16"))
    rollout_dtype: str = option("", choices=("", "float32", "bfloat16"))
    weights: str = option("object_store", choices=("object_store", "broadcast"))
    address: str = ""
    cpus: float = 1.0
    gpus: float = 1.0
    timeout: float = option(1800.0, above=0)
    start_timeout: float = option(600.0, above=0)
    max_failures: int = 10
    object_store_gb: float = 0.0
    dashboard: bool = False


@dataclass
class DryRunConfig:
    """What `--dry-run` reckons with. The machine's figures: see `rlhf_duplex.step_model.Machine`.

    Attributes:
        seconds: of an episode, lead-in and context included, where the segments are not there to be asked.
        gpu_gib: memory of a GPU.
        bandwidth, flops, near, far, node: of the machine.
    """

    seconds: float = option(30.0, above=0)
    gpu_gib: float = option(80.0, above=0)
    bandwidth: float = option(3.35e12, above=0)
    flops: float = option(989e12, above=0)
    near: float = option(300e9, above=0)
    far: float = option(40e9, above=0)
    node: int = option(8, above=0)


def check_cluster(cluster: ClusterConfig, ahead: bool) -> None:
    """Hold the cluster's options against one another; `ahead`: whether rollouts run beside the update.

    Raises:
        InputError: the first that is wrong.
    """
    if not cluster.workers and (cluster.learners > 1 or cluster.strategy == "fsdp" or cluster.placement != "split"):
        raise InputError("cluster.workers is 0, one process: learners, strategy and placement need workers")
    if cluster.mixed_precision != "none" and cluster.strategy != "fsdp":
        raise InputError("cluster.mixed_precision needs cluster.strategy=fsdp: without it, use dtype=bfloat16")
    shared = cluster.workers == 0 or (cluster.placement == "colocated" and cluster.strategy == "ddp")
    if cluster.rollout_dtype and shared:
        raise InputError("cluster.rollout_dtype: the policy that acts is here the one that is trained: use dtype")
    if ahead and cluster.weights == "broadcast":
        raise InputError("trainer.ahead needs cluster.weights=object_store: a broadcast waits for the learner")
    if ahead and (not cluster.workers or cluster.placement == "colocated"):
        raise InputError("trainer.ahead needs rollout workers beside the learner: cluster.workers=1, placement=split")
