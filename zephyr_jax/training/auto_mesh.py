"""Mesh and micro-batches for the devices at hand: what sizes of 0 in `config.mesh` ask for.

Parameters are divided 16-fold and copies of them go along data (beyond that the TPU compiler sums
whole gradients, docs/pods.md); tensor is used where a batch has fewer rows than there are devices.
A portion is as large as seems to fit beside parameters, moments and gradients.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
from absl import logging

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.models.parameters import count_params

_SHARDS = 16


class Devices(NamedTuple):
    """What the rule asks of them."""

    number: int
    slices: int
    usable_gib: float | None  # of one; None: not known, portions stay as they are


def devices_here() -> Devices:
    """Those that JAX sees, of all processes."""
    devices = jax.devices()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return Devices(
        len(devices),
        len({getattr(device, "slice_index", 0) for device in devices}),
        limit / 2**30 if limit else None,
    )


def resolve_mesh(config: RunConfig, devices: Devices | None = None) -> RunConfig:
    """The run with sizes in the place of a mesh that is to be chosen; any other as it is."""
    if not config.mesh.auto:
        return config
    new = chosen(config, devices or devices_here(), rows_of(config))
    mesh, portions = new.mesh, new.train.micro_batches
    logging.info(
        "chosen: --config.mesh.data=%d --config.mesh.fsdp=%d --config.mesh.tensor=%d "
        "--config.train.micro_batches=%d",
        *(mesh.data, mesh.fsdp, mesh.tensor, portions),
    )
    return new


def rows_of(config: RunConfig) -> int:
    """Rows of a batch; of pairs as many as real ones fill: 46 of 2,048 tokens for 128 pairs."""
    if not config.dpo:
        return config.train.batch_size
    longest = min(config.dpo.max_length, 1024) / 1024
    return math.ceil(config.train.batch_size * 46 / 128 * 2048 / config.data.seq_len * longest)


def chosen(config: RunConfig, devices: Devices, rows: int) -> RunConfig:
    """The run with mesh and micro-batches by the rule of this module.

    Args:
        config: of the run.
        devices: on which it is to run.
        rows: of a batch; portions and mesh divide them where they are dialogues.
    """
    heads, count = config.model.num_key_value_heads, devices.number
    tensors = [n for n in (1, 2, 4, 8) if heads % n == 0 and count % n == 0]

    def shards(tensor: int) -> int:
        """Devices that divide rows; of dialogues they must divide the batch."""
        return count // tensor

    fitting = [n for n in tensors if shards(n) <= rows and (config.dpo or not rows % shards(n))]
    tensor = fitting[0] if fitting else tensors[-1]
    fsdp = math.gcd(_SHARDS, shards(tensor) // devices.slices)
    mesh = MeshConfig(shards(tensor) // fsdp, fsdp, tensor)
    portions = config.train.micro_batches
    if devices.usable_gib is not None:
        portions = _portions(config, devices.usable_gib, mesh, rows)
    train = dataclasses.replace(config.train, micro_batches=portions)
    return dataclasses.replace(config, mesh=mesh, train=train)


def _portions(config: RunConfig, usable_gib: float, mesh: MeshConfig, rows: int) -> int:
    """The fewest portions that seem to fit; one row a device where none does.

    By libtpu's count for the 7B (docs/pods.md) a device holds parameters, moments and gradients in
    float32, two more copies of the parameters where gradients are added up, 3.3 GiB, and for each
    row three times what its layers keep.
    """
    model, shards = config.model, mesh.data * mesh.fsdp
    kept = model.num_hidden_layers * config.data.seq_len * model.hidden_size * 2 / 2**30
    copy = count_params(model) * 4 / (mesh.fsdp * mesh.tensor) / 2**30
    most = max(1, -(-rows // shards))
    for portions in range(1, most):
        if rows % (shards * portions) and not config.dpo:
            continue
        copies = 0.6 if config.lora else 4 if portions == 1 else 6
        if copies * copy + 3.3 + 3 * kept * -(-rows // (shards * portions)) <= usable_gib:
            return portions
    return most
