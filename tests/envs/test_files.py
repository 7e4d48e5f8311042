"""What is written appears whole, or not at all, and leaves nothing behind."""

import errno
import os

import numpy as np
import pytest

from envs.audio import write_audio
from envs.files import replacing, write_text

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def below(folder):
    """Everything in a folder, hidden or not: the text of files, where links point to."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_text()
        for path in folder.rglob("*")
    }


def make_folder(path, text):
    path.mkdir()
    (path / "inside.txt").write_text(text)


def write_file(path, text):
    path.write_text(text)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("of what is written")])
@pytest.mark.parametrize("write", [write_file, make_folder])
def test_what_cannot_be_written_to_its_end_leaves_the_old_one_alone(tmp_path, write, error):
    def stop_midway(path):
        with replacing(path) as temporary:
            write(temporary, "half")
            assert len(below(tmp_path)) > len(before)
            raise error

    for there in (False, True):
        if there:
            write(tmp_path / "a", "old")
        before = below(tmp_path)
        with pytest.raises(type(error)):
            stop_midway(tmp_path / "a")
        assert below(tmp_path) == before


def test_files_folders_and_links_take_the_place_of_their_kind(tmp_path):
    for text in ("first", "second"):
        write_text(tmp_path / "deep" / "a.txt", text)
        with replacing(tmp_path / "deep" / "folder") as temporary:
            make_folder(temporary, text)
            (temporary / text).touch()
        with replacing(tmp_path / "deep" / "link") as temporary:
            temporary.symlink_to(text)
        expected = {"a.txt": text, "folder": False, "folder/inside.txt": text, f"folder/{text}": "", "link": text}
        assert below(tmp_path / "deep") == expected


def test_a_link_to_a_folder_is_replaced_and_the_folders_stay(tmp_path):
    for name in ("one", "two"):
        make_folder(tmp_path / name, name)
        with replacing(tmp_path / "link") as temporary:
            temporary.symlink_to(name)
    assert (tmp_path / "link" / "inside.txt").read_text() == "two"
    assert sorted(below(tmp_path)) == ["link", "one", "one/inside.txt", "two", "two/inside.txt"]


def test_an_interrupt_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    make_folder(tmp_path / "a", "old")
    before = below(tmp_path)
    rename = os.replace

    def interrupted(source, target):
        if target == tmp_path / "a" and not str(source).endswith(".old"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("envs.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        make_folder(temporary, "new")
    assert below(tmp_path) == before


def test_what_stands_in_the_way_is_not_replaced(tmp_path):
    make_folder(tmp_path / "a", "kept")
    make_folder(tmp_path / "target", "kept")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "file").write_text("kept")
    before = below(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "a", "a file in the place of a folder")
    for name in ("link", "file"):
        with pytest.raises(NotADirectoryError), replacing(tmp_path / name) as temporary:
            make_folder(temporary, "new")
    assert below(tmp_path) == before


def test_audio_on_a_full_disk(tmp_path, monkeypatch):
    def full(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"fLaC")
        raise FULL

    write_audio(tmp_path / "a.flac", np.zeros(800, dtype=np.float32), 8000)
    before = (tmp_path / "a.flac").read_bytes()
    monkeypatch.setattr("envs.audio.soundfile.write", full)
    with pytest.raises(OSError, match="No space left"):
        write_audio(tmp_path / "a.flac", np.ones(800, dtype=np.float32), 8000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.flac"]
    assert (tmp_path / "a.flac").read_bytes() == before
