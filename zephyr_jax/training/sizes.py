"""The sizes that a run's step has on its devices: mesh, micro-batches, and what is recomputed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from absl import logging

from zephyr_jax.chips import chip_of
from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.models.attention import ONE_CALL
from zephyr_jax.models.parameters import count_params

# What the backward pass finds, from most to nothing; each step down frees memory (docs/speed.md).
LEAST_FIRST = (
    ("q", "k", "v", "attention", "o", "gate", "up"),
    ("q", "k", "v", "attention", "o"),
    ("q", "k", "v", "attention"),
    ("q", "k", "v"),
    "full",
)
_FILLED = 0.95  # of a device's memory, by `estimated_gib`


class Devices(NamedTuple):
    """The devices of a run."""

    number: int
    slices: int
    usable_gib: float | None  # of one device; None: unknown, micro-batches stay as they are
    keeps_hidden: bool = True  # as of `Chip`


def resolve_sizes(config: RunConfig, devices: Devices | None = None) -> RunConfig:
    """The run with mesh and remat chosen for these devices (None: JAX's) where they are auto."""
    if not config.mesh.auto and config.train.remat != "auto":
        return config
    if devices is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        slices = {getattr(device, "slice_index", 0) for device in jax.devices()}
        keeps_hidden = getattr(chip_of(jax.devices()[0].device_kind), "keeps_hidden", True)
        devices = Devices(jax.device_count(), len(slices), limit and limit / 2**30, keeps_hidden)
    if config.mesh.auto:
        config = fitted(config, devices, rows_of(config))
    config = with_remat(config, devices, rows_of(config))
    train = config.train
    logging.info("%s, %d micro-batches, remat=%s", config.mesh, train.micro_batches, train.remat)
    return config


def rows_of(config: RunConfig) -> int:
    """Rows of a batch; of pairs an estimate from real ones: 46 of 2,048 tokens for 128 pairs."""
    if not config.dpo:
        return config.train.batch_size
    longest = min(config.dpo.max_length, 1024) / 1024
    return math.ceil(config.train.batch_size * 46 / 128 * 2048 / config.data.seq_len * longest)


def fitted(config: RunConfig, devices: Devices, rows: int) -> RunConfig:
    """The run with mesh and micro-batches for batches of `rows` rows.

    Parameters are sharded 16-fold and replicated along data (with more shards the TPU compiler sums
    whole gradients, docs/pods.md); tensor is used if a batch has fewer rows than there are devices.
    One row a device and micro-batch if nothing seems to fit `estimated_gib`.
    """
    model, count = config.model, devices.number

    def divides(shards: int) -> bool:
        return config.dpo is not None or rows % shards == 0  # pairs are packed into any rows

    tensors = [n for n in (1, 2, 4, 8) if model.num_key_value_heads % n == 0 and count % n == 0]
    fitting = [n for n in tensors if count // n <= rows and divides(count // n)]
    tensor = fitting[0] if fitting else tensors[-1]
    fsdp = math.gcd(16, count // tensor // devices.slices)
    shards = count // tensor
    config = dataclasses.replace(config, mesh=MeshConfig(shards // fsdp, fsdp, tensor))
    if devices.usable_gib is None:
        return config
    cut = config
    for n_micro in range(1, max(1, -(-rows // shards)) + 1):
        cut = with_train(config, micro_batches=n_micro)
        if divides(shards * n_micro) and estimated_gib(cut, rows) <= _FILLED * devices.usable_gib:
            break
    return cut


def with_remat(config: RunConfig, devices: Devices, rows: int) -> RunConfig:
    """The run with the least recomputation of `LEAST_FIRST` that fits, where remat is auto."""
    if config.train.remat != "auto":
        return config
    sized = dataclasses.replace(config, mesh=config.mesh.sized(devices.number))
    usable = _FILLED * (devices.usable_gib or 0.0)  # full where it is not known
    for remat in LEAST_FIRST:
        fits = estimated_gib(with_train(sized, remat=remat), rows) <= usable
        if fits and (devices.keeps_hidden or "gate" not in remat):
            return with_train(config, remat=remat)
    return with_train(config, remat="full")


def with_train(config: RunConfig, **fields: Any) -> RunConfig:
    """The run with these fields of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def estimated_gib(config: RunConfig, rows: int) -> float:
    """What a device holds at the peak of a step of `rows` rows, for the 7B within 5% of libtpu's.

    Parameters, moments and gradients in float32, the gradients' sum if they are accumulated,
    2.4 GiB (gathered weights of layers and head, their gradients), the inputs of all layers, the
    outputs that `train.remat` keeps, and one layer's hidden units four times, in two bytes each.
    """
    model, mesh, train = config.model, config.mesh, config.train
    copy = count_params(model) * 4 / (mesh.fsdp * mesh.tensor * mesh.context)
    copies = 0.6 if config.lora else 4 if train.micro_batches == 1 else 5
    kept = train.remat if isinstance(train.remat, tuple) else ()
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    widths = {"q": queries, "k": keys, "v": keys, "o": model.hidden_size}
    once = min(ONE_CALL, model.sliding_window or ONE_CALL)
    branched = config.dpo is not None and config.data.seq_len > once
    widths["attention"] = 2 * queries if branched else queries  # one for each branch
    widths |= {"gate": model.intermediate_size, "up": model.intermediate_size, "down": widths["o"]}
    width = model.hidden_size + sum(widths[name] for name in kept) / mesh.tensor
    held = -(-rows // (mesh.data * mesh.fsdp * train.micro_batches))
    width = model.num_hidden_layers * width + 4 * model.intermediate_size / mesh.tensor
    tokens = config.data.seq_len // mesh.context * held
    return (copies * copy + 2 * tokens * width) / 2**30 + 2.4
