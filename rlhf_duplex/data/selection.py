"""Some of many candidates, chosen with a seed and spread over speakers and recordings."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_duplex.data.criteria import Candidate
from rlhf_duplex.data.recordings import Recording


@dataclass(frozen=True)
class Found:
    """A candidate and where it is.

    Attributes:
        recording: which one.
        user: the side that is the user, 0 or 1.
        candidate: axis, times and events.
    """

    recording: Recording
    user: int
    candidate: Candidate

    @property
    def id(self) -> str:
        """The segment's id: the same whatever else is found."""
        return f"{self.recording.id}-u{self.user}-{self.candidate.axis}-{round(1000 * self.candidate.start):08d}"

    @property
    def speaker(self) -> str:
        return self.recording.sides[self.user].speaker


def spread(found: Sequence[Found], count: int, seed: int) -> list[Found]:
    """At most `count` of them, in random order: every speaker's first before any speaker's second, and so on.

    What a speaker has said is taken from each of their recordings in turn.

    The choice depends on the seed and on the candidates, not on their order.
    """

    def draw(item: Found) -> bytes:
        return hashlib.sha256(f"{seed}:{item.id}".encode()).digest()

    shuffled = sorted(found, key=draw)
    of_recording: dict[tuple[str, str], int] = defaultdict(int)
    by_speaker: dict[str, list[tuple[int, int, Found]]] = defaultdict(list)
    for place, item in enumerate(shuffled):
        key = (item.speaker, item.recording.id)
        by_speaker[item.speaker].append((of_recording[key], place, item))
        of_recording[key] += 1
    ranked = [
        (rank, place, item)
        for own in by_speaker.values()
        for rank, (_, place, item) in enumerate(sorted(own, key=lambda entry: entry[:2]))
    ]
    return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])[:count]]
