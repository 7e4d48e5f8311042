"""What `rlhf-duplex curate` can be told: one dataclass that is the command line's options as well.

Imports nothing heavy, so that `--help` answers at once.
"""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhf_duplex.options import add_options, option

FORMATS = ("auto", "moshi-finetune", "stereo", "seamless", "fisher", "candor")


@dataclass(frozen=True)
class Criteria:
    """When a stretch of a dialogue is a segment of an axis (arXiv 2606.11167, section 3). Seconds throughout.

    Where the paper is silent, the option says so.
    """

    min_silence: float = option(0.2, "a silence from this length on ends an inter-pausal unit (the paper gives none)")
    max_pause: float = option(1.0, "a silence of at most this is a pause within an utterance")
    pause_min: float = option(4.0, "pause_handling: the user's utterance lasts at least this")
    pause_min_silence: float = option(
        0.35,
        "pause_handling: one of the pauses lasts at least this (the paper gives none; shorter silences part phrases, "
        "come and go with noise and codec, and tempt nobody to take the turn)",
    )
    turn_min: float = option(5.0, "turn_taking: each of the two utterances lasts at least this")
    turn_max_gap: float = option(0.4, "turn_taking: at most this between the two utterances")
    turn_max_overlap: float = option(
        0.2,
        "turn_taking: the agent may begin this long before the user ends; more interrupts (the paper gives none)",
    )
    backchannel_min: float = option(5.0, "backchannel: the user's utterance lasts at least this")
    backchannel_max: float = option(1.0, "backchannel: every utterance of the agent meanwhile lasts at most this")
    interruption_min: float = option(3.0, "user_interruption: each of the four utterances lasts at least this")
    max_seconds: float = option(120.0, "a longer segment is left out, 0: none is (the paper gives none)")


@dataclass(frozen=True)
class VoiceActivity:
    """How speech is found: by Silero, or as the corpus has it."""

    vad: str = option(
        "corpus", "whose speech times: the corpus' own where it has them, else silero's", choices=("corpus", "silero")
    )
    vad_threshold: float = option(
        0.5, "silero: probability from which a window of 32 ms is speech", above=0, below=1, must="lie between 0 and 1"
    )
    vad_min_speech: float = option(0.2, "silero: shorter speech is dropped (seconds)")
    length_tolerance: float = option(
        1.0,
        "the two files of a recording, or a file and what its corpus says of it, may differ in length by this; beyond "
        "it their clocks drift or one is truncated, and the recording is left out (seconds)",
    )


@dataclass(frozen=True)
class CurateOptions:
    """Everything else that `curate` is told."""

    format: str = option("auto", "what the corpus is; auto looks at its files", choices=FORMATS)
    user_channel: str = option(
        "both",
        "who is taken as the user: each in turn, or only channel 0 or 1 (of two mono files: the first or second)",
        choices=("both", "0", "1"),
    )
    per_axis: int = option(
        2000, "at most so many segments of each axis, spread over speakers and recordings", at_least=1
    )
    heldout: float = option(
        0.0,
        "this share of the recordings goes to a manifest of its own, NAME.heldout.jsonl, to evaluate on; nobody is a "
        "user in both",
        below=1,
        must="be a share of at least 0 and below 1",
    )
    seed: int = option(0, "of the choices")
    workers: int = option(0, "so many Ray workers, a recording each at a time; 0 works in the process itself")
    strict: bool = option(False, "stop at the first recording or transcript that is wrong, instead of reporting it")
    examples: int = option(3, "segments of each axis shown on the page, drawn at random")
    encode: str | None = option(
        None,
        "also encode the users' audio for this checkpoint ('nano', a bundle's folder or a hub id)",
        metavar="CHECKPOINT",
    )
    lead_in: float = option(1.0, "with --encode: the training's context.lead_in (seconds; part of what is encoded)")
    codes_cache: str = option("auto", "with --encode: folder of the code cache; auto: the one that training looks in")
    device: str = option("cpu", "with --encode: where the codec runs, such as cuda")
    criteria: Criteria = field(default_factory=Criteria)
    voice: VoiceActivity = field(default_factory=VoiceActivity)

    @property
    def users(self) -> tuple[int, ...]:
        """The sides that are taken as users."""
        return (0, 1) if self.user_channel == "both" else (int(self.user_channel),)


HELP = """examples:
  rlhf-duplex curate recordings/ --out data/segments.jsonl --heldout 0.1
  rlhf-duplex curate fisher/ --out data/fisher.jsonl --workers 16 --per-axis 2000 --seed 1
  rlhf-duplex curate dialogues.jsonl --out data/segments.jsonl --user-channel 1 --encode nano

Killed or stopped, the same command goes on where it was. Thresholds may be changed afterwards: speech is not detected
again. Train on the result with: rlhf-duplex train segments=data/segments.jsonl evaluation.segments=HELD_OUT"""

_GROUPS = (
    ("", CurateOptions),
    ("criteria (seconds, arXiv 2606.11167, section 3)", Criteria),
    ("speech", VoiceActivity),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option as an argument of the command."""
    parser.add_argument(
        "corpus",
        type=Path,
        help="moshi-finetune .jsonl, a folder of stereo files, or the folder of Seamless Interaction, Fisher or Candor",
    )
    parser.add_argument("--out", type=Path, required=True, help="manifest to write; the page lies beside it as .html")
    for title, options in _GROUPS:
        add_options(parser.add_argument_group(title) if title else parser, options)


def from_arguments(arguments: argparse.Namespace) -> CurateOptions:
    """The options that a command line gave."""

    def given(options: type) -> dict[str, Any]:
        return {item.name: getattr(arguments, item.name) for item in fields(options) if hasattr(arguments, item.name)}

    return CurateOptions(
        **given(CurateOptions), criteria=Criteria(**given(Criteria)), voice=VoiceActivity(**given(VoiceActivity))
    )
