"""Files and folders appear under their names only when they are complete."""

from __future__ import annotations

import errno
import os
import pathlib
import platform
import random
import re
import subprocess
import sys
import time
from typing import IO

import pytest
from buckets import stand_in

import zephyr_jax as zj
from zephyr_jax import storage


@pytest.mark.parametrize(
    "content", ["é\n", "é\n".encode(), lambda file: file.write("é\n".encode())]
)
def test_text_bytes_and_writers_give_the_same_file(tmp_path: pathlib.Path, content):
    path = storage.write_atomic(tmp_path / "new" / "file", content)
    assert (tmp_path / "new" / "file").read_bytes() == "é\n".encode() == path.read_bytes()
    assert [x.name for x in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: pathlib.Path):
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write_atomic(tmp_path / "file", "old")
    with pytest.raises(OSError, match=rf"No space .* GB are free.: '{tmp_path}/file'"):
        storage.write_atomic(tmp_path / "file", fail)
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {"file": "old"}


def test_a_folder_takes_the_place_of_another_only_on_request(tmp_path: pathlib.Path):
    folder = tmp_path / "folder"
    for content, replace in (("first", False), ("second", True)):
        with storage.atomic_path(folder, replace=replace) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [x.name for x in folder.iterdir()] == ["second"]
    with pytest.raises(OSError, match="not empty"), storage.atomic_path(folder) as temporary:
        temporary.mkdir()
    assert [x.name for x in folder.iterdir()] == ["second"]
    with pytest.raises(FileNotFoundError), storage.atomic_path(folder, replace=True):
        pass  # creates nothing, so that the old folder comes back
    assert [x.name for x in tmp_path.rglob("*")] == ["folder", "second"]


HOLD = """
import sys, time
import zephyr_jax as zj
from zephyr_jax import storage
with storage.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    message = rf"run is in use by process {holder.pid} on {platform.node()}.*: stop it, or wait"
    with pytest.raises(ValueError, match=message), storage.lock(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with storage.lock(tmp_path / "run"):
        assert (tmp_path / "unfinished" / "run.lock").is_file()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_host_is_taken_over_when_it_is_not_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_STALE", 0.6)
    file = tmp_path / "unfinished" / "run.lock"
    with storage.lock(tmp_path / "run"):
        mark = re.sub("host=.*", "host=other", file.read_text())
    storage.write_atomic(file, mark)
    with pytest.raises(ValueError, match="process .* on other"), storage.lock(tmp_path / "run"):
        pass
    time.sleep(0.7)
    with storage.lock(tmp_path / "run"):
        time.sleep(0.7)  # it is renewed
        with pytest.raises(ValueError, match=f"{os.getpid()} on"), storage.lock(tmp_path / "run"):
            pass


def test_a_run_is_refused_while_another_works_in_its_folder(tmp_path):
    message = f"run is in use by process {os.getpid()} on"
    with storage.lock(tmp_path / "run"), pytest.raises(ValueError, match=message):
        zj.fit(zj.load_config("demo_sft"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    """And what it was about to replace is back."""
    for name in ("set", "set.old"):
        storage.write_atomic(tmp_path / "unfinished" / name / "file", name)
    with (
        pytest.raises(FileNotFoundError),
        storage.atomic_path(tmp_path / "set", replace=True) as path,
    ):
        assert path == tmp_path / "unfinished" / "set"
    assert [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*")] == ["set", "set/file"]
    assert (tmp_path / "set" / "file").read_text() == "set.old"


def test_a_second_process_waits_for_the_folder_of_the_first(tmp_path):
    with storage.new_folder(tmp_path / "set") as temporary:
        assert temporary
        (temporary / "file").write_text("whole")
        with pytest.raises(ValueError, match="in use by"), storage.lock(tmp_path / "set"):
            pass
    with storage.new_folder(tmp_path / "set") as temporary:
        assert temporary is None
    assert (tmp_path / "set" / "file").read_text() == "whole"
    assert [x.name for x in tmp_path.iterdir()] == ["set"]


BROKEN = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
    "not UTF-8": lambda content: b'{"a": "\xff"}',
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_json_file_is_named_with_the_remedy(tmp_path: pathlib.Path, how):
    path = tmp_path / "manifest.json"
    path.write_bytes(BROKEN[how](b'{"splits": 1, "files": {}}'))
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\): pack again$") as stop:
        storage.read_json(path, "pack again", ["splits"])
    assert "\n" not in str(stop.value)
    path.write_text("\ufeff" + '{"splits": 1}')
    assert storage.read_json(path, fields=["splits"]) == {"splits": 1}
    with pytest.raises(ValueError, match="damaged .it lacks files.: restore it"):
        storage.read_json(path, fields=["splits", "files"])
    with pytest.raises(FileNotFoundError):
        storage.read_json(tmp_path / "absent.json")


@pytest.fixture(params=["disk", "bucket", "sha256"])
def sealed(request, tmp_path, monkeypatch):
    """A sealed folder by its path or URL, and where it really is."""
    for name in ("a", "deep/b", "deep/er/c"):
        storage.write_atomic(tmp_path / "set" / name, name.encode() * 50)
    if request.param == "bucket":
        stand_in(monkeypatch, tmp_path)
    folder = "gs://bucket/set" if request.param == "bucket" else tmp_path / "set"
    storage.seal(folder)
    if request.param == "sha256":  # as it was sealed earlier
        files = {
            x: storage.file_info(tmp_path / "set" / x, "sha256") for x in storage.digests(folder)
        }
        storage.write_checked(tmp_path / "set" / storage.MANIFEST, {"files": files})
    return folder, tmp_path / "set"


def test_any_flipped_byte_of_a_sealed_folder_is_named(sealed):
    folder, here = sealed
    storage.verify(folder)
    rng = random.Random(0)
    for path in (here / "a", here / "deep" / "b", here / "digests.json"):
        before = path.read_bytes()
        for _ in range(30):
            after = bytearray(before)
            after[rng.randrange(len(before))] ^= rng.randrange(1, 256)
            path.write_bytes(after)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged .*: restore") as stop:
                storage.verify(folder)
            assert "\n" not in str(stop.value)
        path.write_bytes(before)
    storage.verify(folder)


def test_what_is_missing_from_a_sealed_folder_is_named(sealed):
    folder, here = sealed
    (here / "more").write_text("that came later")
    storage.verify(folder)
    (here / "a").write_bytes((here / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a is damaged .it has 49 bytes, not 50.: pack again"):
        storage.verify(folder, contents=False, remedy="pack again")
    (here / "deep" / "b").unlink()
    with pytest.raises(ValueError, match=r"deep/b is damaged .it is missing"):
        storage.verify(folder, ["deep"])
    storage.verify(folder, ["deep/er"])
    (here / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"digests.json is missing, so nothing in .* can be check"):
        storage.verify(folder)
    storage.verify(folder, required=False)
    storage.seal(folder, ["deep/er", "a"])
    assert set(storage.read_json(here / "digests.json")["files"]) == {"deep/er/c", "a"}


def test_any_flipped_byte_of_a_checked_file_is_named(tmp_path: pathlib.Path):
    path, rng = tmp_path / "file", random.Random(0)
    storage.write_checked(path, {"step": 3, "value": 0.5, "of": ["é", None]})
    before, whole = path.read_bytes(), storage.read_checked(path)
    for at in range(len(before)):
        after = bytearray(before)
        after[at] ^= 1 << rng.randrange(8)
        path.write_bytes(after)
        with pytest.raises(ValueError, match=r"file is damaged .*: restore it") as stop:
            storage.read_checked(path)
        assert "\n" not in str(stop.value)
    path.write_bytes(before)
    assert storage.read_checked(path) == whole
    path.write_text('{"step": 3}')  # as 0.1.0 wrote it
    assert storage.read_checked(path) == {"step": 3}


def test_a_lock_is_the_same_however_its_path_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with storage.lock(tmp_path / "run"):
        for other in (f"{tmp_path}/run/", tmp_path / "link"):
            with pytest.raises(ValueError, match="in use by process"), storage.lock(other):
                pass
    assert os.path.islink(storage.write_atomic(tmp_path / "link", "x"))  # its target is written


def test_a_folder_in_a_bucket_is_held(tmp_path, monkeypatch):
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setattr(storage, "_STALE", 4.0)
    run, file = "gs://bucket/runs/sft", tmp_path / "runs" / "unfinished" / "sft.lock"
    with storage.lock(run):
        first = file.read_text()
        time.sleep(1.5)  # it is renewed
        message = f"in use by process {os.getpid()} on"
        with pytest.raises(ValueError, match=message), storage.lock(run):
            pass
        assert file.read_text().splitlines()[:2] == first.splitlines()[:2]
        assert file.read_text() != first
    assert not file.exists()
    storage.write_atomic(file, "process 1 on other\nan id\n0\n")  # of a process that was killed
    start = time.monotonic()
    with storage.lock(run):
        assert time.monotonic() - start > 4.0
    assert not file.exists()
