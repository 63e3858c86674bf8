"""From a compiled program to memory, transfers and the time of a step (docs/pods.md).

Time is that of the compiler's cycles, of the attention kernels, which have none, at half of the
peak, and of transfers that nothing hides; hidden ones count if they take longer than all work.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.models.head import block_size
from zephyr_jax.models.parameters import model_flops_per_token
from zephyr_jax.planning import hlo
from zephyr_jax.planning.compiling import Case, Compiled, Topology

CALIBRATION = {"v5e": 1.11, "v5p": 1.08, "v6e": 0.89}  # estimated / measured (docs/pods.md)
KERNEL_SHARE = 0.5  # of the peak that the attention kernels are assumed to reach
LARGE = 64 * 2**20  # bytes of a transfer that is worth a warning if nothing hides it
MANY = 2**30  # bytes a step of smaller all-reduces that nothing hides
_COSTLY = ("all-reduce", "all-to-all", "collective-permute")
# All patterns are of libtpu 0.0.42.1, as in tests/stored and tests/planning/test_planning.py.
_IN_HOST_MEMORY = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(5\)[^}]*\}")  # pinned, of remat=offload
_KERNEL = 'custom_call_target="tpu_custom_call"'  # named after JAX's splash kernels
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_HEAD_LOOP = r"\bhead\)*/(shard_map/)?while$"  # one device has no shard_map
_KINDS = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}
_KINDS |= {"ragged-all-to-all", "collective-broadcast"}
# mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
# [2,4]<=[2,2,2]T(2,0,1)
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_LISTED_GROUPS = r"replica_groups=\{\{([0-9,]+)\}"  # {{0,1},{2,3}}
_PAIRS = r"source_target_pairs=\{(\{.*?\})\}"  # {{0,2},{2,0}}
_CHANNEL = r"channel_id=(\d+)"
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'  # its computation's are hidden


def memory(case: Case, done: Compiled) -> dict[str, Any]:
    """What a device holds in GiB: `fits`, `gib` (needed, usable, peak) and `gib_by_kind`."""
    usable, peak = case.topology.chip.usable_gib, done.peak / 2**30
    kinds = {name: size / 2**30 for name, size in done.parts.items()}
    if done.text:
        saved = _saved_activations(case, done.text) / 2**30
        kinds["kept for the backward pass"] = saved
        kinds["other temporaries"] = max(0.0, done.temporary / 2**30 - saved)
    return {
        "fits": bool(done.text),  # the compiler refuses what does not
        "gib": {"needed": done.wanted or peak, "usable": usable, "peak": peak},
        "gib_by_kind": kinds,
    }


def _micro_batch_rows(case: Case) -> int:
    mesh = case.config.mesh
    return case.rows // (mesh.data * mesh.fsdp * case.config.train.micro_batches)


def _saved_activations(case: Case, text: str) -> float:
    """Bytes that the loop over layers stacks: arrays of all layers, the rows and their tokens."""
    mesh, seq_len = case.config.mesh, case.config.data.seq_len
    stack = (case.config.model.num_hidden_layers, _micro_batch_rows(case))
    lengths = {seq_len, seq_len // mesh.context, seq_len // mesh.context // mesh.tensor}
    most = 0.0
    for body in hlo.parse(text).computations.values():
        for loop in (one for one in body if one.opcode == "while"):
            stacked = sum(
                math.prod(dims) * hlo.element_bytes(dtype)
                for dtype, dims in hlo.array_shapes(_IN_HOST_MEMORY.sub("", loop.shape))
                if dims[:2] == stack and lengths & set(dims)
            )
            most = max(most, stacked)
    return most


def estimate(case: Case, done: Compiled) -> dict[str, Any]:
    """`seconds` of a step by part, `mfu`, `flops` of all devices, `transfers` and `warnings`."""
    config, chip, devices = case.config, case.topology.chip, case.topology.devices
    program = hlo.parse(done.text)
    # The head's loop has the most rounds if every token of a micro-batch is a target.
    tokens = _micro_batch_rows(case) * config.data.seq_len // config.mesh.context
    counts = hlo.count(program, {_HEAD_LOOP: -(-tokens // block_size(tokens))})
    kernels = kernel_flops(config.model.sliding_window, program, counts.times)
    seconds, transfers = timed(program, counts.times, case.topology, config.mesh.axes, kernels)
    model_flops = model_flops_per_token(config.model, config.data.seq_len)
    model_flops *= case.rows * config.data.seq_len
    if config.lora:
        model_flops *= 2 / 3  # no gradients of the frozen parameters
    return {
        "seconds": seconds,
        "mfu": model_flops / (seconds["step"] * devices * chip.peak_flops),
        "calibration": CALIBRATION.get(case.topology.family),
        "flops": {"model": model_flops, "kernels": kernels * devices},
        "transfers": _grouped(transfers),
        "warnings": warnings_of(done, transfers, counts.unknown),
    }


def timed(
    program: hlo.Program,
    times: dict[str, float],
    topology: Topology,
    mesh: dict[str, int],
    flops: float = 0.0,
) -> tuple[dict[str, float], list[Collective]]:
    """The seconds of a program by part, and its transfers; `flops`: of the attention kernels."""
    chip, took = topology.chip, {True: 0.0, False: 0.0}
    transfers = find_collectives(program, times, mesh)
    cycles, moved = hlo.cycles(program, times)
    compute = cycles / chip.clock_hz + 2 * moved / chip.hbm_rate  # read and written
    kernels = flops / (KERNEL_SHARE * chip.peak_flops)
    for one in transfers:
        took[one.hidden] += _transfer_seconds(one, topology)
    hidden, exposed = took[True], took[False]
    seconds = {"step": max(compute + kernels, hidden) + exposed, "compute": compute}
    seconds |= {"kernels": kernels, "hidden_transfers": hidden, "exposed_transfers": exposed}
    return seconds, transfers


def kernel_flops(window: int | None, program: hlo.Program, times: dict[str, float]) -> float:
    """FLOPs of the attention kernels on one device, over the pairs that the mask leaves."""
    total, bodies = 0.0, program.computations.items()
    kernels = [(name, one) for name, body in bodies for one in body if _KERNEL in one.attributes]
    # Without a kernel for the gradient of the queries, that of the keys and values computes it.
    fused = not any("splash_mha_dq" in one.name for _, one in kernels)
    for name, one in kernels:
        n_products = next((n for kernel, n in _PRODUCTS.items() if kernel in one.name), 0)
        n_products += fused and "splash_mha_dkv" in one.name
        shapes = hlo.array_shapes(one.attributes.split("frontend")[0])
        queries = max((dims for _, dims in shapes if len(dims) >= 3), key=math.prod)
        width, length = sorted(queries[-2:])  # tokens may be last
        seen = min(window or length, length)
        pairs = seen * length - seen**2 / 2
        total += times[name] * n_products * 2 * pairs * math.prod(queries[:-2]) * width
    return total


def warnings_of(
    done: Compiled, transfers: list[Collective], unknown: list[hlo.Instruction]
) -> list[str]:
    """What ruins a run, a line each."""
    warnings = [
        f"a synchronous {one.kind} over {one.axis} ({one.bytes / 2**20:.0f} MiB, "
        f"{one.times:.0f} times a step, of {one.origin[-60:] or 'no named operation'})"
        for one in transfers
        if one.kind in _COSTLY and not one.hidden and one.bytes > LARGE
    ]
    warnings += [
        f"synchronous all-reduces over {group['axis']} ({group['bytes'] / 2**30:.1f} GiB in "
        f"{group['times']:.0f} transfers a step)"
        for group in _grouped([one for one in transfers if one.bytes <= LARGE])
        if group["kind"] == "all-reduce" and not group["hidden"] and group["bytes"] > MANY
    ]
    state = sum(done.parts.get(name, 0) for name in ("parameters", "moments"))
    if done.aliased < 0.99 * state:
        warnings.append(
            f"only {done.aliased / 2**30:.2f} of {state / 2**30:.2f} GiB of the donated state are "
            "used again"
        )
    return warnings + [f"the loop {loop.name} ({loop.origin}) counts once" for loop in unknown]


def _grouped(transfers: list[Collective]) -> list[dict[str, Any]]:
    """Count, bytes in all and of the largest, by kind, axis and whether hidden."""
    groups: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for one in transfers:
        key = (one.kind, one.axis, one.hidden)
        new = {"kind": one.kind, "axis": one.axis, "hidden": one.hidden}
        group = groups.setdefault(key, new | {"times": 0.0, "bytes": 0.0, "largest": 0.0})
        group["times"] += one.times
        group["bytes"] += one.total
        group["largest"] = max(group["largest"], one.bytes)
    return sorted(groups.values(), key=lambda group: -group["bytes"])


class Collective(NamedTuple):
    """One transfer; hidden if it starts before other work and ends after that."""

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
    program: hlo.Program, times: dict[str, float], mesh: dict[str, int]
) -> list[Collective]:
    """All transfers between at least two devices, largest first; `times` as in `hlo.Counts`.

    A ValueError if the groups of a transfer are in a form that is not known.
    """
    fused, on_sparse_cores = hlo.inside_fusions(program), _hidden_calls(program)
    by_channel: dict[str, Collective] = {}
    for name, body in program.computations.items():
        if not times[name]:
            continue
        starts_async = any(_ASYNC_START in one.attributes for one in body)
        for one in body:
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS or len(group := _group(one, mesh)) < 2:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            hidden = one.opcode.endswith("-start") or starts_async or "async" in name
            hidden |= name in on_sparse_cores
            # In a tuple, and in a permutation, the result repeats the operand: its largest array.
            arrays = [hlo.nbytes(x) for x in re.findall(r"[a-z][a-z0-9]*\[[0-9,]*\]", one.shape)]
            repeated = one.opcode.endswith("-start") or kind == "collective-permute"
            size = max(arrays) if repeated else sum(arrays)
            positions = np.transpose(np.unravel_index(group, tuple(mesh.values())))
            axis = "+".join(itertools.compress(mesh, (positions != positions[0]).any(axis=0)))
            collective = Collective(kind, axis, len(group), size, times[name], hidden, one.origin)
            channel = one.attribute(_CHANNEL) or f"{name}/{one.name}"
            before = by_channel.get(channel)
            # One transfer may stand in several fusions: its start, middle and end.
            if before is None or (name in fused and collective.times > before.times):
                by_channel[channel] = collective
            elif hidden and not before.hidden:
                by_channel[channel] = before._replace(hidden=True)
    return sorted(by_channel.values(), key=lambda one: -one.total)


def _hidden_calls(program: hlo.Program) -> set[str]:
    """The computations that the sparse cores run while the others do a matrix product."""

    def multiplies(one: hlo.Instruction) -> bool:
        bodies = [program.computations.get(name, []) for name in one.called]
        return any(x.opcode in ("convolution", "dot") for body in bodies for x in body)

    hidden: set[str] = set()
    for body in program.computations.values():
        running: dict[str, list[str]] = {}
        for one in body:
            if one.opcode == "call-start":
                running[one.name] = one.called
            elif one.opcode == "call-done":
                running.pop(one.operands[0], None)
            elif running and (_KERNEL in one.attributes or multiplies(one)):
                hidden.update(*running.values())
    return hidden


def _group(one: hlo.Instruction, mesh: dict[str, int]) -> list[int]:
    """The mesh positions of the first group of devices; of a permutation, its first cycle."""
    if pairs := one.attribute(_PAIRS):
        target = {a: b for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs) if a != b}
        at, cycle = next(iter(target), ""), list[int]()
        while at and int(at) not in cycle:
            cycle.append(int(at))
            at = target.get(at, "")
        return cycle
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


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these sizes, transposed if an order is given."""
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _transfer_seconds(one: Collective, topology: Topology) -> float:
    """How long a transfer takes in a step on links that nothing else uses.

    Rings over as many axes of the slice as the group spans, both ways if an axis is closed; a
    group that reaches over slices goes at the rate of the network between them.
    """
    share = (one.devices - 1) / one.devices
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(one.kind, share)
    if topology.slices > 1 and "data" in one.axis:
        return factor * one.total / topology.chip.dcn_rate
    chips, links = -(-one.devices // topology.chip.devices), 0
    if one.kind == "collective-permute":
        chips, links = 1, 2
    for size in sorted(topology.sizes, reverse=True):
        if chips > 1 and size > 1:
            links += 2 if size >= topology.chip.ring else 1
            chips = -(-chips // size)
    return factor * one.total / (max(1, links) * topology.chip.link_rate / topology.chip.devices)
