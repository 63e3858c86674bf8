"""From packed rows to global, sharded batches.

A batch is a function of its step alone, so the order is the same whatever the number of processes
and a run resumes at any step exactly. Grain reads ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from zephyr_jax.data.packed import PackedSet
from zephyr_jax.sharding import named, spec
from zephyr_jax.types import PreferenceBatch, Rows


class HostBatch(NamedTuple):
    """One whole batch in NumPy, the same on every process; `pair_ids` is R K, 0 for none."""

    rows: Rows
    pair_ids: np.ndarray


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
    """The rows of batch `step`, -1 for empty ones.

    Preference rows follow the stored plan, held-out rows their own order; rows of dialogues are
    shuffled anew in every epoch.
    """
    n_rows, at = packed.manifest["splits"][split]["rows"], step * plan.rows_per_batch
    order = np.arange(n_rows)
    if split == "train" and not packed.manifest["pairs_per_row"]:
        epoch, batch = divmod(step, plan.steps_per_epoch)
        order, at = (
            np.random.default_rng([seed, epoch]).permutation(n_rows),
            (batch * plan.rows_per_batch),
        )
    out = np.full(plan.rows_per_batch, -1)
    here = order[at : at + plan.rows_per_batch]
    out[: len(here)] = here
    return out


def read_batches(
    packed: PackedSet, plan: Plan, split: str, start: int, stop: int, seed: int
) -> Iterator[HostBatch]:
    """Batches `start` to `stop`, read ahead by Grain.

    Every process reads the whole batch, which is a few megabytes, and puts the rows of its own
    devices there; so no assumption is needed about which process owns which rows.
    """
    source = packed.rows(split)

    def load(step: int) -> HostBatch:
        got = source.read(row_indices(packed, plan, split, step, seed))
        arrays: dict[str, Any] = {
            name: got[name].astype(np.int32)
            for name in ("tokens", "segments", "positions", "branches")
        }
        arrays["loss_mask"] = np.ascontiguousarray(got["loss_mask"])
        return HostBatch(Rows(**arrays), got["pair_ids"])

    dataset: Any = grain.MapDataset.range(start, stop).map(load)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def device_rows(batch: HostBatch) -> Rows:
    """The global rows on the ambient mesh, divided over data and fsdp."""
    return Rows(*(_global(array, "BT") for array in batch.rows))


def device_pairs(batch: HostBatch, ref_logps: np.ndarray) -> PreferenceBatch:
    """The global preference batch with the reference's values `R K 2`."""
    mask = _global(batch.pair_ids != 0, "BS")
    return PreferenceBatch(device_rows(batch), mask, _global(ref_logps, "BST"))


def _global(array: np.ndarray | jax.Array, letters: str) -> jax.Array:
    return jax.make_array_from_callback(array.shape, named(spec(letters)), lambda i: array[i])
