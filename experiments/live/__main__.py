"""`python -m experiments.live`: see `README.md`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.live",
        description="Base, trained by replay and trained live, compared in live dialogues, for some seeds.",
        epilog="examples:\n  python -m experiments.live --out runs/live --seeds 0 1 2\n"
        "  python -m experiments.live --out runs/live --only-replay --replay RUN0 RUN1 RUN2\n"
        "  python -m experiments.live trainer.updates=20 --out runs/live_on --start RUN0 RUN1 RUN2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/live"), help="run folder; what is there stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--checkpoint", default="nano", help="the base: nano or a bundle's folder")
    parser.add_argument(
        "--start", type=Path, nargs="*", default=[], help="runs to train on from, one a seed, not the base"
    )
    parser.add_argument("--dialogues", type=int, default=32, help="live dialogues that are compared")
    parser.add_argument("--replay", type=Path, nargs="*", default=[], help="run folders trained by replay, one a seed")
    parser.add_argument("--only-replay", action="store_true", help="train nothing live: base against replay alone")
    parser.add_argument("--tiny", action="store_true", help="one update of a few episodes: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all training")
    arguments = parser.parse_intermixed_args(words)

    from envs.errors import InputError
    from experiments.live.compare import run
    from rlhf_duplex.run_folder import make_console

    try:
        path = run(arguments, make_console())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
