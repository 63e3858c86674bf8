"""Data folders that are no local ones (gs://...): packed sets are copied to this machine once.

Reading goes through etils.epath, which needs gcsfs or TensorFlow for gs://. Tested with a folder of
this machine in the place of a bucket; no real bucket was at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from tqdm import tqdm

from zephyr_jax.data.packing.locks import making

_PORTION = 1 << 24


def cache_folder() -> Path:
    """Where copies of packed sets go: zephyr_jax/packed in XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "zephyr_jax" / "packed"


def local_copy(source: epath.Path) -> Path | None:
    """The copy of a packed set on this machine, made if need be; None where there is no such set.

    The copy appears when all its files have the sizes and sha256s of the manifest. Files that an
    interrupted copy left are checked and kept. Processes on one machine wait for one copy.

    Raises:
        ValueError: if a file does not have the content that the manifest promises.
    """
    local = cache_folder() / source.name
    if (local / "manifest.json").is_file():
        return local
    manifest = source / "manifest.json"
    if not manifest.exists():
        return None
    with making(local) as temporary:
        if temporary is not None:
            text = manifest.read_text()
            files = json.loads(text)["files"]
            logging.info("copying %s to %s", source, local)
            with tqdm(
                total=sum(info["bytes"] for info in files.values()),
                desc=f"copy {source.name}",
                unit="B",
                unit_scale=True,
            ) as bar:
                for name, info in files.items():
                    _copy(source / name, temporary / name, info, bar)
            (temporary / "manifest.json").write_text(text)
    return local


def fetch_file(home: str, path: Path) -> None:
    """Copies the file of this name from the folder `home` to `path`, if it is there."""
    source = epath.Path(home) / path.name
    if source.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(source.read_bytes())
        os.replace(temporary, path)


def publish_file(path: Path, home: str) -> None:
    """Copies a small file into the folder `home`."""
    epath.Path(home).mkdir(parents=True, exist_ok=True)
    (epath.Path(home) / path.name).write_bytes(path.read_bytes())


def file_info(path: Path) -> dict[str, Any]:
    """A file's `bytes` and `sha256`, as manifests have them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while portion := file.read(_PORTION):
            digest.update(portion)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _copy(source: epath.Path, path: Path, info: dict[str, Any], bar: Any) -> None:
    if path.is_file() and file_info(path) == info:
        bar.update(info["bytes"])
        return
    part = path.with_name(f"{path.name}.part")
    with source.open("rb") as theirs, part.open("wb") as ours:
        while portion := theirs.read(_PORTION):
            ours.write(portion)
            bar.update(len(portion))
    if (found := file_info(part)) != info:
        raise ValueError(
            f"{source} has {found['bytes']} bytes with sha256 {found['sha256'][:16]}, its manifest "
            f"says {info['bytes']} and {info['sha256'][:16]}; copy the packed set there again"
        )
    os.replace(part, path)
