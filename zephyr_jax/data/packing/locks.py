"""Folders that one process makes while the others wait, and that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

_LOCK = "lock"


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path | None]:
    """The temporary folder to make `folder` in, for this process alone; None where it is made.

    Waits while another process on this machine makes it. The folder appears when the block ends;
    what a killed or failed process has left in the temporary folder is there again the next time.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    while not folder.is_dir():
        temporary.mkdir(parents=True, exist_ok=True)
        lock = _open(temporary / _LOCK)
        if lock is None:
            continue
        with lock:
            _wait_for(lock.fileno(), folder)
            if not _is_at(lock.fileno(), temporary / _LOCK):
                continue  # it went with the folder that another process has finished
            if folder.is_dir():
                (temporary / _LOCK).unlink()
                temporary.rmdir()
                break
            yield temporary
            temporary.rename(folder)
            (folder / _LOCK).unlink()
            return
    yield None


def _open(path: Path) -> IO[str] | None:
    try:
        return path.open("a")
    except FileNotFoundError:  # the folder was finished, and moved, at this moment
        return None


def _wait_for(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.info("waiting for another process, which makes %s", folder)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
