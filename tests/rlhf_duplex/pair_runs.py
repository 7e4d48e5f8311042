"""What the tests of pairs begin with: a few segments of nano's, and the command."""

from envs.segments import read_manifest, write_manifest
from rlhf_duplex.cli import main
from rlhf_duplex.inputs import NANO_DATA


def write_some(folder, **counts):
    """A manifest of so many segments of each axis."""
    segments = read_manifest(NANO_DATA / "train" / "segments.jsonl")
    chosen = [s for axis, count in counts.items() for s in [s for s in segments if s.axis == axis][:count]]
    write_manifest(folder / "segments.jsonl", chosen)
    return folder / "segments.jsonl"


def pairs_command(corpus, out, *more, source="conversations"):
    return main(["pairs", "--from", source, str(corpus), "--out", str(out), *more])
