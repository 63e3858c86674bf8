"""What a compiled program sends between devices: kind, axis of the mesh, bytes, and whether hidden.

A transfer is hidden where the compiler starts it and ends it around other work; else the device
waits for it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from zephyr_jax.planning.hlo import Instruction, Program, inside_fusions, nbytes, sizes
from zephyr_jax.planning.topologies import Topology

_KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_CHANNEL = r"channel_id=(\d+)"


class Collective(NamedTuple):
    """One transfer of the program."""

    kind: str
    axis: str  # names of the mesh axes that it goes along, "data+fsdp"
    devices: int  # that take part with each other
    bytes: float  # of the whole array on one device: gathered, reduced, or sent on
    times: float  # in a step
    hidden: bool
    origin: str  # the operation that it was made from

    @property
    def total(self) -> float:
        """Bytes in a step."""
        return self.bytes * self.times


def find(program: Program, times: dict[str, float], mesh: dict[str, int]) -> list[Collective]:
    """All transfers of more than one device, largest first.

    Args:
        program: the compiled program.
        times: how often each computation runs.
        mesh: the names and sizes of the mesh's axes, in the order of its devices.
    """
    fused, found = inside_fusions(program), {}
    for name, body in program.computations.items():
        if not times[name]:
            continue
        begun = any('custom_call_target="AsyncCollectiveStart"' in one.rest for one in body)
        for one in body:
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            group = _group(one, mesh)
            if len(group) < 2:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            hidden = one.opcode.endswith("-start") or begun or "async" in name
            channel = one.attribute(_CHANNEL) or f"{name}/{one.name}"
            new = Collective(
                *(kind, _axis(group, mesh), len(group), _payload(one, kind), times[name], hidden),
                one.attribute(r'op_name="([^"]*)"') or "",
            )
            before = found.get(channel)
            # One transfer may stand in several fusions: where it begins, goes on and ends.
            if before is None or (name in fused and new.times > before.times):
                found[channel] = new
            elif hidden and not before.hidden:
                found[channel] = before._replace(hidden=True)
    return sorted(found.values(), key=lambda one: -one.total)


def _payload(one: Instruction, kind: str) -> float:
    """Bytes of the whole array: the result, where that is a tuple its largest array."""
    arrays = [math.prod(dims) for _, dims in sizes(one.shape)]
    if one.opcode.endswith("-start") or kind == "collective-permute":
        parts = re.findall(r"[a-z][a-z0-9]*\[[0-9,]*\]", one.shape)
        return max(nbytes(part) for part in parts)
    return nbytes(one.shape) if arrays else 0.0


def _group(one: Instruction, mesh: dict[str, int]) -> list[int]:
    """The places in the mesh of one group of devices; of a permutation, one cycle of it."""
    if pairs := one.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        following = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)}
        first = next((a for a, b in following.items() if a != b), None)
        cycle: list[int] = []
        while first is not None and first not in cycle:
            cycle.append(first)
            first = following.get(first)
        return cycle
    if listed := one.attribute(r"replica_groups=\{\{([0-9,]+)\}"):
        return [int(number) for number in listed.split(",")]
    text = one.rest
    if found := _NAMED_GROUPS.search(text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _counted(found[2] or str(math.prod(axes.values())), found[3])
        chosen = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
        ids = np.moveaxis(ids.reshape(tuple(axes.values())), chosen, range(-len(chosen), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(chosen) :]))[0].tolist()
    if found := _COUNTED_GROUPS.search(text):
        return _counted(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist()
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"the groups of {one.name} are not understood: {text[:200]}")
    return list(range(math.prod(mesh.values())))  # no groups: all devices


def _counted(sizes_: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these sizes, its axes in another order if one is given."""
    ids = np.arange(math.prod(map(int, sizes_.split(",")))).reshape([*map(int, sizes_.split(","))])
    return ids.transpose([*map(int, order.split(","))]) if order else ids


def _axis(group: list[int], mesh: dict[str, int]) -> str:
    """The axes along which the places of a group differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    moving = [name for name, row in zip(mesh, places, strict=True) if len(set(row)) > 1]
    return "+".join(moving)


def seconds(one: Collective, topology: Topology) -> float:
    """How long a transfer takes in a step on links that nothing else uses.

    Rings over as many axes of the slice as the group spans, both ways where an axis is closed; a
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
