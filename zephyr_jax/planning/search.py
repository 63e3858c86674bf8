"""Other ways to lay a run out on a slice: meshes, portions, and what is kept for the way back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from zephyr_jax.config import MeshConfig, RunConfig
from zephyr_jax.models.param_table import count_params
from zephyr_jax.planning.compiling import Case, make_case, rows_of_pairs
from zephyr_jax.planning.topologies import Topology

REMATS = ("full", "none")
_SHARDS = 16  # of parameters: more of them make the compiler reduce whole gradients (docs/pods.md)


def chosen(config: RunConfig, topology: Topology, rows: int | None) -> RunConfig:
    """The run with a mesh and micro-batches that should suit the slice, by a rule of thumb.

    Parameters are divided 16-fold and copies of them go along data; tensor is used where a batch
    has fewer rows than the slice has devices. A portion is as large as seems to fit beside
    parameters, moments and gradients.
    """
    wanted = config.train.batch_size if rows is None else rows
    if config.dpo and rows is None:
        wanted = rows_of_pairs(config)
    heads = config.model.num_key_value_heads
    tensors = [n for n in (1, 2, 4, 8) if heads % n == 0 and topology.devices % n == 0]
    tensor = next((n for n in tensors if topology.devices // n <= wanted), tensors[-1])
    shards = topology.devices // tensor
    fsdp = math.gcd(_SHARDS, shards // topology.slices)
    mesh = MeshConfig(shards // fsdp, fsdp, tensor)
    most = max(1, int(_room(config, topology, mesh) / (2 * _kept(config))))
    portions = 1
    while wanted > portions * shards * most:
        portions *= 2
    train = dataclasses.replace(config.train, micro_batches=portions)
    return dataclasses.replace(config, mesh=mesh, train=train)


def _room(config: RunConfig, topology: Topology, mesh: MeshConfig) -> float:
    """GiB that float32 parameters, moments, gradients and 2 GiB of temporaries leave."""
    copies = 0.5 + 0.1 if config.lora else 4
    state = count_params(config.model) * 4 * copies / (mesh.fsdp * mesh.tensor) / 2**30
    return topology.chip.usable_gib - state - 2


def _kept(config: RunConfig) -> float:
    """GiB that one row's layers keep for the backward pass, their input only."""
    model = config.model
    return model.num_hidden_layers * config.data.seq_len * model.hidden_size * 2 / 2**30


def halved(case: Case, rows: int | None) -> Case | None:
    """The case in portions of half the size; None where a portion is one row a device."""
    train, mesh = case.config.train, case.config.mesh
    portions = 2 * train.micro_batches
    if portions * mesh.data * mesh.fsdp > case.rows:
        return None
    train = dataclasses.replace(train, micro_batches=portions)
    return make_case(dataclasses.replace(case.config, train=train), case.topology, rows)


def layouts(config: RunConfig, topology: Topology, rows: int | None) -> Iterator[Case]:
    """Every case that divides: tensor up to 8 devices, data between slices and up to 16."""
    heads = config.model.num_key_value_heads
    for mesh in _meshes(topology, heads):
        for micro in (1, 2, 4, 8):
            for remat in REMATS:
                train = dataclasses.replace(config.train, micro_batches=micro, remat=remat)
                new = dataclasses.replace(config, mesh=mesh, train=train)
                try:
                    yield make_case(new, topology, rows)
                except ValueError:
                    continue  # does not divide


def _meshes(topology: Topology, heads: int) -> Iterator[MeshConfig]:
    for tensor in (1, 2, 4, 8):
        for inner in (1, 2, 4, 8, 16):
            data = topology.slices * inner
            if heads % tensor == 0 and topology.devices % (data * tensor) == 0:
                yield MeshConfig(data, topology.devices // (data * tensor), tensor)
