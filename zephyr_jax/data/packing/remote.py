"""Folders that one process of a machine makes, and copies of packed sets that lie behind a URL.

Reading goes through etils.epath, which needs gcsfs or TensorFlow for gs://. Tested with a local
folder in the place of a bucket; no real bucket was available.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from filelock import FileLock
from tqdm import tqdm

from zephyr_jax.storage import atomic_path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder` when the block ends; None where that exists.

    Waits while another process of this machine makes it. What a killed process left is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    logging.info("making %s, or waiting for the process that makes it", folder)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        for unfinished in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(unfinished)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            yield temporary


def file_info(path: Path) -> dict[str, Any]:
    """A file's `bytes` and `sha256`, as manifests have them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def cache_folder() -> Path:
    """The folder for copies of packed sets: zephyr_jax/packed in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "zephyr_jax" / "packed"


def local_copy(source: epath.Path) -> Path | None:
    """The copy of a packed set on this machine, made if need be; None where there is no such set.

    It appears when all its files have the sizes and sha256s of the manifest; a ValueError names
    the file that differs.
    """
    local = cache_folder() / source.name
    manifest = source / "manifest.json"
    if local.is_dir():
        return local
    if not manifest.exists():
        return None
    with new_folder(local) as temporary:
        if temporary is not None:
            logging.info("copying %s to %s", source, local)
            text = manifest.read_text()
            for name, info in tqdm(json.loads(text)["files"].items(), desc=f"copy {source.name}"):
                with (source / name).open("rb") as theirs, (temporary / name).open("wb") as ours:
                    shutil.copyfileobj(theirs, ours, 1 << 24)
                if (copied := file_info(temporary / name)) != info:
                    raise ValueError(
                        f"{source / name} has {copied['bytes']} bytes with sha256 "
                        f"{copied['sha256'][:16]}, its manifest says {info['bytes']} and "
                        f"{info['sha256'][:16]}; copy the packed set there again"
                    )
            (temporary / "manifest.json").write_text(text)
    return local
