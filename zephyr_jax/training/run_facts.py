"""What must be the same on every host before a run's first step: code, configuration and data."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from etils import epath

from zephyr_jax._version import __version__
from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.storage import is_remote
from zephyr_jax.training.workdir import flat
from zephyr_jax.weights.checksums import FOLDER, saved_steps, workdir_and_steps

_SMALL = 1 << 20  # bytes of a file whose content counts, and not its size alone


def run_facts(config: RunConfig, packed: PackedSet, workdir: epath.Path) -> dict[str, Any]:
    """Names and values for `agree`: digests are the first 16 digits of a sha256.

    Raises:
        ValueError: if a file of the packed set is missing or has not the size that it should.
    """
    check_sizes(packed)
    manifest = json.dumps(packed.manifest, sort_keys=True)
    facts: dict[str, Any] = {
        "zephyr_jax": __version__,
        "its source code": code_digest(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
    }
    facts |= {f"config.{name}": value for name, value in flat(config.to_dict()).items()}
    return facts | {
        f"packed set {packed.folder.name}": _short(manifest.encode()),
        "initial model": _source_digest(config.init),
        f"newest checkpoint in {workdir}": (saved_steps(workdir) or [None])[-1],
    }


def code_digest(package: Path = Path(__file__).parents[1]) -> str:
    """Of the names and contents of all Python files of the package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def check_sizes(packed: PackedSet) -> None:
    """Raises a ValueError where a copy of a packed set is not whole."""
    for name, info in packed.manifest["files"].items():
        path = packed.folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != info["bytes"]:
            said = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"{path} {said}, the manifest beside it says {info['bytes']}; copy the folder "
                "again from the host that packed it, as by rsync --archive"
            )


def _source_digest(init: str) -> str | None:
    """Of an initial model on disk: its files' sizes, and the contents of the small ones.

    None for what is no folder. What has been read is compared when the run goes on (`begun_with`).
    """
    folder = epath.Path(init) if init else None
    if folder is None or not folder.is_dir():
        return None
    root, steps = workdir_and_steps(folder)
    if steps:  # of a run, its newest step
        sums = root / FOLDER / f"{steps[-1]}.sums.json"
        return _short(sums.read_bytes()) if sums.is_file() else None
    if is_remote(folder):
        return None
    files = sorted(path for path in Path(init).iterdir() if path.is_file())
    said = [
        f"{path.name} {size} {_short(path.read_bytes()) if size < _SMALL else ''}"
        for path, size in ((path, path.stat().st_size) for path in files)
    ]
    return _short("\n".join(said).encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
