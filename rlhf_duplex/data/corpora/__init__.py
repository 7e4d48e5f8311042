"""Readers of corpora on disk: each finds recordings, their transcripts, and speech times where the corpus has them.

A new layout is a class (see `layout.py`), its line in `CORPORA`, and its name in `data.curate_options.FORMATS`.
"""

import os
from pathlib import Path

from envs.audio import AUDIO_SUFFIXES
from envs.errors import InputError
from rlhf_duplex.data.corpora.candor import Candor
from rlhf_duplex.data.corpora.fisher import Fisher
from rlhf_duplex.data.corpora.layout import Corpus
from rlhf_duplex.data.corpora.seamless import Seamless
from rlhf_duplex.data.corpora.stereo import MoshiFinetune, Stereo
from rlhf_duplex.data.recordings import Problem, Recording

# The first that matches is taken, so the more particular ones come first.
CORPORA: dict[str, Corpus] = {
    "moshi-finetune": MoshiFinetune(),
    "seamless": Seamless(),
    "fisher": Fisher(),
    "candor": Candor(),
    "stereo": Stereo(),
}


def corpus_files(path: Path) -> list[Path]:
    """All files under a folder, or beside a file, sorted; hidden ones are left out.

    Raises:
        InputError: there is nothing at that path.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"corpus {path} does not exist: give a folder of recordings or a .jsonl that lists them")
    found: list[Path] = []
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to where it came from
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def find_corpus(path: Path, layout: str = "auto") -> tuple[str, list[Recording], list[Problem]]:
    """The recordings of a corpus.

    Args:
        path: a .jsonl or a folder.
        layout: one of `rlhf_duplex.data.curate_options.FORMATS`; `auto` takes the first that its files look like.

    Returns:
        The name of the layout, the recordings in order of their ids, and what cannot be used.

    Raises:
        InputError: nothing there, no recording of that layout, or two recordings of one name.
    """
    files = corpus_files(path)
    if layout == "auto":
        layout = next((name for name, corpus in CORPORA.items() if corpus.matches(path, files)), "")
        if not layout:
            raise InputError(
                f"{path} holds no recordings: give a moshi-finetune .jsonl, or a folder with stereo files "
                f"({', '.join(AUDIO_SUFFIXES[:6])}, ...), Seamless Interaction, Fisher or Candor"
            )
    found: dict[str, Recording] = {}
    problems: list[Problem] = []
    for item in CORPORA[layout].recordings(path, files):
        if isinstance(item, Problem):
            problems.append(item)
        elif any(not _is_text(path) for path in item.audio_paths + item.sidecars):
            shown = item.id.encode(errors="replace").decode()
            problems.append(Problem(shown, "its name, or a file's, is not UTF-8: rename it"))
        elif item.id in found:
            raise InputError(f"two recordings of {path} are called '{item.id}': rename one, or curate them apart")
        else:
            found[item.id] = item
    if not found:
        first = f"; the first thing that is wrong: {problems[0].recording}: {problems[0].message}" if problems else ""
        raise InputError(f"{path} holds no recording in the layout of {layout}{first}")
    return layout, [found[name] for name in sorted(found)], problems


def _is_text(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:  # bytes that are no text, which a manifest cannot name
        return False
