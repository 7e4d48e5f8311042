"""The cluster with real processes: the same numbers wherever the work is done, and whoever dies on the way."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from cluster_runs import metrics, options, updates, write_inputs
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from envs.errors import InputError
from rlhf_duplex.checkpoint import last_checkpoint
from rlhf_duplex.cluster.learners import LearnerGroup
from rlhf_duplex.cluster.processes import ClusterError
from rlhf_duplex.cluster.ray_cluster import RayCluster

# 20 for the run of the issue; the suite's is as long as it must be to have every accident.
UPDATES = int(os.environ.get("RLHF_DUPLEX_TEST_UPDATES", "6"))
NODE = {"num_cpus": 3, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def nodes():
    """A Ray of three nodes, each a process with processes of its own."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    # Before there is another node: this process lives on the head, and not on one that a test takes away.
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    for _ in range(2):
        cluster.add_node(**NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nano_segments):
    path = tmp_path_factory.mktemp("inputs")
    write_inputs(path, nano_segments)
    return path


def assert_same(one: list[dict], other: list[dict], tolerance: float = 1e-6) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("ppo", marks=pytest.mark.long)])
def test_the_same_metrics_wherever_the_work_is_done(algorithm, nodes, folder, tmp_path):
    def run(name, **overrides):
        return updates(folder, tmp_path / name, trainer__algorithm=algorithm, trainer__updates=3, **overrides)

    here = run("0", cluster__workers=0)
    assert here[0]["reward_std/words"] > 0
    assert here[-1]["kl"] > 0
    assert [line["staleness"] for line in here] == [0.0] * 3
    assert_same(here, run("1", cluster__workers=1))
    assert_same(here, run("2", cluster__workers=2))
    # Weights cut over two learners round otherwise in the optimiser's step; a broadcast brings them to the worker.
    cut = {"cluster.strategy": "fsdp", "cluster.learners": 2, "cluster.weights": "broadcast"}
    assert_same(here, run("cut", cluster__workers=1, **cut), tolerance=1e-5)
    last = [load_file(last_checkpoint(tmp_path / name) / "model.safetensors") for name in ("0", "cut")]
    for name, value in last[0].items():
        assert (last[1][name] - value).abs().max() < 1e-5, name
    if algorithm == "ppo":
        assert here[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # it begins at 0
        assert here[0]["value_loss"] > 0


@pytest.mark.long
def test_workers_that_are_the_learners_too(nodes, folder, tmp_path):
    here = updates(folder, tmp_path / "0")
    for strategy in ("ddp", "fsdp"):
        both = {"cluster.workers": 2, "cluster.placement": "colocated", "cluster.strategy": strategy}
        assert_same(here, updates(folder, tmp_path / strategy, **both), 1e-6 if strategy == "ddp" else 1e-5)


def test_rollouts_one_step_ahead(nodes, folder, tmp_path):
    ahead = {"trainer.ahead": "true", "trainer.updates": 5, "checkpointing.every": 3, "cluster.workers": 1}
    found = updates(folder, tmp_path / "run", **ahead)
    # The update after a checkpoint has fresh episodes, so that a resumed run is the same.
    assert [line["staleness"] for line in found] == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert found[0]["importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert abs(found[1]["importance_mean"] - 1.0) > 1e-6
    assert found[1]["ratio_first"] == pytest.approx(1.0, abs=1e-6)  # to the policy that the update begins with


def kill_soon(pid: int, seconds: float) -> None:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):  # died with its node meanwhile
            os.kill(pid, signal.SIGKILL)

    threading.Timer(seconds, kill).start()


def test_a_run_survives_deaths_and_a_node_that_goes(nodes, folder, tmp_path):
    calm = updates(folder, tmp_path / "calm", trainer__updates=UPDATES, cluster__workers=2)
    dice, happened = random.Random(0), []
    # In which step: five workers and two learners die, one node goes and one comes.
    plan = {step: [] for step in range(2 * UPDATES)}
    for kind, count in (("worker", 5), ("learner", 2)):
        for number in range(count):
            plan[1 + (number * UPDATES) // count if kind == "worker" else 2 + 3 * number].append(kind)
    plan[3].append("node")
    steps = iter(range(10**6))

    def accident(trainer):
        cluster = trainer.cluster
        for kind in plan.get(next(steps), ()):
            if kind == "node":
                homes = {process.where["node"] for process in cluster._learners.processes}
                gone = [n for n in nodes.worker_nodes if n.node_id not in homes]
                nodes.remove_node(gone[0], allow_graceful=False)
                nodes.add_node(**NODE)
            else:
                processes = cluster._learners.processes if kind == "learner" else cluster.pool.processes
                if not processes:  # all are starting
                    continue
                kill_soon(dice.choice(processes).where["pid"], dice.uniform(0.0, 1.0))
            happened.append(kind)

    stormy = updates(
        folder,
        tmp_path / "stormy",
        accident,
        trainer__updates=UPDATES,
        cluster__workers=2,
        **{"cluster.max_failures": 30, "checkpointing.every": 2},
    )
    assert happened.count("learner") == 2
    assert happened.count("worker") >= (5 if UPDATES >= 20 else 3)
    assert "node" in happened
    # No episode twice and none lost: every number is that of the run in which nobody died.
    assert [line["update"] for line in stormy] == list(range(1, UPDATES + 1))
    assert stormy == calm


def test_a_worker_that_dies_with_nothing_to_do_holds_up_no_broadcast(nodes, folder, tmp_path):
    failures = []

    def kill_after_learning(trainer):
        cluster, learn = trainer.cluster, trainer.cluster.learn

        def learn_then_kill(batch, update):
            diagnostics = learn(batch, update)
            os.kill(cluster.pool.processes[-1].where["pid"], signal.SIGKILL)
            cluster.learn = learn  # once
            return diagnostics

        if trainer.update == 0:
            cluster.learn = learn_then_kill
        failures.append(cluster.failures)

    limits = {"cluster.workers": 2, "cluster.weights": "broadcast", "cluster.timeout": 60, "cluster.max_failures": 1}
    found = updates(folder, tmp_path / "run", kill_after_learning, trainer__updates=3, **limits)
    assert [line["update"] for line in found] == [1, 2, 3]
    assert failures[-1] == 1  # the worker; no learner was given up for it


@pytest.mark.long
def test_a_worker_that_dies_in_a_broadcast_leaves_no_learner_waiting(nodes, folder, tmp_path, monkeypatch):
    call, killed = LearnerGroup.call, []

    def then_kill(group, method, *arguments):
        found = call(group, method, *arguments)
        if method == "trained_names" and not killed:  # what is asked last before the weights are sent
            killed.append(pool[0].processes[0].where["pid"])
            os.kill(killed[0], signal.SIGKILL)
        return found

    pool = []
    monkeypatch.setattr(LearnerGroup, "call", then_kill)
    limits = {"cluster.workers": 1, "cluster.weights": "broadcast", "cluster.timeout": 60, "cluster.max_failures": 1}
    cut = {"cluster.strategy": "fsdp", "cluster.learners": 2}
    found = updates(folder, tmp_path / "run", lambda trainer: pool.append(trainer.cluster.pool), **limits, **cut)
    assert killed
    assert [line["update"] for line in found] == [1, 2]


@pytest.mark.long
def test_learners_that_die_in_the_first_save_or_in_a_resume_are_started_anew(nodes, folder, tmp_path, monkeypatch):
    killed = []

    def killing(method):
        whole = getattr(RayCluster, method)

        def once(cluster, *arguments):
            if method not in killed:
                killed.append(method)
                os.kill(cluster._learners.processes[0].where["pid"], signal.SIGKILL)
            return whole(cluster, *arguments)

        monkeypatch.setattr(RayCluster, method, once)

    killing("save")
    updates(folder, tmp_path / "run", trainer__updates=1, cluster__workers=1)
    killing("restore")
    found = updates(folder, tmp_path / "run", trainer__updates=2, cluster__workers=1, resume="true")
    assert killed == ["save", "restore"]
    assert [line["update"] for line in found] == [1, 2]


def test_a_hung_worker_is_found_out_and_the_run_gives_up_honestly(nodes, folder, tmp_path):
    def stop(trainer):
        while not trainer.cluster.pool.processes:
            trainer.cluster.pool.pump(0.5)
        for process in trainer.cluster.pool.processes:
            os.kill(process.where["pid"], signal.SIGSTOP)

    limits = {"cluster.timeout": 4, "cluster.max_failures": 0, "cluster.workers": 1}
    with pytest.raises(
        ClusterError, match=r"gave up after 1 failures .*rollout worker 0 \(process \d+ on .*did not answ"
    ):
        updates(folder, tmp_path / "run", stop, **limits)


def test_an_error_in_a_worker_comes_with_its_traceback(nodes, folder, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from rewards import RewardAxis\n\n\n"
        "class Broken(RewardAxis):\n"
        "    name = 'broken'\n\n"
        "    def score_episode(self, episode):\n"
        "        return 1 / 0\n"
    )
    broken = {"rewards.broken.target": tmp_path / "broken.py", "cluster.workers": 1}
    with pytest.raises(ClusterError, match=r"(?s)rollout worker 0 .*broken\.py.*ZeroDivisionError"):
        updates(folder, tmp_path / "run", **broken)


def test_too_little_room_is_said_before_anything_is_started(nodes, folder, tmp_path):
    with pytest.raises(InputError, match=r"the run needs 101 CPUs where Ray has 9"):
        updates(folder, tmp_path / "run", cluster__workers=100)


@pytest.mark.parametrize(
    ("algorithm", "workers"),
    [("grpo", 0), ("ppo", 2), *(pytest.param(*other, marks=pytest.mark.long) for other in (("ppo", 0), ("grpo", 2)))],
)
def test_killed_and_resumed_it_is_the_same_run_to_the_bit(algorithm, workers, nodes, folder, tmp_path):
    count = UPDATES if UPDATES > 6 else 4
    same = {
        "trainer.algorithm": algorithm,
        "trainer.updates": count,
        "cluster.workers": workers,
        "checkpointing.every": count // 2,
    }
    straight = updates(folder, tmp_path / "straight", **same)
    run_dir = tmp_path / "killed"
    address = {"cluster.address": nodes.address} if workers else {}
    arguments = options(folder, run_dir, **same, **address)
    command = [sys.executable, "-m", "rlhf_duplex.cli", "train", *arguments]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 300
        # A line beyond the checkpoint, which is to be cut off again.
        while not (run_dir / "metrics.jsonl").is_file() or len(metrics(run_dir)) <= count // 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = updates(folder, run_dir, resume="true", **same)
    assert resumed == straight
    for name in ("model", "optimiser", *(["value"] if algorithm == "ppo" else [])):
        one, other = (
            load_file(last_checkpoint(run) / f"{name}.safetensors") for run in (tmp_path / "straight", run_dir)
        )
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name


def test_without_an_address_ray_is_started_though_one_runs_here(nodes):
    code = (
        "import ray; from rlhf_duplex.cluster.processes import connect; from rlhf_duplex.config import load_config;"
        "connect(load_config(None, ['cluster.workers=1']), 2); print('nodes', len(ray.nodes())); ray.shutdown()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.stdout.endswith("nodes 1\n"), process.stderr  # of `nodes` there are three


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_exit_code_0(number, nodes, folder, tmp_path):
    run_dir = tmp_path / "run"
    address = {"cluster.workers": 1, "cluster.address": nodes.address} if number == signal.SIGTERM else {}
    arguments = options(folder, run_dir, trainer__updates=1000, checkpointing__every=1000, **address)
    command = [sys.executable, "-m", "rlhf_duplex.cli", "train", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").is_file() or not metrics(run_dir):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal does it: to all processes of the command
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "go on with resume=true" in said
    done = len(metrics(run_dir))
    assert last_checkpoint(run_dir).name == f"step_{done:06d}"
