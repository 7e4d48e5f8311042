"""`python -m experiments.benchmarks --json FILE`: see `README.md`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description="Speed as ratios against stock Moshi, Mimi and Silero, both sides in one run, interleaved.",
        epilog="examples:\n  python -m experiments.benchmarks --json benchmarks.json\n"
        "  python -m experiments.benchmarks gpu\n"
        "  python -m experiments.benchmarks gpu --small --device cpu --dtype float32",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=("ratios", "gpu"),
        default="ratios",
        help="ratios against the stock way (default), or the 7B's real shapes on a GPU",
    )
    parser.add_argument("--json", type=Path, help="file to write the results to (default: benchmarks.json, gpu.json)")
    parser.add_argument("--checkpoint", default="nano", help="of the ratios: nano, a bundle's folder or a hub id")
    parser.add_argument("--device", help="cpu, cuda, cuda:1... (default: cpu; of gpu: cuda)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; of gpu: bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="cores for both sides (0: all)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the median counts")
    parser.add_argument("--small", action="store_true", help="few and short dialogues: does everything run?")
    parser.add_argument("--updates", type=int, default=0, help="also so many small updates: does memory grow?")
    arguments = parser.parse_args()
    on_gpu = arguments.part == "gpu"
    arguments.json = arguments.json or Path("gpu.json" if on_gpu else "benchmarks.json")
    arguments.device = arguments.device or ("cuda" if on_gpu else "cpu")
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    if arguments.threads > 0:  # before PyTorch reads it
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    from rich.console import Console

    from envs.errors import InputError

    try:
        if arguments.threads < 0 or arguments.repeats < 1 or arguments.updates < 0:
            raise InputError("--threads and --updates must be at least 0 and --repeats at least 1")
        if not arguments.json.resolve().parent.is_dir():
            raise InputError(f"--json {arguments.json}: the folder {arguments.json.parent} does not exist")
        from envs.files import write_text
        from experiments.benchmarks import gpu, run

        console = Console(width=None if sys.stdout.isatty() else 110)

        def keep(results: dict[str, Any]) -> None:
            write_text(arguments.json, json.dumps(results, indent=2) + "\n")

        keep(gpu.run(arguments, console, keep) if on_gpu else run.run(arguments, console))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"wrote {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
