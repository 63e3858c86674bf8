"""The stages one after another: raw rows -> the shards of a set, in a folder of work.

What is finished stays in the folder, so the same command goes on after a kill, and the shards are
the same bytes whatever happened on the way and however many processes took part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from zephyr_jax.data.prepare.account import REPORT, account, check_rows
from zephyr_jax.data.prepare.convert import convert_chunk, convert_tasks, publish
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.prepare.select import decide
from zephyr_jax.data.prepare.shards import Shard, shard_tasks, write_shard


class Runner(Protocol):
    """What does many tasks: `parallel.run_tasks`, or one like it on a cluster."""

    def __call__(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        *,
        sizes: Sequence[int],
        title: str,
        unit: str,
    ) -> list[Any]:
        """The results of all tasks, in their order."""
        ...


class Made(NamedTuple):
    """The finished shards of each split that has any, with their files, and the report."""

    shards: dict[str, list[tuple[Path, Shard]]]
    report: Path


def make(plan: Plan, folder: Path, run: Runner) -> Made:
    """Runs the three stages, or what is left of them.

    Raises:
        ValueError: a file is damaged, too many rows do not fit, nothing is left for training, or
            published splits share a prompt.
    """
    (folder / "staged").mkdir(parents=True, exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    tasks = convert_tasks(plan, folder / "staged")
    chunk_sizes = [task.chunk.size for task in tasks]
    run(convert_chunk, tasks, sizes=chunk_sizes, title=f"reading {plan.dataset}", unit="B")
    check_rows(plan, tasks)
    decisions = decide(plan, tasks)
    report = account(plan, tasks, decisions)
    shards = shard_tasks(plan.schema.splits, tasks, decisions, folder / "shards")
    sizes = [task.size for task in shards]
    made = run(write_shard, shards, sizes=sizes, title=f"writing {plan.dataset}", unit="B")
    found: dict[str, list[tuple[Path, Shard]]] = {}
    for task, shard in zip(shards, made, strict=True):
        found.setdefault(task.split, []).append((task.file(".array_record"), shard))
    report["records_sha256"] = {
        split: hashlib.sha256("".join(s.sha256 for _, s in entries).encode()).hexdigest()
        for split, entries in found.items()
    }
    with publish(folder / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    return Made(found, folder / REPORT)
