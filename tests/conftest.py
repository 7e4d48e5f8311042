"""What all tests share: threads that do not fight over the cores, and the nano bundle, the real thing in small."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("NO_TORCH_COMPILE", "1")


import pytest
import soundfile
import torch

# Tests leave the user's own cache alone; the folder is one of this machine's temporary ones.
os.environ["RLHF_DUPLEX_CACHE"] = tempfile.mkdtemp(prefix="rlhf_duplex_cache_")
atexit.register(shutil.rmtree, os.environ["RLHF_DUPLEX_CACHE"], ignore_errors=True)

torch.set_num_threads(1)  # pytest runs one worker a core


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory):
    """Folders of a test's axes, in which Python looks for their neighbours, are not those of the next test."""
    yield
    base = str(tmp_path_factory.getbasetemp())
    sys.path[:] = [folder for folder in sys.path if not folder.startswith(base)]


@pytest.fixture(scope="session")
def nano():
    from rlhf_duplex.policy.bundle import load_bundle

    return load_bundle("nano")


@pytest.fixture(scope="session")
def silero():
    from envs.speech import SileroDetector

    return SileroDetector()


@pytest.fixture(scope="session")
def nano_segments():
    from envs.segments import read_manifest
    from rlhf_duplex.inputs import NANO_DATA

    return read_manifest(NANO_DATA / "heldout" / "segments.jsonl")


@pytest.fixture(scope="session")
def one_of_each(nano_segments):
    """The shortest held-out segment of every axis."""
    axes = sorted({s.axis for s in nano_segments})
    return [min((s for s in nano_segments if s.axis == axis), key=lambda s: s.duration) for axis in axes]


@pytest.fixture(scope="session")
def write_mp3():
    """A function that writes an mp3: whole, a share of its bytes, or without the tag that tells its length."""

    def write(path, audio, rate, share=1.0, tag=True, mode="VARIABLE"):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(path), audio, rate, format="MP3", compression_level=0.5, bitrate_mode=mode)
        data = path.read_bytes()
        if not tag:
            begins = max(data.find(b"Xing"), data.find(b"Info"))
            data = data[data.index(b"\xff", begins + 156) :]  # LAME's tag has 156 bytes, padded with zeros
        path.write_bytes(data[: round(share * len(data))])
        return path

    return write
