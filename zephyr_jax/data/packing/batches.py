"""From packed rows to global, sharded batches.

A batch is a function of its step alone, so the order is the same whatever the number of processes
and a run resumes at any step exactly. Each process reads the rows of its own devices; Grain reads
ahead, in threads or in processes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from zephyr_jax.data.packing import packing
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.types import PreferenceBatch, Rows


class HostBatch(NamedTuple):
    """The part of a batch on one process, in NumPy: some of its rows, and all pair ids."""

    rows: Rows  # those of this process's devices, ascending
    held: np.ndarray  # which rows of the batch they are
    pair_ids: np.ndarray  # R K, of all rows, the same on every process; 0 for none


class Plan(NamedTuple):
    """How a packed set becomes batches."""

    rows_per_batch: int
    steps_per_epoch: int
    train_steps: int
    eval_steps: int


def make_plan(packed: PackedSet, batch_size: int, epochs: int, max_steps: int) -> Plan:
    """The number of rows in a batch, and of batches in an epoch, the run and the held-out set.

    A preference set brings its own rows per batch; for dialogues `batch_size` counts rows, and the
    last batch of an epoch is filled up with empty rows.
    """
    manifest = packed.manifest
    rows = manifest.get("rows_per_batch", batch_size)
    train, held_out = (manifest["splits"][s]["rows"] for s in ("train", "eval"))
    per_epoch = manifest.get("steps_per_epoch", -(-train // rows))
    steps = per_epoch * epochs
    return Plan(
        rows, per_epoch, min(steps, max_steps) if max_steps else steps, -(-held_out // rows)
    )


def row_indices(packed: PackedSet, plan: Plan, split: str, step: int, seed: int) -> np.ndarray:
    """The rows of batch `step`, `R`, -1 for empty ones: a function of the step alone.

    Rows of dialogues to train on are shuffled in every epoch; others keep their order on disk.
    """
    n_rows, size = packed.manifest["splits"][split]["rows"], plan.rows_per_batch
    if split == "train" and not packed.manifest["pairs_per_row"]:
        epoch, step = divmod(step, plan.steps_per_epoch)
        rows = _shuffled(n_rows, seed, epoch)[step * size :][:size]
    else:
        rows = np.arange(step * size, min((step + 1) * size, n_rows))
    return np.pad(rows, (0, size - len(rows)), constant_values=-1)


@functools.lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def held_rows(n_rows: int, devices: Collection[Any] | None = None) -> np.ndarray:
    """The rows of a batch that these devices (None: this process's) hold on the ambient mesh."""
    sharding = named_sharding(spec("BT"))
    if devices is None:
        devices = sharding.addressable_devices
    held = np.zeros(n_rows, bool)
    for device, index in sharding.devices_indices_map((n_rows, 1)).items():
        if device in devices:
            held[index[0]] = True
    return np.flatnonzero(held)


def read_batches(
    packed: PackedSet,
    plan: Plan,
    split: str,
    start: int,
    stop: int,
    seed: int,
    held: np.ndarray | None = None,
) -> Iterator[HostBatch]:
    """Batches `start` to `stop`, read ahead by Grain: of each the rows of this process's devices.

    `held` are rows of each batch to read instead of `held_rows`; `seed` is that of the order.
    """
    held = held_rows(plan.rows_per_batch) if held is None else held
    indices = [row_indices(packed, plan, split, step, seed) for step in range(start, stop)]
    dataset: Any = grain.MapDataset.source([rows[held] for rows in indices])
    dataset = dataset.map(packed.rows(split).read).map(packing.row_arrays)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    dataset = dataset.to_iter_dataset(options)
    iterator, ids = iter(dataset), packed.pair_ids(split)
    try:
        for rows, arrays in zip(indices, iterator, strict=True):
            yield HostBatch(Rows(*arrays), held, np.where(rows[:, None] < 0, 0, ids[rows]))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()  # ends the reading processes


def device_rows(batch: HostBatch) -> Rows:
    """The global rows on the ambient mesh, sharded over data and fsdp.

    Every process puts the rows that it has read on its own devices.
    """
    n_rows, sharding = len(batch.pair_ids), named_sharding(spec("BT"))

    def global_array(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(n_rows)
            at = int(np.searchsorted(batch.held, begin))
            return array[at : at + end - begin, index[1]]

        return jax.make_array_from_callback((n_rows, array.shape[1]), sharding, shard)

    return Rows(*(global_array(np.asarray(array)) for array in batch.rows))


def device_pairs(
    batch: HostBatch, rows: Rows, ref_logps: np.ndarray | jax.Array
) -> PreferenceBatch:
    """The global preference batch: its rows from `device_rows`, the reference's values `R K 2`."""
    mask = _global(batch.pair_ids != 0, "BS")
    if not isinstance(ref_logps, jax.Array):
        ref_logps = _global(ref_logps, "BST")
    return PreferenceBatch(rows, mask, ref_logps)


def _global(array: np.ndarray, axes: str) -> jax.Array:
    return jax.make_array_from_callback(array.shape, named_sharding(spec(axes)), lambda i: array[i])
