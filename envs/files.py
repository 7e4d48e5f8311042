"""Writing files whole: under a temporary name, then renamed."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; whoever reads it meanwhile, or after a crash, finds the old file or the new one.

    Folders above it are made; what UTF-8 cannot hold (half a surrogate pair of a broken transcript) becomes "?".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
