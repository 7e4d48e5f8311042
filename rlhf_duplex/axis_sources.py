"""Which code reward axes of one's own are: a run that goes on, and trials that share a measurement, need the same.

A class is known by its source file alone; what that file imports is not followed. Axes of this package are left out: a
release that touches a comment in one of them would end every run, and `provenance.json` has the package's version.
"""

import hashlib
import inspect
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from envs.errors import InputError
from envs.files import write_text
from rewards.aggregate import RewardSpec
from rewards.axis import find_axis

_OWN = ("rewards", "rlhf_duplex", "envs")
AXES = "axes"  # in provenance.json, beside the digests of manifests


def axis_sources(rewards: Mapping[str, Any]) -> dict[str, str]:
    """By axis that is not of this package, the SHA-256 of the file that defines its class.

    Args:
        rewards: as in the configuration.

    Raises:
        InputError: an axis cannot be found.
    """
    found = {}
    for name, options in rewards.items():
        path = _source(name, RewardSpec.from_config(options).target)
        if path is not None:
            try:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"reward axis '{name}': {path} cannot be read ({error})") from error
    return found


def _source(name: str, target: str | None) -> Path | None:
    if target is not None and target.endswith(".py"):
        return Path(target)  # without running it
    cls = find_axis(name, target)
    if cls.__module__.partition(".")[0] in _OWN:
        return None
    try:
        path = inspect.getsourcefile(cls)
    except TypeError:  # defined at a prompt
        return None
    return Path(path) if path is not None and Path(path).is_file() else None


def changed_axis(run_dir: Path, now: Mapping[str, str]) -> str:
    """The first axis whose code is not what the run folder's note says, or nothing; an older note says nothing.

    Raises:
        InputError: the note is damaged.
    """
    path = run_dir / "provenance.json"
    if not path.is_file():
        return ""
    try:
        before = dict(json.loads(path.read_text()).get(AXES, {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it to go on with what there is now") from error
    return next((name for name, digest in now.items() if before.get(name, digest) != digest), "")


def check_axes(run_dir: Path, resume: bool, rewards: Mapping[str, Any]) -> dict[str, str]:
    """The code of the axes now, for the note; a resumed run must find it unchanged.

    Raises:
        InputError: that of one has changed since the run began.
    """
    now = axis_sources(rewards)
    if resume and (name := changed_axis(run_dir, now)):
        path = _source(name, RewardSpec.from_config(rewards[name]).target)
        raise InputError(
            f"resume: the code of the reward axis '{name}' ({path}) "
            "is not what it was when this run began: put the old one back, or start without resume=true (take its "
            f"entry out of `{AXES}` in {run_dir / 'provenance.json'} to go on with what there is now)"
        )
    return now


@contextmanager
def forgetting_failed(run_dir: Path) -> Iterator[None]:
    """Where an axis fails, its code is noted no more: whoever mends it changes it, and the run can go on."""
    try:
        yield
    except Exception as error:
        with suppress(OSError, ValueError, KeyError, AttributeError):  # the error that is to be seen is the first
            said, path = "".join(traceback.format_exception(error)), run_dir / "provenance.json"
            note = json.loads(path.read_text())
            axes = {name: digest for name, digest in note[AXES].items() if f"of reward axis '{name}'" not in said}
            write_text(path, json.dumps(note | {AXES: axes}, indent=1) + "\n")
        raise
