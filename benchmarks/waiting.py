"""What the training loop waits for: the next batch, and a checkpoint that is being saved.

`loader` reads batches of 16 packed rows of 2,048 tokens, with and without a delay in front of every
read of the disk, while the "device" computes for --step seconds, and prints how long the loop waits
for each batch, and the host's work of a step. `save` saves a state of --gigabytes and prints how
long the call blocks, how long the whole takes until the digests are written, and next to them a
copy in memory and `dd` of as many bytes.

    python benchmarks/waiting.py loader --delay_ms=50
    python benchmarks/waiting.py save --gigabytes=1
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.batches import Plan, device_rows, read_batches
from zephyr_jax.data.packing.packed import PackedSet, RowSource
from zephyr_jax.sharding import make_mesh
from zephyr_jax.training.metrics import Meter
from zephyr_jax.types import TrainState
from zephyr_jax.weights.checkpoint import Checkpointer

ROWS, SEQ_LEN = 16, 2048


def packed_set(folder: Path, rows: int) -> PackedSet:
    """A packed set of random full rows."""
    rng = np.random.default_rng(0)
    writer = ArrayRecordWriter(str(folder / "train.array_record"), "group_size:1")
    for _ in range(rows):
        row = np.zeros((), packing.row_dtype(SEQ_LEN, 0))
        row["tokens"], row["segments"] = rng.integers(3, 32000, SEQ_LEN), 1
        row["positions"], row["loss_mask"] = np.arange(SEQ_LEN), True
        writer.write(row.tobytes())
    writer.close()
    splits = {"train": {"rows": rows}}
    return PackedSet(folder, {"splits": splits, "pairs_per_row": 0, "seq_len": SEQ_LEN})


def loader(args: argparse.Namespace) -> None:
    """Times batches and the host's work around them."""
    read = RowSource.read

    def slow(self, indices):
        time.sleep(args.delay_ms / 1000)
        return read(self, indices)

    RowSource.read = slow
    steps = args.steps
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(make_mesh(1, 1, 1)):
        packed = packed_set(Path(name), ROWS * 20)
        plan = Plan(ROWS, 20, steps, 0)
        waits, works, meter = [], [], Meter()
        sums = {"loss": jnp.float32(1), "weight": jnp.float32(1)}
        batches = read_batches(packed, plan, "train", 0, steps, 0)
        for _ in range(steps):
            start = time.perf_counter()
            host = next(batches)
            ready = time.perf_counter()
            device_rows(host)
            meter.add(sums, None)
            waits.append(ready - start)
            works.append(time.perf_counter() - ready)
            time.sleep(args.step)
        batches.close()
    rest = waits[5:]
    sys.stdout.write(
        f"{ROWS} rows a step of {args.step} s, {args.delay_ms} ms before each read: wait for a "
        f"batch {statistics.median(rest) * 1e3:.2f} ms (longest {max(rest) * 1e3:.1f}), host work "
        f"of a step {statistics.median(works[5:]) * 1e3:.2f} ms\n"
    )


def save(args: argparse.Namespace) -> None:
    """Times a checkpoint."""
    number = int(args.gigabytes * 1e9 / 4 / 3)  # parameters and two moments
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        arrays = [
            {f"w{i}": jnp.full((number // 8 // 1024, 1024), i, jnp.float32) for i in range(8)}
            for _ in range(3)
        ]
        state = TrainState(jnp.int32(2), arrays[0], (arrays[1], arrays[2]))
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        checkpointer = Checkpointer(name, 2)
        start, blocked = 0.0, []
        for step in range(2):  # the first one imports, compiles the check of the values
            start = time.perf_counter()
            checkpointer.save(state._replace(step=jnp.int32(step)), {})
            blocked.append(time.perf_counter() - start)
            if not step:
                checkpointer._wait()
        checkpointer.close()
        total = time.perf_counter() - start
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8) + 1
        start = time.perf_counter()
        np.copyto(target, source)
        copy = time.perf_counter() - start
        path = Path(name) / "dd"
        start = time.perf_counter()
        count = f"count={size // 1_000_000}"
        command = ["dd", "if=/dev/zero", f"of={path}", "bs=1000000", count, "conv=fdatasync"]
        subprocess.run(command, check=True, capture_output=True)
        written = time.perf_counter() - start
    sys.stdout.write(
        f"{size / 1e9:.2f} GB: the loop is blocked for {blocked[1]:.2f} s (first save "
        f"{blocked[0]:.2f}), all is on disk and sealed "
        f"after {total:.2f} s; a copy in memory takes {copy:.2f} s, dd of as many bytes "
        f"{written:.2f} s\n"
    )


def main() -> None:
    """Runs one of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("loader", "save"))
    parser.add_argument("--delay_ms", type=float, default=0.0)
    parser.add_argument("--step", type=float, default=0.1, help="seconds that a step computes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", help="of the checkpoint")
    args = parser.parse_args()
    {"loader": loader, "save": save}[args.what](args)


if __name__ == "__main__":
    main()
