"""Codes of users' audio on disk: encoded once, by content and codec, for every later run.

An entry is a safetensors file named after the audio's content, in a folder named after the codec's; it says both again,
with a checksum of the codes, and one that does not agree (truncated, damaged, put there under another's name) is made
anew. Codes do not depend on the manifest, the recording's name or the run, so that all of them share a cache.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from envs.codec import Codec
from envs.errors import InputError
from envs.files import replacing
from rlhf_duplex.policy.codec import MimiCodec, mimi_fingerprint


def cache_folder(name: str) -> Path | None:
    """The folder that a `codes_cache` option means: `auto` the user's (`RLHF_DUPLEX_CACHE`, else `XDG_CACHE_HOME`, else
    `~/.cache`), `none` none, anything else itself."""
    if name != "auto":
        return None if name == "none" else Path(name)
    own = os.environ.get("RLHF_DUPLEX_CACHE")
    if own:
        return Path(own) / "codes"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_duplex" / "codes"


def codec_key(codec: MimiCodec) -> str:
    """What tells one codec from another: Mimi's weights, its rates, and how many codebooks a user has."""
    rates = f"{codec.sample_rate}:{codec.frame_rate}:{codec.user_codebooks}"
    return hashlib.sha256(f"{rates}:{mimi_fingerprint(codec.mimi)}".encode()).hexdigest()[:32]


@dataclass
class CodeCache:
    """Codes by content and codec.

    Attributes:
        folder: of all codecs' codes.
        codec: what encodes what is not there.
        encoded, reused: how many were made and how many were there already; `damaged`: of those made, how many were
            there but not as they should be.
    """

    folder: Path
    codec: MimiCodec
    encoded: int = 0
    reused: int = 0
    damaged: int = 0

    def __post_init__(self) -> None:
        self._codec_key = codec_key(self.codec)
        try:
            self._home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"code cache {self.folder} cannot be written ({error}): choose another with codes_cache=FOLDER, "
                "or codes_cache=none"
            ) from error

    @property
    def _home(self) -> Path:
        return self.folder / self._codec_key

    def encode(self, codec: Codec, audio: np.ndarray) -> torch.Tensor:
        """Codes `(user_codebooks, T)` int64, on the codec's device, of audio `(N,)` float32, N whole frames."""
        digest = hashlib.sha256(np.ascontiguousarray(audio, dtype=np.float32).tobytes()).hexdigest()[:40]
        path = self._home / digest[:2] / f"{digest}.safetensors"
        shape = (codec.user_codebooks, len(audio) // codec.frame_samples)
        found = self._read(path, digest, shape) if path.is_file() else None
        if found is not None:
            self.reused += 1
            return found.long().to(codec.device)
        self.damaged += path.is_file()
        codes = codec.encode(torch.from_numpy(audio)[None])[0]
        self._write(path, digest, codes.cpu())
        self.encoded += 1
        return codes

    def _read(self, path: Path, digest: str, shape: tuple[int, int]) -> torch.Tensor | None:
        """The codes of an entry, or None where it is not what its name says."""
        try:
            with safe_open(str(path), framework="pt") as file:
                said = file.metadata() or {}
                codes = file.get_tensor("codes")
        except (SafetensorError, OSError):
            return None
        right = {"audio": digest, "codec": self._codec_key, "checksum": _checksum(codes)}
        return codes if said == right and tuple(codes.shape) == shape else None

    def _write(self, path: Path, digest: str, codes: torch.Tensor) -> None:
        small = codes.to(torch.int16 if self.codec.audio_cardinality < 2**15 else torch.int32).contiguous()
        metadata = {"audio": digest, "codec": self._codec_key, "checksum": _checksum(small)}
        with replacing(path) as temporary:
            save_file({"codes": small}, str(temporary), metadata)


def _checksum(codes: torch.Tensor) -> str:
    return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()[:32]


def open_cache(name: str, codec: MimiCodec) -> CodeCache | None:
    """The cache that a `codes_cache` option means, or None where it is switched off.

    Raises:
        InputError: its folder cannot be written.
    """
    folder = cache_folder(name)
    return None if folder is None else CodeCache(folder, codec)
