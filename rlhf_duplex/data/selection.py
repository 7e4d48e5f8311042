"""Some of many candidates, chosen with a seed and spread over speakers and recordings."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from envs.errors import InputError
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

    What a speaker has said is taken from each of their recordings in turn, and within a round no recording comes a
    second time before every other has come once.

    The choice depends on the seed and on the candidates, not on their order.
    """

    def draw(item: Found) -> bytes:
        return hashlib.sha256(f"{seed}:{item.id}".encode()).digest()

    shuffled = sorted(found, key=draw)
    # Within a speaker, the first of each of their recordings before the second of any; then the same over all of them.
    in_own = _ranks([(item.speaker, item.recording.id) for item in shuffled])
    by_speaker = [item for _, item in sorted(zip(in_own, shuffled, strict=True), key=lambda entry: entry[0])]
    of_speaker = _ranks([item.speaker for item in by_speaker])
    rounds = sorted(zip(of_speaker, by_speaker, strict=True), key=lambda entry: (entry[0], draw(entry[1])))
    of_recording = _ranks([(turn, item.recording.id) for turn, item in rounds])
    order = sorted(zip(of_recording, rounds, strict=True), key=lambda entry: (entry[1][0], entry[0]))
    return [item for _, (_, item) in order[:count]]


def held_out_recordings(recordings: Sequence[Recording], users: Sequence[int], share: float, seed: int) -> set[str]:
    """Ids of the recordings that are held out: about this share of them, and nobody is a user on both sides.

    Recordings that hang together by their users stay together: parts are taken at random while they fit into the share,
    or the smallest where none does.

    Args:
        users: the sides that are taken as users, 0, 1 or both.
        seed: of the choice.

    Raises:
        InputError: all recordings hang together by their users, so that none can be held out.
    """
    known: dict[str, str] = {}  # from a user or a recording to one that it hangs together with; a root to itself

    def root(name: str) -> str:
        while known.setdefault(name, name) != name:
            known[name] = known[known[name]]
            name = known[name]
        return name

    for recording in sorted(recordings, key=lambda recording: recording.id):
        for user in users:
            known[root(f"user {recording.sides[user].speaker}")] = root(f"recording {recording.id}")
    parts: dict[str, set[str]] = {}
    for recording in recordings:
        parts.setdefault(root(f"recording {recording.id}"), set()).add(recording.id)
    if len(parts) < 2:
        raise InputError(
            f"--heldout {share:g}: the {len(recordings)} recordings cannot be parted, since they share their users: "
            "leave --heldout out, or curate another corpus to evaluate on"
        )
    wanted, held = round(share * len(recordings)), set[str]()
    for name in sorted(parts, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if len(held) + len(parts[name]) <= wanted:
            held |= parts[name]
    return held or min(parts.values(), key=lambda part: (len(part), min(part)))


def _ranks(groups: Sequence[Hashable]) -> list[int]:
    """For each item, how many of its group come before it."""
    seen: Counter[Hashable] = Counter()
    ranks = []
    for group in groups:
        ranks.append(seen[group])
        seen[group] += 1
    return ranks
