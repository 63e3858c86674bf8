"""The parameters of a checkpoint, read in pieces straight into the memory where they stay.

Orbax restores an array with its packed bytes and an unpacked copy beside it, which doubles what the
largest array of a model needs. What it wrote is a plain TensorStore array for every leaf; here each
device's part of it is read chunk by chunk.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from zephyr_jax.types import Params
from zephyr_jax.weights.host_arrays import aligned_empty, from_parts

CHUNK_BYTES = 1 << 23  # of what is written in one piece
_AHEAD = 4  # chunks that are being read at once
# What Orbax's specs refer to: where the index of a file is kept.
_CONTEXT = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 10_000_000}})


def read_params(folder: epath.Path, like: Params, dtype: str) -> Params:
    """The parameters that Orbax saved in `folder`, cast to `dtype` on the way.

    Args:
        folder: `STEP/params` of a checkpoint.
        like: shapes and shardings.
        dtype: of the parameters.

    Raises:
        ValueError: if an array is missing, or has another shape.
    """
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(like, sep="/"))
    params = {}
    for path, leaf in leaves.items():
        stored = _open(folder, path)
        if tuple(stored.shape) != leaf.shape:
            raise ValueError(f"{path} in {folder} is {stored.shape}, expected {leaf.shape}")

        def read(index: tuple[slice, ...], stored: Any = stored) -> np.ndarray:
            return _read(stored, index, np.dtype(dtype))

        params[path] = from_parts(leaf.shape, leaf.sharding, read)
    return traverse_util.unflatten_dict(params, sep="/")


def _open(folder: epath.Path, path: str) -> Any:
    info = ocp.type_handlers.ParamInfo(
        name=path.replace("/", "."), parent_dir=folder, ts_context=_CONTEXT
    )
    packed = ocp.type_handlers.is_ocdbt_checkpoint(folder)
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=packed)
    try:
        return tensorstore.open(spec, open=True, read=True, context=_CONTEXT).result()
    except ValueError as error:
        raise ValueError(f"{folder} holds no array {path} that can be read: {error}") from error


def _read(stored: Any, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part of a stored array that `index` selects, along the chunks in which it was written."""
    out = aligned_empty(tuple(part.stop - part.start for part in index), dtype)
    cuts = []
    for part, size in zip(index, stored.chunk_layout.read_chunk.shape, strict=True):
        first = part.start // size * size
        starts = range(first, part.stop, size)
        cuts.append([slice(max(at, part.start), min(at + size, part.stop)) for at in starts])
    waiting: collections.deque[Any] = collections.deque()

    def take() -> None:
        cell, values = waiting.popleft()
        here = (
            slice(c.start - p.start, c.stop - p.start) for c, p in zip(cell, index, strict=True)
        )
        with np.errstate(over="ignore"):
            out[tuple(here)] = values.result()

    for cell in itertools.product(*cuts):
        waiting.append((cell, stored[cell].read()))
        if len(waiting) == _AHEAD:
            take()
    while waiting:
        take()
    return out
