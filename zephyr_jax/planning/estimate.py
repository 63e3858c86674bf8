"""From a compiled program to memory, transfers and the time of a step, and what that leaves out.

Cycles of scheduled operations are the compiler's. To them come the attention kernels, which carry
no cycles (their matrix products at half of the peak), and transfers that nothing hides; hidden ones
count where they take longer than all work. Left out: waiting for data, evaluation, checkpoints, the
start, and contention for HBM and links.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from zephyr_jax.models.flops import train_flops
from zephyr_jax.planning import collectives, hlo
from zephyr_jax.planning.collectives import Collective
from zephyr_jax.planning.compiling import Case, Compiled, mesh_sizes

_IN_HOST_MEMORY = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(5\)[^}]*\}")
KERNEL_SHARE = 0.5  # of the peak that the attention kernels reach, assumed
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
LARGE = 64 * 2**20  # bytes of one of these that nobody hides
_COSTLY = ("all-reduce", "all-to-all", "collective-permute")
_HEAD_LOOP = r"\bhead\)*/(shard_map/)?while$"  # one device has no shard_map


class Memory(NamedTuple):
    """GiB on a device."""

    needed: float
    usable: float
    parts: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether a program with this need can be loaded."""
        return self.needed <= self.usable


class Estimate(NamedTuple):
    """What a step takes. Times in seconds, FLOPs on all devices together."""

    compute: float
    kernels: float
    hidden: float
    exposed: float
    model_flops: float
    hlo_flops: float
    kernel_flops: float
    xla_flops: float
    mfu: float
    hbm: float  # seconds that moving arguments and results of the optimizer takes at least
    transfers: list[Collective]
    warnings: list[str]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute + self.kernels, self.hidden) + self.exposed


def memory(case: Case, done: Compiled) -> Memory:
    """What a device holds, by kind."""
    parts = {name: size / 2**30 for name, size in done.parts.items()}
    if done.text:
        kept = _kept(case, done.text) / 2**30
        parts["kept for the backward pass"] = kept
        parts["other temporaries"] = max(0.0, done.temporary / 2**30 - kept)
    return Memory(done.needed, case.topology.chip.usable_gib, parts)


def _kept(case: Case, text: str) -> float:
    """Bytes of what the layers' loop stacks: arrays of all layers, the rows and their tokens."""
    program = hlo.parse(text)
    layers = case.config.model.num_hidden_layers
    mesh = case.config.mesh
    rows = case.rows // (mesh.data * mesh.fsdp * case.config.train.micro_batches)
    stacks, length = (layers, rows), case.config.data.seq_len // mesh.context
    lengths = {case.config.data.seq_len, length, length // mesh.tensor}
    most = 0.0
    for body in program.computations.values():
        for one in body:
            if one.opcode == "while":
                shapes = hlo.sizes(_IN_HOST_MEMORY.sub("", one.shape))
                found = [
                    math.prod(dims) * hlo.width(dtype)
                    for dtype, dims in shapes
                    if dims[:2] == stacks and lengths & set(dims)
                ]
                most = max(most, sum(found))
    return most


def estimate(case: Case, done: Compiled) -> Estimate:
    """The time of a step and what it is made of."""
    config, chip = case.config, case.topology.chip
    program, sizes = hlo.parse(done.text), mesh_sizes(config.mesh)
    counts = hlo.count(program, _rounds(case))
    transfers = collectives.find(program, counts.times, sizes)
    per_device = hlo.matmul_flops(program, counts.times)
    kernel = _kernel_flops(case, program, counts.times)
    took = {True: 0.0, False: 0.0}
    for one in transfers:
        took[one.hidden] += collectives.seconds(one, case.topology)
    model = train_flops(config.model, case.rows, config.data.seq_len)
    if config.lora:
        model *= 2 / 3  # no gradients of the frozen parameters
    devices = case.topology.devices
    cycles, copied = hlo.cycles(program, counts.times)
    found = Estimate(
        compute=cycles / chip.clock_hz + 2 * copied / chip.hbm_rate,  # read and written
        kernels=kernel / (KERNEL_SHARE * chip.peak_flops),
        hidden=took[True],
        exposed=took[False],
        model_flops=model,
        hlo_flops=per_device * devices,
        kernel_flops=kernel * devices,
        xla_flops=done.xla_flops * devices,
        mfu=0.0,
        hbm=(2 * done.arguments) / chip.hbm_rate,
        transfers=transfers,
        warnings=_warnings(done, transfers, counts.unknown),
    )
    return found._replace(mfu=model / (found.step * devices * chip.peak_flops))


def _rounds(case: Case) -> dict[str, int]:
    """Loops whose end depends on data: the blocks of the head, at most all tokens of a portion."""
    from zephyr_jax.models.head import TOKENS_AT_ONCE

    mesh = case.config.mesh
    rows = case.rows // (mesh.data * mesh.fsdp * case.config.train.micro_batches)
    tokens = rows * case.config.data.seq_len // mesh.context
    return {_HEAD_LOOP: -(-tokens // TOKENS_AT_ONCE)}


def _kernel_flops(case: Case, program: hlo.Program, times: dict[str, float]) -> float:
    """Of the attention kernels on one device: products over the pairs that the mask leaves."""
    total = 0.0
    window = case.config.model.sliding_window
    for name, body in program.computations.items():
        for one in body:
            if 'custom_call_target="tpu_custom_call"' not in one.rest:
                continue
            products = next((n for kind, n in _PRODUCTS.items() if kind in one.name), 0)
            queries = [
                dims for _, dims in hlo.sizes(one.rest.split("frontend")[0]) if len(dims) >= 3
            ]
            *heads, length, width = max(queries, key=math.prod)
            seen = min(window or length, length)
            pairs = seen * length - seen**2 / 2
            total += times[name] * products * 2 * pairs * math.prod(heads) * width
    return total


def _warnings(done: Compiled, transfers: list[Collective], unknown: list[hlo.Loop]) -> list[str]:
    """What ruins a run, a line each."""
    said = []
    for one in transfers:
        size = f"{one.bytes / 2**20:.0f} MiB, {one.times:.0f} times a step"
        size += f", of {one.origin[-60:]}" if one.origin else ""
        if one.kind in _COSTLY and not one.hidden and one.bytes > LARGE:
            said.append(f"a synchronous {one.kind} over {one.axis} ({size})")
    state = sum(done.parts.get(name, 0) for name in ("parameters", "moments"))
    if done.aliased < 0.99 * state:
        said.append(
            f"only {done.aliased / 2**30:.2f} of {state / 2**30:.2f} GiB of the donated state are "
            "used again"
        )
    said += [f"the loop {loop.name} ({loop.origin}) counts once" for loop in unknown]
    return said


def as_json(case: Case, done: Compiled, found: Estimate | None) -> dict[str, Any]:
    """All numbers of a plan, by name."""
    held = memory(case, done)
    told: dict[str, Any] = {
        "config": case.config.name,
        "topology": case.topology.name,
        "chips": case.topology.chips,
        "devices": case.topology.devices,
        "mesh": mesh_sizes(case.config.mesh),
        "rows": case.rows,
        "micro_batches": case.config.train.micro_batches,
        "remat": case.config.train.remat,
        "fits": held.fits,
        "gib": {"needed": held.needed, "usable": held.usable, "peak": done.peak / 2**30},
        "gib_by_kind": held.parts,
        "compile_seconds": done.seconds,
    }
    if found is None:
        return told
    return told | {
        "seconds": {
            "step": found.step,
            "compute": found.compute,
            "kernels": found.kernels,
            "hidden_transfers": found.hidden,
            "exposed_transfers": found.exposed,
            "hbm_of_the_state": found.hbm,
        },
        "mfu": found.mfu,
        "flops": {
            "model": found.model_flops,
            "program": found.hlo_flops,
            "kernels": found.kernel_flops,
            "xla_loops_once": found.xla_flops,
            "model_per_token": found.model_flops / (case.rows * case.config.data.seq_len),
        },
        "transfers": _grouped(found.transfers),
        "warnings": found.warnings,
    }


def _grouped(transfers: list[Collective]) -> list[dict[str, Any]]:
    """Count, bytes in all and of the largest, by kind, axis and whether hidden."""
    groups: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for one in transfers:
        key = (one.kind, one.axis, one.hidden)
        new = {"kind": one.kind, "axis": one.axis, "hidden": one.hidden}
        at = groups.setdefault(key, new | {"times": 0.0, "bytes": 0.0, "largest": 0.0})
        at["times"] += one.times
        at["bytes"] += one.total
        at["largest"] = max(at["largest"], one.bytes)
    return sorted(groups.values(), key=lambda group: -group["bytes"])
