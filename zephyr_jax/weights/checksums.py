"""The steps saved under a workdir, and whether their bytes are still those that were written.

Orbax restores a flipped bit without a word, so sizes and CRC-32 sums lie beside each step.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from absl import logging
from etils import epath

from zephyr_jax.storage import files_below, is_remote, write_atomic

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"  # what Orbax writes last, in a bucket, where nothing is renamed
_T = TypeVar("_T")


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


def write_checksums(root: epath.Path, step: int) -> None:
    """Writes size and CRC-32 of every file of a finished step beside it."""
    sums = json.dumps(_sums(root / FOLDER / str(step)))
    write_atomic(root / FOLDER / f"{step}.sums.json", sums)


def damage(root: epath.Path, step: int, parts: Sequence[str] = ()) -> str | None:
    """What is wrong with a saved step, in words; None where every byte is as it was written.

    A step appears under its name only when all of it is written. Where the run was killed before
    it also wrote the checksums, they are made now; who asks for parts alone writes nothing.

    Args:
        root: the workdir.
        step: one of `saved_steps`.
        parts: folders of the step; empty: all. No other file is read.
    """
    path = root / FOLDER / f"{step}.sums.json"
    if not path.is_file() and parts:
        logging.warning("checkpoint of step %d in %s has no checksums; taken as it is", step, root)
        return None
    if not path.is_file():
        logging.warning("checkpoint of step %d in %s has no checksums yet; making them", step, root)
        write_checksums(root, step)
        return None
    try:
        wanted = json.loads(path.read_text())
    except ValueError:
        return f"{path} is not JSON"
    found = _sums(root / FOLDER / str(step), parts or ("",))
    for name in sorted(wanted):
        asked = not parts or name.split("/")[0] in parts
        if asked and found.get(name) != wanted[name]:
            return f"file {step}/{name} is {'changed' if name in found else 'missing'}"
    return None


def saved_steps(root: epath.Path) -> list[int]:
    """The steps that lie whole under a workdir, oldest first."""
    folder = root / FOLDER
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if is_remote(folder):
        found = [path for path in found if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def steps_of(folder: epath.Path) -> tuple[epath.Path, list[int]]:
    """The workdir, and the steps from which to choose: one where a step's folder is named."""
    if folder.parent.name == FOLDER:
        return folder.parents[1], [int(folder.name)]
    return folder, saved_steps(folder)


def newest_whole(root: epath.Path, steps: Sequence[int], load: Callable[[int], _T]) -> _T:
    """What `load` gives for the newest step whose parameters are whole.

    Args:
        root: the workdir.
        steps: from which to choose, oldest first.
        load: reads a step.

    Raises:
        ValueError: if none of them is whole.
    """
    problems = []
    for step in reversed(steps):
        problem = damage(root, step, ("params", "meta"))
        if problem is None:
            try:
                return load(step)
            except (ValueError, OSError) as error:
                if step in saved_steps(root):
                    raise
                problem = f"step {step} was deleted while it was read, by a run that goes on"
                logging.debug("%s", error)
        logging.warning("checkpoint of step %d in %s is passed over: %s", step, root, problem)
        problems.append(problem)
    raise ValueError(f"{root} has no whole checkpoint ({'; '.join(problems)}); run the stage again")
