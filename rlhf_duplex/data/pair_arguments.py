"""The arguments of `rlhf-duplex pairs` and `rlhf-duplex converse`. No heavy imports: `--help` answers at once."""

import argparse
from pathlib import Path
from typing import Any

from rlhf_duplex.data.pair_options import PairOptions
from rlhf_duplex.options import add_options

SOURCES = ("conversations", "rollouts")
PAIRS_HELP = """sources:
  conversations  CORPUS is a JSON Lines list ({"path", "duration"}) or a folder of stereo recordings, left agent, right
                 user, each with its words beside it (x.wav, x.json), as moshi-finetune has them; `converse` writes such
                 logs of a policy. Timing problems are found by rule; with a judge, content problems too.
  rollouts       SEGMENTS is a manifest (segments.jsonl), or nano.

examples:
  rlhf-duplex converse nano --checkpoint nano --out logs
  rlhf-duplex pairs --from conversations logs --checkpoint nano --out pairs.jsonl
  rlhf-duplex pairs --from conversations logs --checkpoint nano --out pairs.jsonl \\
      --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3-8B
  rlhf-duplex pairs --from rollouts segments.jsonl --checkpoint nano --out pairs.jsonl --group-size 16 --margin 0.5

A run that was stopped, or whose judge did not answer, goes on with the same command."""
CONVERSE_HELP = """examples:
  rlhf-duplex converse nano --checkpoint nano --out logs
  rlhf-duplex converse segments.jsonl --checkpoint runs/quickstart/checkpoints/step_000044 --out logs --samples 4

The folder is a corpus for `rlhf-duplex pairs --from conversations`."""


def add_commands(commands: Any) -> None:
    """Add both commands to the parser's subcommands."""
    text = "make preference pairs of logged conversations or of rollouts"
    pairs = commands.add_parser(
        "pairs",
        help=text,
        description=text,
        epilog=PAIRS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pairs.add_argument("corpus", metavar="CORPUS | SEGMENTS")
    pairs.add_argument("--from", dest="source", choices=SOURCES, required=True, help="what the corpus is")
    pairs.add_argument("--checkpoint", default="nano", help="nano, a bundle's folder or a hub id (default: nano)")
    pairs.add_argument("--out", type=Path, required=True, help="the file of pairs, such as pairs.jsonl")
    add_options(pairs, PairOptions)
    judge = pairs.add_argument_group("content problems (conversations)")
    judge.add_argument("--judge-url", help="an endpoint that speaks OpenAI's chat completions, up to and with /v1")
    judge.add_argument("--judge-model", help="the endpoint's name of the model")
    judge.add_argument("--judge-key-variable", metavar="NAME", help="environment variable that holds the key")
    judge.add_argument(
        "--judge-timeout", type=float, default=60.0, metavar="X", help="seconds for a call (default: 60)"
    )
    judge.add_argument(
        "--judge-retries", type=int, default=4, metavar="X", help="calls after a failed one (default: 4)"
    )
    judge.add_argument("--synthesiser", help="speaks rewrites: hibari (nano's voice) or moshi (default: by checkpoint)")
    judge.add_argument("--voice", help="of the synthesiser moshi")
    page = pairs.add_argument_group("page to look at and listen to")
    page.add_argument("--page-pairs", type=int, default=4, help="pairs of each kind on the page; 0 writes none (4)")

    _add_prompt(pairs)

    text = "play recorded users to a policy and log the conversations"
    converse = commands.add_parser(
        "converse",
        help=text,
        description=text,
        epilog=CONVERSE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    converse.add_argument("segments", metavar="SEGMENTS", help="a manifest, or nano")
    converse.add_argument("--checkpoint", default="nano", help="nano, a bundle's folder or a hub id (default: nano)")
    converse.add_argument("--out", type=Path, required=True, help="the folder of the logs")
    converse.add_argument("--samples", type=int, default=1, help="dialogues with each user (default: 1)")
    converse.add_argument("--tail", type=float, default=4.0, help="seconds after a segment (default: 4.0)")
    drawn = ("text_temperature", "audio_temperature", "audio_top_k")
    add_options(converse, PairOptions, ("seed", "device", "dtype", "lead_in", "batch_size", *drawn))
    _add_prompt(converse)


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_argument_group("prompt before every dialogue (PersonaPlex; as prompt.* of a configuration)")
    prompt.add_argument("--prompt-voice", metavar="FILE", help="a recording of the voice that the agent is to have")
    prompt.add_argument("--prompt-text", metavar="TEXT", help="its role, in words")
