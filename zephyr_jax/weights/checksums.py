"""The steps saved under a workdir, whether their bytes are as written, and digests of parameters.

Orbax restores a flipped bit without an error, so sizes and CRC-32 sums are stored for each step.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from zephyr_jax.storage import files_below, is_remote, write_atomic
from zephyr_jax.types import Params

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"  # what Orbax writes last, in a bucket, where nothing is renamed


def saved_steps(root: epath.Path) -> list[int]:
    """The steps that are complete under a workdir, oldest first."""
    folder = root / FOLDER
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if is_remote(folder):
        paths = [path for path in paths if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in paths)


def workdir_and_steps(folder: epath.Path) -> tuple[epath.Path, list[int]]:
    """The workdir and its steps; where `folder` is that of a step, only this one."""
    folder = step_folder(folder)
    if folder.parent.name == FOLDER:
        return folder.parents[1], [int(folder.name)]
    return folder, saved_steps(folder)


def step_folder(folder: epath.Path) -> epath.Path:
    """The folder itself, or for `WORKDIR/checkpoints/best` that of the run's best step."""
    if folder.parent.name != FOLDER or folder.name != "best":
        return folder
    path = folder.parents[1] / "best.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder.parents[1]} has no best step: it was trained without train.keep_best, or not "
            f"evaluated yet; name a step of {saved_steps(folder.parents[1])} or the workdir"
        )
    return folder.parent / str(json.loads(path.read_text())["step"])


def write_checksums(root: epath.Path, step: int) -> None:
    """Writes size and CRC-32 of every file of a finished step next to it."""
    sums = json.dumps(_sums(root / FOLDER / str(step)))
    write_atomic(root / FOLDER / f"{step}.sums.json", sums)


def _sums(folder: epath.Path, parts: Sequence[str] = ("",)) -> dict[str, list[int]]:
    def one(path: epath.Path) -> tuple[str, list[int]]:
        crc, size = 0, 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
        return str(path.relative_to(folder)), [size, crc]

    files = [path for part in parts for path in files_below(folder / part)]
    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, files))


def newest_whole(
    root: epath.Path, steps: Sequence[int], parts: Sequence[str] = ()
) -> tuple[int, list[int]]:
    """The newest step in which every byte is as it was written, and the newer ones, damaged.

    `steps` of the workdir are those to take from, oldest first; `parts` are the folders of a step
    that are read (empty: all). A step appears under its name only when all of it is written. Where
    the run was killed before it also wrote the checksums, they are written now, if all is checked.
    """
    problems: dict[int, str] = {}
    for step in reversed(steps):
        problem = _damage(root, step, parts)
        if not problem:
            return step, list(problems)
        logging.warning("checkpoint of step %d in %s is damaged: %s", step, root, problem)
        problems[step] = problem
    raise ValueError(
        f"none of the checkpoints {sorted(problems)} in {root} is whole: "
        f"{'; '.join(problems.values())}; restore one from a copy, or run the stage again"
    )


def _damage(root: epath.Path, step: int, parts: Sequence[str]) -> str:
    path = root / FOLDER / f"{step}.sums.json"
    if not path.is_file():
        logging.warning("checkpoint of step %d in %s has no checksums yet", step, root)
        if not parts:
            write_checksums(root, step)
        return ""
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        return f"{path} is not JSON"
    actual = _sums(root / FOLDER / str(step), parts or ("",))
    for name in sorted(expected):
        if (not parts or name.split("/")[0] in parts) and actual.get(name) != expected[name]:
            return f"file {step}/{name} is {'changed' if name in actual else 'missing'}"
    return ""


def params_digest(params: Params) -> str:
    """A sha256 over every parameter's path, shape and bits, the same on every mesh."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    folds = jax.device_get([_fold(leaf) for _, leaf in leaves])
    folded = [
        (jax.tree_util.keystr(path), list(leaf.shape), [int(x) for x in fold])
        for (path, leaf), fold in zip(leaves, folds, strict=True)
    ]
    return hashlib.sha256(json.dumps(folded).encode()).hexdigest()


@jax.jit
def _fold(leaf: jax.Array) -> jax.Array:
    """Two 32-bit sums over the raw bits, each entry times an odd number of its index.

    Integer sums do not depend on the order of addition, so nor on how the leaf is sharded.
    """
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        shape = tuple(size if i == axis else 1 for i in range(leaf.ndim))
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    mixed = bits ^ (bits >> 15)
    first = (bits * (2 * index + 1)).sum(dtype=jnp.uint32)
    return jnp.stack([first, (mixed * (index * jnp.uint32(2654435761) | 1)).sum(dtype=jnp.uint32)])
