"""Prints the rows that this process, one of several, holds: row_digests.py FOLDER START STOP."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from zephyr_jax import distributed
from zephyr_jax.data.packing.batches import device_rows, make_plan, read_batches
from zephyr_jax.data.packing.packed import PackedSet


def mesh_in_order(order, sizes=(2, 2, 2)):
    """A mesh of data, fsdp and tensor whose devices stand in this order."""
    devices = np.asarray(jax.devices())[order].reshape(sizes)
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=explicit)


def digests(packed: PackedSet, start: int, stop: int) -> Iterator[tuple[int, int, str]]:
    """For each row on a device here: its step, its index in the batch, and a hash.

    The hash is of the five arrays as they lie on the devices, and of all pair ids of the batch.
    """
    plan = make_plan(packed, 8, 3, 0, 8)
    batches = read_batches(packed, plan, "train", start, stop, 0)
    for step, batch in enumerate(batches, start):
        assert len(batch.rows.tokens) == plan.rows_per_batch // jax.process_count()
        for shards in zip(*(array.addressable_shards for array in device_rows(batch)), strict=True):
            first = shards[0].index[0].start or 0
            arrays = [np.asarray(shard.data) for shard in shards]
            for at in range(len(arrays[0])):
                digest = hashlib.sha256(np.ascontiguousarray(batch.pair_ids).tobytes())
                for array in arrays:
                    digest.update(array[at].tobytes())
                yield step, first + at, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    distributed.start(parser.parse_args([]))
    folder, *numbers = sys.argv[1:]
    packed = PackedSet(Path(folder), json.loads((Path(folder) / "manifest.json").read_text()))
    with jax.set_mesh(mesh_in_order([0, 1, 4, 5, 2, 3, 6, 7])):  # a process's rows are not in a row
        for step, row, digest in digests(packed, *map(int, numbers)):
            sys.stdout.write(f"row {step} {row} {digest}\n")


if __name__ == "__main__":
    main()
