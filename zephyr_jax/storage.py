"""Where a run's files lie: a folder of this machine, or a URL such as gs://bucket/runs/sft.

All go through etils.epath, which needs gcsfs for gs://. On a disk a file is written under a
temporary name and renamed; in a bucket an object appears when it is complete, and cannot grow.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import xxhash
from absl import logging
from etils import epath
from filelock import SoftFileLease, Timeout

MANIFEST = "digests.json"  # of a sealed folder
UNFINISHED = "unfinished"  # a folder next to what is being made: temporary copies, and locks
_STALE = 30.0  # seconds after which a lock that was not renewed is that of a dead process
_WAY_OUT = "stop it, or wait until it ends"
_LARGE = 1 << 30  # bytes from which on the verification of a folder shows its progress


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """The absolute path, with links kept; a URL is one already."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def user_cache() -> Path:
    """The folder of what can be made again, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "zephyr_jax"


def read_json(
    path: str | os.PathLike[str], remedy: str = "restore it from a copy", fields: Sequence[str] = ()
) -> dict[str, Any]:
    """The object in a JSON file, with at least these fields; an error names file and remedy."""
    try:
        value = json.loads(epath.Path(path).read_bytes())
        lacking = [name for name in fields if name not in value]
        problem = f"it lacks {', '.join(lacking)}" if lacking else ""
    except (ValueError, TypeError, RecursionError) as error:
        value, problem = {}, str(error)
    if problem or not isinstance(value, dict):
        raise ValueError(f"{path} is damaged ({problem or 'it holds no JSON object'}): {remedy}")
    return value


def write_checked(path: str | os.PathLike[str], value: Mapping[str, Any]) -> epath.Path:
    """Writes a JSON object that is closed by its own digest, for `read_checked`."""
    return write_atomic(path, _closed(value))


def _closed(value: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=1) + "\n"


def read_checked(
    path: str | os.PathLike[str], remedy: str = "restore it from a copy", fields: Sequence[str] = ()
) -> dict[str, Any]:
    """What `write_checked` wrote; a ValueError if a byte of it changed. 0.1.0 wrote no digests."""
    value, content = read_json(path, remedy, fields), epath.Path(path).read_bytes()
    ends_with_digest = re.search(rb'"[0-9a-f]{64}"\n}\n$', content)  # even if its name is damaged
    digest = value.pop("sha256", None)
    if (digest or ends_with_digest) and content != _closed(value).encode():
        raise ValueError(f"{path} is damaged (its own digest differs): {remedy}")
    return value


def write_atomic(
    path: str | os.PathLike[str], content: str | bytes | Callable[[IO[bytes]], object]
) -> epath.Path:
    """Writes a file, and its folder, that appears only when it is complete; returns its path.

    The content is text (written as UTF-8), bytes, or a function that writes them to the open file.
    """
    if isinstance(content, str):
        content = content.encode()
    write = content if callable(content) else lambda file: file.write(content)
    final = epath.Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        buffer = io.BytesIO()  # closing an unfinished remote file would publish it
        write(buffer)
        final.write_bytes(buffer.getvalue())
        return final
    real = Path(os.path.realpath(final))  # a link stays, and its target is replaced
    temporary = real.with_name(f".{real.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with naming(final), temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(real)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return final


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A temporary path that is renamed to the local `path` when the block ends without an error.

    The block creates a file or a folder there. What a killed process left is removed. A file takes
    the place of an older file, a folder that of an empty one, of any with `replace` (else OSError).
    """
    with lock(path), _building(Path(path), replace) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder`; None where another process makes it, or has."""
    logging.info("making %s, or waiting for the process that makes it", folder)
    with lock(folder, wait=True):
        if folder.is_dir():
            yield None
            return
        with _building(folder, replace=False) as temporary:
            temporary.mkdir()
            yield temporary


@contextlib.contextmanager
def _building(final: Path, replace: bool) -> Iterator[Path]:
    """What `atomic_path` does while it holds the lock."""
    final = Path(os.path.realpath(final))  # a link stays, and its target is replaced
    temporary = final.parent / UNFINISHED / final.name
    replaced = temporary.with_name(f"{final.name}.old")
    if replaced.exists() and not final.exists():  # killed between the two renames below
        os.replace(replaced, final)
    _remove(temporary, replaced)
    try:
        with naming(final):
            yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if replace and final.is_dir():
            os.replace(final, replaced)
        os.replace(temporary, final)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, final)
        raise
    finally:
        _remove(temporary, replaced)


def _remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Holds `path`, which need not exist, until the block ends.

    A ValueError names the process that holds it, unless the block shall `wait`. The lock of a dead
    process is taken over; on another host, and in a bucket, if _STALE seconds did not renew it.
    """
    if is_remote(path):
        with _held_in_bucket(epath.Path(path)):
            yield
        return
    real = Path(os.path.realpath(path))  # one lock, however the path is written
    place = real.parent / UNFINISHED / f"{real.name}.lock"
    made = [folder for folder in (place.parents[1], place.parent) if not folder.is_dir()]
    place.parent.mkdir(parents=True, exist_ok=True)
    lost = f"error: while this one stood still, another process took {path} over\n".encode()
    end = lambda x: x.reason == "refresh-failed" or os._exit(os.write(2, lost) and 1)  # noqa: E731
    lease = SoftFileLease(place, lease_duration=_STALE, on_compromise=end)
    try:
        try:
            lease.acquire(timeout=-1 if wait else 0)
        except Timeout:
            if time.time() - place.stat().st_mtime < _STALE:
                raise
            lease.acquire(timeout=1.5 * _STALE)  # as long as its holder may take to renew it
    except Timeout as error:
        mark = dict(line.split("=", 1) for line in place.read_text().splitlines() if "=" in line)
        holder = f"process {mark.get('pid', '?')} on {mark.get('host', '?')}, by {place}"
        raise ValueError(f"{path} is in use by {holder}: {_WAY_OUT}") from error
    try:
        yield
    finally:
        lease.release()
        for folder in (place.parent, *made):
            with contextlib.suppress(OSError):  # others work there
                os.rmdir(folder)


@contextlib.contextmanager
def _held_in_bucket(path: epath.Path) -> Iterator[None]:
    """What `lock` does in a bucket: an object names the holder and is written again and again.

    Clocks of hosts are not compared. Of two that begin at once, the one that wrote last holds it.
    """
    place, ended = path.parent / UNFINISHED / f"{path.name}.lock", threading.Event()
    mine = f"process {os.getpid()} on {platform.node()}\n{uuid.uuid4()}\n"

    def other() -> str:
        with contextlib.suppress(FileNotFoundError):
            text = place.read_text()
            return "" if text.startswith(mine) else text
        return ""

    def renew() -> None:
        while not ended.is_set():
            try:
                place.write_text(f"{mine}{time.time()}\n")
            except Exception as error:  # of a network, which comes back
                logging.warning("the lock of %s is not renewed: %s", path, error)
            ended.wait(_STALE / 5)

    thread = threading.Thread(target=renew, daemon=True)
    first, end = other(), time.monotonic() + _STALE
    while first and other() == first and time.monotonic() < end:
        time.sleep(_STALE / 30)
    taken = other() not in ("", first)
    try:
        if not taken:
            thread.start()
            time.sleep(_STALE / 30)
        if holder := other().partition("\n")[0]:
            raise ValueError(f"{path} is in use by {holder}: {_WAY_OUT}")
        yield
    finally:
        ended.set()
        if not taken:
            thread.join()
        if not other():
            place.unlink(missing_ok=True)


def seal(folder: str | os.PathLike[str], names: Sequence[str] = ("",)) -> None:
    """Writes MANIFEST into a finished folder, once: the digests of all files, or of `names`."""
    write_checked(epath.Path(folder) / MANIFEST, {"files": digests(folder, names)})


def digests(
    folder: str | os.PathLike[str], names: Iterable[str] = ("",)
) -> dict[str, dict[str, Any]]:
    """`file_info` of files, and of all in subfolders, by their paths in the folder."""
    folder = epath.Path(folder)
    found = (files_below(path) if path.is_dir() else [path] for path in map(folder.joinpath, names))
    files = [path for paths in found for path in paths if path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        infos = pool.map(file_info, files)
        return {str(f.relative_to(folder)): x for f, x in zip(files, infos, strict=True)}


def verify(
    folder: str | os.PathLike[str],
    parts: Sequence[str] = ("",),
    *,
    contents: bool = True,
    required: bool = True,
    remedy: str = "restore it from a copy",
) -> None:
    """Raises a ValueError that names a file which is not as it was when the folder was sealed.

    `parts` are the files and subfolders to look at, if not all, `contents` more than their sizes.
    A folder without a manifest, as of zephyr_jax 0.1.0, is used unless one is `required`.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.is_file():
        if required:
            raise ValueError(f"{path} is missing, so nothing in {folder} can be checked: {remedy}")
        logging.warning("%s has no %s, so its files are not checked", folder, MANIFEST)
        return
    files = read_checked(path, remedy, ["files", "sha256"])["files"]
    listed = {
        name: info
        for name, info in files.items()
        if any(not part or name == part or name.startswith(f"{part}/") for part in parts)
    }
    compare(folder, listed, remedy, contents)


def compare(
    folder: str | os.PathLike[str],
    files: Mapping[str, Mapping[str, Any]],
    remedy: str,
    contents: bool = True,
) -> None:
    """Raises a ValueError that names a file of the folder which differs from its `file_info`."""
    folder = epath.Path(folder)
    for name, info in files.items():
        size = (folder / name).stat().length if (folder / name).is_file() else None
        if size != info["bytes"]:
            now = "is missing" if size is None else f"has {size} bytes, not {info['bytes']}"
            raise ValueError(f"{folder / name} is damaged (it {now}): {remedy}")
    done, total = 0, sum(info["bytes"] for info in files.values())
    files = files if contents else {}
    with ThreadPoolExecutor() as pool:
        actual = pool.map(lambda name: file_info(folder / name, [*files[name]][-1]), files)
        for (name, info), now in zip(files.items(), actual, strict=True):
            if now != info:
                raise ValueError(f"{folder / name} is damaged (its content changed): {remedy}")
            done += info["bytes"]
            if total >= _LARGE:
                message = f"{folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB verified"
                logging.log_every_n_seconds(logging.INFO, "%s", 10, message)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the path, and what is free there, to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(epath.Path(path).parent).free
        message = f"{error.strerror} ({free / 1e9:.3g} GB are free)"
        raise OSError(error.errno, message, os.fspath(path)) from error


def file_info(path: str | os.PathLike[str], kind: str = "xxh3_128") -> dict[str, Any]:
    """A file's `bytes`, and its digest in hex: xxh3 at the speed of memory, or others' sha256."""
    digest, size = (hashlib.sha256() if kind == "sha256" else xxhash.xxh3_128()), 0
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, kind: digest.hexdigest()}


def files_below(folder: epath.Path) -> list[epath.Path]:
    """Every file in a folder and in those below it, in the order of their names."""
    files = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        files += files_below(path) if path.is_dir() else [path]
    return files
