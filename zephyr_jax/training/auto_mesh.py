"""Mesh and micro-batches for the devices at hand, where the sizes in `config.mesh` are 0.

Parameters are sharded 16-fold and replicated along data (with more shards the TPU compiler sums
whole gradients, docs/pods.md); tensor is used if a batch has fewer rows than there are devices. A
micro-batch is as large as seems to fit next to parameters, moments and gradients.
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
    """The devices of a run."""

    number: int
    slices: int
    usable_gib: float | None  # of one device; None: unknown, micro-batches stay as they are


def resolve_mesh(config: RunConfig, devices: Devices | None = None) -> RunConfig:
    """The run with its mesh sized for these devices (None: JAX's), unless it has sizes itself."""
    if not config.mesh.auto:
        return config
    if devices is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        slices = {getattr(device, "slice_index", 0) for device in jax.devices()}
        devices = Devices(jax.device_count(), len(slices), limit / 2**30 if limit else None)
    new = fitted(config, devices, rows_of(config))
    logging.info("sizes: %s, %d micro-batches", new.mesh, new.train.micro_batches)
    return new


def rows_of(config: RunConfig) -> int:
    """Rows of a batch; of pairs an estimate from real ones: 46 of 2,048 tokens for 128 pairs."""
    if not config.dpo:
        return config.train.batch_size
    longest = min(config.dpo.max_length, 1024) / 1024
    return math.ceil(config.train.batch_size * 46 / 128 * 2048 / config.data.seq_len * longest)


def fitted(config: RunConfig, devices: Devices, rows: int) -> RunConfig:
    """The run with mesh and micro-batches for batches of `rows` rows, by the rule of this module.

    By libtpu's count for the 7B (docs/pods.md) a device holds parameters, moments and gradients in
    float32, two more copies of the parameters if gradients are accumulated, 3.3 GiB, and for each
    row three times the saved activations of its layers. One row a device if nothing seems to fit.
    """
    model, count = config.model, devices.number

    def divides(shards: int) -> bool:
        return config.dpo is not None or rows % shards == 0  # pairs are packed into any rows

    tensors = [n for n in (1, 2, 4, 8) if model.num_key_value_heads % n == 0 and count % n == 0]
    fitting = [n for n in tensors if count // n <= rows and divides(count // n)]
    tensor = fitting[0] if fitting else tensors[-1]
    fsdp = math.gcd(_SHARDS, count // tensor // devices.slices)
    shards = count // tensor
    n_micro = config.train.micro_batches
    if devices.usable_gib is not None:
        saved = model.num_hidden_layers * config.data.seq_len * model.hidden_size * 2 / 2**30
        copy = count_params(model) * 4 / (fsdp * tensor) / 2**30
        for n_micro in range(1, max(1, -(-rows // shards)) + 1):
            copies = 0.6 if config.lora else 4 if n_micro == 1 else 6
            needed = copies * copy + 3.3 + 3 * saved * -(-rows // (shards * n_micro))
            if divides(shards * n_micro) and needed <= devices.usable_gib:
                break
    train = dataclasses.replace(config.train, micro_batches=n_micro)
    return dataclasses.replace(config, mesh=MeshConfig(shards // fsdp, fsdp, tensor), train=train)
