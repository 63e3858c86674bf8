"""The third stage: staged records -> the ArrayRecord shards of the splits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore  # compiled

from zephyr_jax.data.prepare.convert import ConvertTask, publish
from zephyr_jax.data.prepare.select import Decisions

SHARD_BYTES = 128 << 20  # of records; a shard is about half of that on disk


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard: which records of which chunks it holds, in order."""

    split: str
    number: int
    parts: tuple[tuple[ConvertTask, np.ndarray], ...]
    folder: Path
    size: int

    def file(self, suffix: str) -> Path:
        """Where the shard (`.array_record`) and what is known of it (`.json`) are."""
        return self.folder / f"{self.split}-{self.number:05d}{suffix}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: number of records, their size in bytes, and a SHA-256 of them all."""

    rows: int
    size: int
    sha256: str


def shard_tasks(
    splits: tuple[str, str], tasks: list[ConvertTask], made: Decisions, folder: Path
) -> list[ShardTask]:
    """The shards of both splits; where one ends hangs on the records alone."""
    shards = []
    for code, split in enumerate(splits):
        kept = np.flatnonzero(made.codes == code)
        sizes = made.index["size"][kept].astype(np.int64)
        homes = (np.cumsum(sizes) - sizes) // SHARD_BYTES
        for number, home in enumerate(np.unique(homes)):
            here = kept[homes == home]
            parts = [
                (tasks[chunk], made.place[here[made.chunk[here] == chunk]])
                for chunk in np.unique(made.chunk[here])
            ]
            size = int(sizes[homes == home].sum())
            shards.append(ShardTask(split, number, tuple(parts), folder, size))
    return shards


def write_shard(task: ShardTask) -> Shard:
    """Writes one shard, unless that is done."""
    if task.file(".json").exists():
        return Shard(**json.loads(task.file(".json").read_text()))
    digest, rows = hashlib.sha256(), 0
    with publish(task.file(".array_record")) as temporary:
        # One record in each group, as TFDS writes, so that any can be read by itself; the fast
        # level of zstd halves the time and costs 4% of the size.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for source, places in task.parts:
            sizes = np.load(source.file(".npy"))["size"].astype(np.int64)
            ends = np.cumsum(sizes)
            with (
                source.file(".records").open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as staged,
            ):
                for place in places:
                    record = staged[ends[place] - sizes[place] : ends[place]]
                    digest.update(len(record).to_bytes(8, "little") + record)
                    writer.write(record)
            rows += len(places)
        writer.close()
    shard = Shard(rows, task.size, digest.hexdigest())
    with publish(task.file(".json")) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(shard)))
    return shard
