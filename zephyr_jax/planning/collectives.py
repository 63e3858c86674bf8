"""What a compiled program sends between devices: kind, mesh axis, bytes, and whether it is hidden.

A transfer is hidden if the compiler starts it before other work and ends it after that; otherwise
the device waits for it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from zephyr_jax.planning.hlo import Instruction, Program, inside_fusions, nbytes
from zephyr_jax.planning.topologies import Topology

_KINDS = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}
_KINDS |= {"ragged-all-to-all", "collective-broadcast"}
# libtpu 0.0.42.1, stored sample: mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
# libtpu 0.0.42.1, sample in tests/planning/test_planning.py: [2,4]<=[2,2,2]T(2,0,1)
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
# libtpu 0.0.42.1, stored sample: {{0,1},{2,3}}
_LISTED_GROUPS = r"replica_groups=\{\{([0-9,]+)\}"
# libtpu 0.0.42.1, sample in tests/planning/test_planning.py: {{0,2},{2,0}}
_PAIRS = r"source_target_pairs=\{(\{.*?\})\}"
_CHANNEL = r"channel_id=(\d+)"  # libtpu 0.0.42.1, stored sample
# libtpu 0.0.42.1, stored sample: transfers of such a computation are hidden
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'


class Collective(NamedTuple):
    """One transfer of the program."""

    kind: str
    axis: str  # names of the mesh axes that it goes along, "data+fsdp"
    devices: int  # in one group
    bytes: float  # of the whole array on one device: gathered, reduced, or sent on
    times: float  # in a step
    hidden: bool
    origin: str  # the JAX operation that it comes from

    @property
    def total(self) -> float:
        """Bytes in a step."""
        return self.bytes * self.times


def find_collectives(
    program: Program, times: dict[str, float], mesh: dict[str, int]
) -> list[Collective]:
    """All transfers between at least two devices, largest first.

    Args:
        program: the compiled program.
        times: how often each computation runs.
        mesh: the names and sizes of the mesh's axes, in the order of its devices.

    Raises:
        ValueError: if the groups of a transfer are in a form that is not known.
    """
    fused = inside_fusions(program)
    by_channel: dict[str, Collective] = {}
    for name, body in program.computations.items():
        if not times[name]:
            continue
        starts_async = any(_ASYNC_START in one.attributes for one in body)
        for one in body:
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            group = _group(one, mesh)
            if len(group) < 2:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            hidden = one.opcode.endswith("-start") or starts_async or "async" in name
            collective = Collective(
                kind=kind,
                axis=_axis(group, mesh),
                devices=len(group),
                bytes=_payload(one, kind),
                times=times[name],
                hidden=hidden,
                origin=one.origin,
            )
            channel = one.attribute(_CHANNEL) or f"{name}/{one.name}"
            before = by_channel.get(channel)
            # One transfer may stand in several fusions: its start, middle and end.
            if before is None or (name in fused and collective.times > before.times):
                by_channel[channel] = collective
            elif hidden and not before.hidden:
                by_channel[channel] = before._replace(hidden=True)
    return sorted(by_channel.values(), key=lambda one: -one.total)


def _payload(one: Instruction, kind: str) -> float:
    """Bytes of the result; of a tuple that repeats the operand the largest array."""
    if one.opcode.endswith("-start") or kind == "collective-permute":
        return max(nbytes(array) for array in re.findall(r"[a-z][a-z0-9]*\[[0-9,]*\]", one.shape))
    return nbytes(one.shape)


def _group(one: Instruction, mesh: dict[str, int]) -> list[int]:
    """The mesh positions of the first group of devices; of a permutation, its first cycle."""
    if pairs := one.attribute(_PAIRS):
        return _cycle({int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)})
    if listed := one.attribute(_LISTED_GROUPS):
        return [int(number) for number in listed.split(",")]
    if match := _MESH_GROUPS.search(one.attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2] or str(math.prod(axes.values())), match[3])
        grouped = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[4])]
        ids = np.moveaxis(ids.reshape(tuple(axes.values())), grouped, range(-len(grouped), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(grouped) :]))[0].tolist()
    if match := _IOTA_GROUPS.search(one.attributes):
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))[0].tolist()
    if "replica_groups=" in one.attributes and "replica_groups={}" not in one.attributes:
        raise ValueError(f"the groups of {one.name} are not understood: {one.attributes[:200]}")
    return list(range(math.prod(mesh.values())))  # no groups: all devices


def _cycle(target: dict[int, int]) -> list[int]:
    """The first cycle of a permutation that moves anything."""
    at = next((source for source, to in target.items() if source != to), None)
    cycle: list[int] = []
    while at is not None and at not in cycle:
        cycle.append(at)
        at = target.get(at)
    return cycle


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these sizes, transposed if an order is given."""
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _axis(group: list[int], mesh: dict[str, int]) -> str:
    """The axes along which the positions of a group differ."""
    positions = np.array(np.unravel_index(group, tuple(mesh.values())))
    moving = [name for name, row in zip(mesh, positions, strict=True) if len(set(row)) > 1]
    return "+".join(moving)


def seconds(one: Collective, topology: Topology) -> float:
    """How long a transfer takes in a step on links that nothing else uses.

    Rings over as many axes of the slice as the group spans, both ways if an axis is closed; a
    group that reaches over slices goes at the rate of the network between them.
    """
    share = (one.devices - 1) / one.devices
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(one.kind, share)
    if topology.slices > 1 and "data" in one.axis:
        return factor * one.total / topology.chip.dcn_rate
    links = 2 if one.kind == "collective-permute" else _links(one.devices, topology)
    return factor * one.total / (links * topology.chip.link_rate / topology.chip.devices)


def _links(devices: int, topology: Topology) -> int:
    """Links of a chip that a collective over so many devices can use at once."""
    chips, links = -(-devices // topology.chip.devices), 0
    for size in sorted(topology.sizes, reverse=True):
        if chips > 1 and size > 1:
            links += 2 if size >= topology.chip.ring else 1
            chips = -(-chips // size)
    return max(1, links)
