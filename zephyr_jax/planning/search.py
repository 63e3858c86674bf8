"""Other ways to lay a run out on a slice: meshes, portions, and what is kept for the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from zephyr_jax.config.run import MeshConfig, RunConfig
from zephyr_jax.planning.compiling import Case, make_case
from zephyr_jax.planning.topologies import Topology
from zephyr_jax.training import auto_mesh as layout

REMATS = ("full", "none", ("q", "k", "v", "attention"))  # what --search tries


def chosen(config: RunConfig, topology: Topology, rows: int | None) -> RunConfig:
    """The run with a mesh and micro-batches that should suit the slice (auto_mesh)."""
    devices = layout.Devices(topology.devices, topology.slices, topology.chip.usable_gib)
    wanted = rows if rows and config.dpo else layout.rows_of(config)
    return layout.chosen(config, devices, wanted)


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
