"""The arguments of `rlhf-duplex pairs` and `rlhf-duplex converse`. No heavy imports: `--help` answers at once."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf_duplex.data.pair_options import PairOptions

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
_HELP = {
    "seed": "of everything random",
    "device": "cpu, cuda, cuda:1...",
    "dtype": "of the policy's weights: float32 or bfloat16",
    "heldout": "share of the dialogues whose pairs are held out",
    "balance": "cut every kind to as many pairs as the rarest has",
    "context": "conversations: seconds of dialogue kept before a problem",
    "gap": "conversations: seconds of silence between the user's end and a moved reply",
    "response": "conversations: a turn with no reply for so many seconds is a problem",
    "accept": "conversations: a drawn reply must begin within so many seconds",
    "reply": "conversations: seconds of room for a drawn reply",
    "candidates": "conversations: replies drawn for an unanswered turn; the best is taken",
    "content_at_most": "conversations: a content mark (1 to 5) so low is a problem",
    "max_pairs": "conversations: pairs of one dialogue",
    "strict": "conversations: a bad recording ends the run instead of being skipped",
    "group_size": "rollouts: episodes of a segment",
    "segment_pairs": "rollouts: most pairs of a segment: best against worst, second best against second worst...",
    "margin": "rollouts: least difference of reward between chosen and rejected",
    "lead_in": "rollouts: seconds of silence before a segment",
    "batch_size": "episodes, or dialogues, at once",
    "text_temperature": "of the policy",
    "audio_temperature": "of the policy",
    "audio_top_k": "of the policy; 0 draws from all codes",
}


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
    for field in fields(PairOptions):
        _add_option(pairs, field.name, field.default)
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
    wanted = ("seed", "device", "dtype", "lead_in", "batch_size", "text_temperature", "audio_temperature")
    for field in fields(PairOptions):
        if field.name in (*wanted, "audio_top_k"):
            _add_option(converse, field.name, field.default)
    _add_prompt(converse)


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_argument_group("prompt before every dialogue (PersonaPlex; as prompt.* of a configuration)")
    prompt.add_argument("--prompt-voice", metavar="FILE", help="a recording of the voice that the agent is to have")
    prompt.add_argument("--prompt-text", metavar="TEXT", help="its role, in words")


def _add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=_HELP[name])
    else:
        text = f"{_HELP[name]} (default: {default})"
        parser.add_argument(flag, type=type(default), default=default, metavar="X", help=text)
