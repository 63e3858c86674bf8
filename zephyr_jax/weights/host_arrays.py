"""Arrays on their way between host and devices, one part at a time in host memory."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def from_parts(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array of which this process reads only its own devices' parts, one after another.

    Args:
        shape: of the whole array.
        sharding: how devices divide it.
        read: gives the part that a slice for each axis selects; who has the same part shares it.
    """
    owners = collections.defaultdict(list)
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        assert index is not None, "an addressable device without a part"
        owners[tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))].append(device)
    parts = {}
    for bounds, devices in owners.items():
        values = read(tuple(slice(*bound) for bound in bounds))
        placed = {device: jax.device_put(values, device) for device in devices}
        jax.block_until_ready(list(placed.values()))  # the next part may take this one's place
        parts |= placed
    arrays = [parts[device] for device in indices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory with any content that jax on CPU takes over as it is; what NumPy aligns, it copies."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def to_host(array: Any, layer: int | None, out: np.ndarray) -> None:
    """Writes an array, or one layer of a stacked one, from wherever its parts are into `out`.

    Args:
        array: of NumPy or jax; every process that has a part of it must call this.
        layer: its index on the first axis; None: the whole array.
        out: of the same shape, may be of another dtype and have any strides.
    """
    if isinstance(array, np.ndarray):
        out[...] = array if layer is None else array[layer]
        return
    if layer is not None:  # the index is an operand: one program for all layers
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    if not array.is_fully_addressable:
        whole = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.device_put(array, whole).addressable_data(0)
    for shard in array.addressable_shards:
        if not shard.replica_id:
            # An array keeps the host value that it gave (on CPU there is none); a copy does not.
            on_cpu = shard.device.platform == "cpu"
            out[shard.index] = np.asarray(shard.data if on_cpu else jnp.copy(shard.data))
