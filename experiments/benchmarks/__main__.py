"""`python -m experiments.benchmarks --json FILE`: see `README.md`."""

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description="Speed as ratios against stock Moshi, Mimi and Silero, both sides in one run, interleaved.",
        epilog="example: python -m experiments.benchmarks --json benchmarks.json",
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the results to")
    parser.add_argument("--checkpoint", default="nano", help="nano, a bundle's folder or a hub id")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="cores for both sides (0: all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the median counts")
    parser.add_argument("--small", action="store_true", help="few and short dialogues: does everything run?")
    parser.add_argument("--updates", type=int, default=0, help="also so many small updates: does memory grow?")
    arguments = parser.parse_args()
    if arguments.threads > 0:  # before PyTorch reads it
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    from rich.console import Console

    from envs.errors import InputError

    try:
        if arguments.threads < 0 or arguments.repeats < 1 or arguments.updates < 0:
            raise InputError("--threads and --updates must be at least 0 and --repeats at least 1")
        if not arguments.json.resolve().parent.is_dir():
            raise InputError(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist")
        from experiments.benchmarks.run import run

        console = Console(width=None if sys.stdout.isatty() else 110)
        results = run(arguments, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    temporary = arguments.json.with_name(f".{arguments.json.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, arguments.json)
    console.print(f"wrote {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
