"""A group of two learners, data parallel or with its weights cut over both (FSDP2 on gloo), learns as one does."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_member import CASES, run
from safetensors.torch import load_file, save_file

from envs.speech import EnergyDetector
from envs.vector import DuplexDialogueVectorEnv
from rlhf_duplex.batch import make_batch
from rlhf_duplex.parallel import Alone
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.rollout import rollout

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def batch(nano, one_of_each):
    short = [replace(s, end=s.start + seconds) for s, seconds in zip(one_of_each, (1.2, 0.8, 1.6, 0.64), strict=True)]
    policy = MoshiPolicy(nano.lm, Sampling(text_temperature=1.5))
    env = DuplexDialogueVectorEnv(short, nano.codec, EnergyDetector(), lead_in=0.16)
    episodes = rollout(policy, env, [*short, short[0]], list(range(5)), [0.0] * 5)
    return make_batch(episodes, torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2]), 12.5, torch.device("cpu"))


@pytest.fixture(scope="module")
def pair(batch, tmp_path_factory):
    """What two learners in processes of their own made of the batch."""
    folder = tmp_path_factory.mktemp("pair")
    save_file(
        {name: value.contiguous() for name, value in vars(batch).items() if value is not None},
        folder / "batch.safetensors",
    )
    with socket.socket() as one, socket.socket() as other:
        addresses = []
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{probe.getsockname()[1]}")
    command = [sys.executable, str(Path(__file__).with_name("parallel_member.py"))]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    members = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *addresses],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for member in members:
        _, error = member.communicate(timeout=500)
        assert member.returncode == 0, error
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=["grpo", "ppo", "lora"])
@pytest.mark.parametrize("kind", ["DataParallel", "Sharded"])
def test_two_learners_are_one(kind, number, batch, pair):
    metrics, weights = run(CASES[number], batch, None)
    found = json.loads((pair / f"{kind}_{number}.json").read_text())
    assert metrics[1]["kl"] > 0
    for one, two in zip(metrics, found, strict=True):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    saved = load_file(pair / f"{kind}_{number}.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        # A step of Adam's is as large as the rate whatever the gradient, so that a gradient of 0 shows its rounding.
        assert (saved[name] - value).abs().max() < 2e-5, name


def test_members_share_microbatches_and_meet_in_every_one():
    parts = list(torch.arange(5).split(1))
    members = [Alone() for _ in range(3)]
    for rank, member in enumerate(members):
        member.rank, member.world = rank, 3
    shares = [member.share(parts) for member in members]
    assert [[int(part) for part, counts in share if counts] for share in shares] == [[0, 3], [1, 4], [2]]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert shares[2][1][1] is False
