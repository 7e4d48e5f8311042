"""Files and folders written whole (under a temporary name, then renamed), and lists read line by line."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from envs.errors import InputError

_Item = TypeVar("_Item")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write a file, a folder or a link to, which then takes the place of `path`.

    Whoever reads `path` meanwhile, or after a crash, finds the old one or the new one (of a folder none, for the moment
    between two renames). Where the writing ends with an exception, the old one stays and nothing is left of the new
    one. Folders above are made. The name has no suffix by which a search for recordings, say, would find it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")  # threads and other machines write here, too
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        if _is_folder(temporary) and _is_folder(path):  # os.replace puts a folder in the place of an empty one only
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if _is_folder(old) and not path.exists():  # stopped between the two
            os.replace(old, path)
        _remove(temporary)
        _remove(old)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # none was written; or it cannot be removed, and what went wrong before says more
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; whoever reads it meanwhile, or after a crash, finds the old file or the new one.

    Folders above it are made; what UTF-8 cannot hold (half a surrogate pair of a broken transcript) becomes "?".
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def check_replaced(path: Path, kind: str, keys: set[str]) -> None:
    """Look, before anything is done, whether a JSON Lines file may be written where perhaps something is already.

    Args:
        path: of the file to write.
        kind: what it will be, for the message: "a manifest".
        keys: that each of its lines has.

    Raises:
        InputError: there is a file of another kind (the command's own input, say), which would be lost.
    """
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), "{}")
        row = json.loads(first)
        same = first == "{}" or (isinstance(row, dict) and keys <= row.keys())
    except (OSError, ValueError):
        same = False
    if not same:
        raise InputError(f"{path} is there and is not {kind}, which would replace it: choose another --out")


def file_name(identifier: str) -> str:
    """An id as the name of a file or folder, which leads nowhere else; ids that differ have names that differ."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in identifier)[:100]
    if name == identifier:
        return name
    return f"{name}-{hashlib.sha256(identifier.encode(errors='replace')).hexdigest()[:8]}"


def read_json_lines(path: Path, kind: str, hint: str, parse: Callable[[Any], _Item]) -> list[_Item]:
    """The items of a JSON Lines file, in its order; empty lines are passed over.

    Args:
        path: UTF-8 text, with or without a byte order mark.
        kind: what the file is, for messages: "manifest".
        hint: what to do where it is not there or no text.
        parse: makes an item with an `id` of what a line holds; its InputError is given the line's number.

    Raises:
        InputError: no such file, no text, no line, or a line that is no JSON, no item, or has the id of an earlier one.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{kind} {path} {what}: {hint}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines also splits inside words
    except UnicodeDecodeError as error:
        raise InputError(f"{kind} {path} is not UTF-8 text ({error}): {hint}") from error
    items: list[_Item] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item: Any = parse(_json(line))
            if item.id in seen:
                raise InputError(f"id '{item.id}' was already used on line {seen[item.id]}: ids must be unique")
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        seen[item.id] = number
        items.append(item)
    if not items:
        raise InputError(f"{kind} {path} is empty: give at least one line")
    return items


def _json(line: str) -> Any:
    """What a line of JSON holds.

    Raises:
        InputError: it is none, or nests too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({' '.join(str(error).split())})") from error
