"""The frozen reference of preference training: its log-probs, computed once and stored.

The file lies beside the packed rows and is joined to them by pair id. Its name is a digest of the
reference's parameters and of all that shaped the rows, so another reference is another file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.config import RunConfig
from zephyr_jax.data import remote
from zephyr_jax.data.packed import PackedSet
from zephyr_jax.data.pipeline import Plan, device_rows, read_batches
from zephyr_jax.steps import reference_logps
from zephyr_jax.types import Params


@jax.jit
def _fold(leaf: jax.Array) -> jax.Array:
    """Two 32-bit sums over the raw bits, each entry times an odd number of its index.

    Integer sums do not depend on the order of addition, so nor on how the leaf is divided.
    """
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        shape = tuple(size if i == axis else 1 for i in range(leaf.ndim))
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    mixed = bits ^ (bits >> 15)
    first = (bits * (2 * index + 1)).sum(dtype=jnp.uint32)
    return jnp.stack([first, (mixed * (index * jnp.uint32(2654435761) | 1)).sum(dtype=jnp.uint32)])


def params_digest(params: Params) -> str:
    """A sha256 over every parameter's path, shape and bits, the same on every mesh."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    folds = jax.device_get([_fold(leaf) for _, leaf in leaves])
    said = [
        (jax.tree_util.keystr(path), list(leaf.shape), [int(x) for x in fold])
        for (path, leaf), fold in zip(leaves, folds, strict=True)
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def reference_digest(config: RunConfig, params: Params, packed: PackedSet) -> str:
    """What a set of stored log-probs depends on: parameters, rows, dtype of the computation."""
    said = json.dumps([params_digest(params), packed.folder.name, config.model.dtype])
    return hashlib.sha256(said.encode()).hexdigest()


class ReferenceLogps:
    """Stored log-probs, looked up by pair id."""

    def __init__(self, pair_ids: np.ndarray, logps: np.ndarray):
        order = np.argsort(pair_ids)
        self._ids, self._logps = pair_ids[order], logps[order]

    def lookup(self, pair_ids: np.ndarray) -> np.ndarray:
        """Chosen and rejected log-probs `R K 2` float32 of ids `R K`; zeros where the id is 0.

        Raises:
            ValueError: if a pair has none.
        """
        at = np.minimum(np.searchsorted(self._ids, pair_ids), len(self._ids) - 1)
        missing = (self._ids[at] != pair_ids) & (pair_ids != 0)
        if missing.any():
            raise ValueError(
                f"{missing.sum()} pairs have no stored reference log-probs, first id "
                f"{pair_ids[missing][0]}; delete the reference-*.npz beside the packed set"
            )
        return np.where((pair_ids != 0)[..., None], self._logps[at], np.float32(0))


def reference_file(packed: PackedSet, digest: str) -> Path:
    """Where the log-probs of this digest are stored."""
    return packed.folder / f"reference-{digest[:16]}.npz"


def load_reference(packed: PackedSet, digest: str) -> ReferenceLogps | None:
    """The stored log-probs of this digest, or None where there are none.

    Raises:
        ValueError: if the file says that it belongs to another reference.
    """
    path = reference_file(packed, digest)
    if not path.is_file() and packed.home:
        remote.fetch_file(packed.home, path)
    if not path.is_file():
        return None
    with np.load(path) as stored:
        found = str(stored["digest"])
        if found != digest:
            raise ValueError(
                f"{path} belongs to reference {found}, this run's is {digest}; delete the file"
            )
        return ReferenceLogps(stored["pair_ids"], stored["logps"])


def compute_reference(
    config: RunConfig, params: Params, packed: PackedSet, plan: Plan, digest: str
) -> ReferenceLogps:
    """Computes and stores the log-probs of every training and held-out pair under `params`."""
    n_pairs = packed.manifest["pairs_per_row"]
    train = config.train
    shape = {"n_pairs": n_pairs, "n_micro": train.micro_batches, "attention": train.attention}
    score = jax.jit(functools.partial(reference_logps, config.model, **shape))
    ids, values = [], []
    for split, stop in (("train", plan.steps_per_epoch), ("eval", plan.eval_steps)):
        batches = read_batches(packed, plan, split, 0, stop, config.seed)
        for batch in tqdm(batches, desc=f"reference {split}", total=stop):
            logps = score(params, device_rows(batch))
            values.append(np.asarray(multihost_utils.process_allgather(logps, tiled=True)))
            ids.append(batch.pair_ids)
    pair_ids = np.concatenate(ids).reshape(-1)
    logps = np.concatenate(values).reshape(-1, 2)
    # A pair that is taken several times has one value; 0 stands for none.
    pair_ids, first = np.unique(pair_ids, return_index=True)
    pair_ids, logps = pair_ids[pair_ids != 0], logps[first[pair_ids != 0]]
    path = reference_file(packed, digest)
    if not jax.process_index():
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, pair_ids=pair_ids, logps=logps, digest=digest)
        os.replace(temporary, path)
        if packed.home:
            remote.publish_file(path, packed.home)
    logging.info("reference log-probs of %d pairs: %s", len(pair_ids), path)
    return ReferenceLogps(pair_ids, logps)
