"""From packed rows to global, sharded batches, each a function of its step alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
    # R K, of all rows, the same on every process; 0 for none, below 0 for an undesirable answer
    pair_ids: np.ndarray
    numbers: np.ndarray  # R, of all rows in the packed set, -1 for empty ones
    own: np.ndarray  # which of them are this process's


class Plan(NamedTuple):
    """How a packed set becomes batches."""

    rows_per_batch: int
    steps_per_epoch: int
    train_steps: int
    eval_steps: int  # 0 without a held-out split


def make_plan(
    packed: PackedSet, batch_size: int, epochs: int, max_steps: int, multiple: int = 1
) -> Plan:
    """The plan; pairs bring their rows per batch, rounded up to `multiple`, data x fsdp x micro."""
    manifest, splits = packed.manifest, packed.manifest["splits"]
    stored = manifest.get("rows_per_batch")
    rows = packing.round_up(stored, multiple) if stored else batch_size
    train, held_out = (splits[s]["rows"] if s in splits else 0 for s in ("train", "eval"))
    per_epoch = manifest.get("steps_per_epoch", -(-train // rows))
    steps = per_epoch * (epochs or -(-packing.LEAST_STEPS // per_epoch))
    steps = min(steps, max_steps or steps)
    return Plan(rows, per_epoch, steps, -(-held_out // rows))


def row_indices(packed: PackedSet, plan: Plan, split: str, step: int, seed: int) -> np.ndarray:
    """The rows of batch `step`, -1 for empty ones; those of dialogues are shuffled every epoch."""
    n_rows, size = packed.manifest["splits"][split]["rows"], plan.rows_per_batch
    if split == "train" and not packed.manifest["pairs_per_row"]:
        epoch, step = divmod(step, plan.steps_per_epoch)
        rows = _shuffled(n_rows, seed, epoch)[step * size :][:size]
    else:
        stored = packed.manifest.get("rows_per_batch", size) if split == "train" else size
        rows = np.arange(step * stored, min((step + 1) * stored, n_rows))
    return np.pad(rows, (0, size - len(rows)), constant_values=-1)


@functools.lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def read_batches(
    packed: PackedSet, plan: Plan, split: str, start: int, stop: int, seed: int
) -> Iterator[HostBatch]:
    """Batches `start` to `stop` in the order of the seed, the rows of this process's devices."""
    sharding, numbers = named_sharding(spec("BT")), np.arange(plan.rows_per_batch)
    slices = sharding.devices_indices_map((plan.rows_per_batch, 1))
    held = np.unique([numbers[slices[device][0]] for device in sharding.addressable_devices])
    indices = [row_indices(packed, plan, split, step, seed) for step in range(start, stop)]
    dataset: Any = grain.MapDataset.source([rows[held] for rows in indices])
    dataset = dataset.map(packed.rows(split).read).map(packing.row_arrays)
    options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)  # of a slow disk, too
    iterator, ids = iter(dataset.to_iter_dataset(options)), packed.pair_ids(split)
    try:
        for rows, arrays in zip(indices, iterator, strict=True):
            yield HostBatch(Rows(*arrays), np.where(rows[:, None] < 0, 0, ids[rows]), rows, held)
    finally:
        iterator.close()  # ends the reading threads


def device_rows(batch: HostBatch) -> Rows:
    """The global rows on the ambient mesh, sharded over data and fsdp."""
    return Rows(*(_global(array, "BT", len(batch.pair_ids)) for array in batch.rows))


def device_pairs(
    batch: HostBatch, rows: Rows, ref_logps: np.ndarray | jax.Array
) -> PreferenceBatch:
    """The global preference batch: its rows from `device_rows`, the reference's values `R K 2`."""
    n_rows = len(batch.pair_ids)
    mask = _global(batch.pair_ids != 0, "BS", n_rows)
    if not isinstance(ref_logps, jax.Array):
        ref_logps = _global(ref_logps, "BST", n_rows)
    return PreferenceBatch(rows, mask, ref_logps, _global(batch.pair_ids > 0, "BS", n_rows))


def _global(array: np.ndarray | jax.Array, axes: str, n_rows: int) -> jax.Array:
    """A global array of `n_rows` rows, from all of them or those of this process's devices."""
    sharding, shape = named_sharding(spec(axes)), (n_rows, *array.shape[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)
