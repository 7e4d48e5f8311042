"""How fast nano talks with scripted users: `python -m experiments.live.speed`.

`real_time` is seconds of dialogue a second over all dialogues at once (16 dialogues of 31 s in 20 s are 24.8). It is
measured on the wall and on the processor; on a machine that others use too, the second is what the work costs.
"""

import argparse
import json
import os
import time

import torch

from envs.cores import cores
from envs.segments import read_manifest
from envs.speech import SileroDetector
from rlhf_duplex.inputs import NANO_DATA
from rlhf_duplex.live import live_environment
from rlhf_duplex.policy.bundle import load_bundle
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.rollout import rollout


def measure(dialogues: int, seconds: float) -> dict[str, float]:
    """One run, after a short one to warm up."""
    bundle, detector = load_bundle("nano"), SileroDetector()
    segments = read_manifest(NANO_DATA / "train" / "segments.jsonl")
    for length in (2.0, seconds):
        env, chosen = live_environment(segments, bundle.codec, detector, dialogues, length, 1.0, 0)
        wall, processor = time.perf_counter(), time.process_time()
        rollout(MoshiPolicy(bundle.lm), env, chosen, list(range(dialogues)), [0.0] * dialogues)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    played = dialogues * (seconds + 1.0)
    return {
        "dialogues": dialogues,
        "seconds": played,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "real_time": played / wall,
        "real_time_a_processor_second": played / processor,
        "cores": cores(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.live.speed", description=__doc__)
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores()))
    print(json.dumps(measure(arguments.dialogues, arguments.seconds), indent=1))


if __name__ == "__main__":
    main()
