"""How long an mp3 is, where libsndfile is wrong about it: its frames' headers, which libsndfile does not show.

A file of changing bitrate begins with a frame that holds no sound and tells how many follow (a tag "Xing", or "Info"
where the bitrate is constant). Without it libsndfile takes the first frame's bitrate for that of all. Where the bitrate
changes, the length is a guess, and so are the places that reading from the middle begins at. Where it is constant, both
are right, but for the ID3 tag in front, whose bytes are counted in the length as if they were sound.
"""

from pathlib import Path
from typing import NamedTuple

_KBPS = (  # by index, layer III: MPEG 1, and MPEG 2 and 2.5
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the version's bits
_PLACES, _PLACE_BYTES = 16, 16384  # of a file that are looked at: several frames each
_FIRST_BYTES = 65536  # in which the first frame must lie


class _Frame(NamedTuple):
    """A frame's header: where it begins, its bitrate (kbit/s), how many bytes it has, and what never changes."""

    begins: int
    kbps: int
    size: int
    kind: tuple[int, int]  # the version's bits, and Hz

    @property
    def ends(self) -> int:
        return self.begins + self.size


def seconds_too_long(path: Path) -> float | None:
    """Seconds that libsndfile counts too many of an mp3 (layer III), those of an ID3 tag; None where it only guesses.

    It guesses where the bitrate changes and the file does not say how many frames it has. Frames at a few places tell
    whether the bitrate changes, so that no more than a megabyte is read.
    """
    with path.open("rb") as file:
        begins = tag_bytes = 0
        while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
            tag_bytes = 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            tag_bytes += 10 if tag[5] & 16 else 0  # a footer
            begins += tag_bytes  # of several tags, libsndfile counts the last alone
            file.seek(begins)
        file.seek(begins)
        head = file.read(_FIRST_BYTES)
        frames = _frames(head)
        if not frames or _says_length(head[frames[0].begins : frames[0].ends]):
            return 0.0
        bitrates = {frame.kbps for frame in frames}
        size = path.stat().st_size
        for place in range(1, _PLACES):
            file.seek(begins + (size - begins) * place // _PLACES)
            bitrates |= {f.kbps for f in _frames(file.read(_PLACE_BYTES)) if f.kind == frames[0].kind}
    return 8 * tag_bytes / (1000 * frames[0].kbps) if len(bitrates) == 1 else None


def _says_length(frame: bytes) -> bool:
    at = next((at for name in (b"Xing", b"Info") if (at := frame.find(name, 4, 64)) > 0), None)
    return at is not None and len(frame) > at + 7 and bool(frame[at + 7] & 1)  # the flag of the number of frames


def _frames(data: bytes) -> list[_Frame]:
    """The frames that follow each other without a gap from the first two on that do."""
    at = data.find(b"\xff")
    while at >= 0:
        frame = _frame(data, at)
        following = frame and _frame(data, frame.ends)
        if frame and following and following.kind == frame.kind:
            found = [frame]
            while following and following.kind == frame.kind:
                found.append(following)
                following = _frame(data, following.ends)
            return found
        at = data.find(b"\xff", at + 1)
    return []


def _frame(data: bytes, at: int) -> _Frame | None:
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:  # in step, and of layer III
        return None
    version, bitrate, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    kbps, hertz = _KBPS[version != 3][bitrate], _RATES[version][rate]
    size = (144 if version == 3 else 72) * 1000 * kbps // hertz + (data[at + 2] >> 1 & 1)
    return _Frame(at, kbps, size, (version, hertz))
