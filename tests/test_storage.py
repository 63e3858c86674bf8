"""Files and folders appear under their names only when they are complete."""

from __future__ import annotations

import pathlib
from typing import IO

import filelock
import pytest

from zephyr_jax.storage import atomic_path, new_folder, write_atomic


@pytest.mark.parametrize(
    "content", ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())]
)
def test_text_bytes_and_writers_give_the_same_file(tmp_path: pathlib.Path, content):
    path = write_atomic(tmp_path / "new" / "file", content)
    assert (tmp_path / "new" / "file").read_bytes() == "é\n".encode() == path.read_bytes()
    assert [x.name for x in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: pathlib.Path):
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("disk full")

    write_atomic(tmp_path / "file", "old")
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "file", fail)
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"file": "old"}


def test_a_folder_takes_the_place_of_another_only_on_request(tmp_path: pathlib.Path):
    folder = tmp_path / "folder"
    for content, replace in (("first", False), ("second", True)):
        with atomic_path(folder, replace=replace) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [x.name for x in folder.iterdir()] == ["second"]
    with pytest.raises(OSError, match="not empty"), atomic_path(folder) as temporary:
        temporary.mkdir()
    assert [x.name for x in folder.iterdir()] == ["second"]
    with pytest.raises(FileNotFoundError), atomic_path(folder, replace=True):
        pass  # creates nothing, so that the old folder comes back
    assert [x.name for x in tmp_path.rglob("*")] == ["folder", "second"]


def test_a_second_process_waits_for_the_folder_of_the_first(tmp_path):
    with new_folder(tmp_path / "set") as temporary:
        (temporary / "file").write_text("whole")
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".set.lock").acquire(timeout=0)
    with new_folder(tmp_path / "set") as temporary:
        assert temporary is None
    assert (tmp_path / "set" / "file").read_text() == "whole"
