"""The parameters of a checkpoint, read chunk by chunk straight into the memory where they stay.

Orbax's own restore holds packed bytes and an unpacked copy next to each array: 0.8 GB more than the
2.2 GB of weights in benchmarks/port_memory.py, where this holds 0.04 GB. What Orbax wrote is a
TensorStore array (Zarr in OCDBT) for every leaf, which is opened here as such.
"""

from __future__ import annotations

import collections
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from flax import traverse_util

from zephyr_jax.storage import is_remote
from zephyr_jax.types import Params
from zephyr_jax.weights.layouts import aligned_empty, from_parts

CHUNK_BYTES = 1 << 23  # of an array, written as one chunk
_THREADS = 4  # chunks that are read at the same time
_CONTEXT = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": 10_000_000}})


def read_stored(folder: epath.Path, like: Params, dtype: str) -> Params:
    """The parameters that Orbax saved in `folder`, cast to `dtype` on the way.

    Args:
        folder: `STEP/params` of a checkpoint.
        like: shapes and shardings.
        dtype: of the parameters.

    Raises:
        ValueError: if an array is missing, or has another shape.
    """
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(like, sep="/"))
    arrays = {path: _read_array(folder, path, leaf, dtype) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _read_array(folder: epath.Path, path: str, leaf: Any, dtype: str) -> jax.Array:
    base = str(folder) if is_remote(folder) else f"file://{folder}"
    store = {"driver": "ocdbt", "base": f"{base}/", "path": path.replace("/", ".") + "/"}
    spec = {"driver": "zarr", "kvstore": store | {"cache_pool": "cache_pool#index"}}
    try:
        stored = tensorstore.open(spec, open=True, read=True, context=_CONTEXT).result()
    except ValueError as error:
        raise ValueError(f"{folder} holds no array {path} that can be read: {error}") from error
    if tuple(stored.shape) != leaf.shape:
        raise ValueError(f"{path} in {folder} is {stored.shape}, expected {leaf.shape}")
    cast = tensorstore.cast(stored, dtype)
    return from_parts(leaf.shape, leaf.sharding, lambda part: _read_part(cast, part, dtype))


def _read_part(stored: Any, part: tuple[slice, ...], dtype: str) -> np.ndarray:
    """The part of a stored array with these bounds, by the chunks in which it was written."""
    out = aligned_empty(tuple(s.stop - s.start for s in part), np.dtype(dtype))
    sizes = stored.chunk_layout.read_chunk.shape
    corners = itertools.product(
        *(range(s.start // n * n, s.stop, n) for s, n in zip(part, sizes, strict=True))
    )

    def copy(corner: tuple[int, ...]) -> None:
        bounds = [
            (max(at, s.start), min(at + n, s.stop))
            for at, s, n in zip(corner, part, sizes, strict=True)
        ]
        cell = tuple(slice(low, high) for low, high in bounds)
        target = (
            slice(low - s.start, high - s.start)
            for (low, high), s in zip(bounds, part, strict=True)
        )
        out[tuple(target)] = stored[cell].read().result()

    with ThreadPoolExecutor(_THREADS) as pool:
        collections.deque(pool.map(copy, corners), maxlen=0)  # raises what a thread raised
    return out
