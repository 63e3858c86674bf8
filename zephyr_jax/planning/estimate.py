"""From a compiled program to memory, transfers and the time of a step, and what that leaves out.

Time is the compiler's estimate of cycles of the scheduled operations, plus the attention kernels,
which carry no estimate (their matrix products at half of the peak), plus transfers that nothing
hides; hidden ones count if they take longer than all work. Left out: waiting for data, evaluation,
checkpoints, the start, and contention for HBM and links.
"""

from __future__ import annotations

import math
import re
from typing import Any

from zephyr_jax.models.flops import train_flops
from zephyr_jax.planning import collectives, hlo
from zephyr_jax.planning.collectives import Collective
from zephyr_jax.planning.compiling import Case, Compiled, mesh_sizes

KERNEL_SHARE = 0.5  # of the peak that the attention kernels are assumed to reach
LARGE = 64 * 2**20  # bytes of a transfer that is worth a warning if nothing hides it
_COSTLY = ("all-reduce", "all-to-all", "collective-permute")
# libtpu 0.0.42.1 (remat=offload): memory space 5 is pinned host memory
_IN_HOST_MEMORY = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(5\)[^}]*\}")
# libtpu 0.0.42.1, stored sample: custom calls named after JAX's splash kernels
_KERNEL = 'custom_call_target="tpu_custom_call"'
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_HEAD_LOOP = r"\bhead\)*/(shard_map/)?while$"  # one device has no shard_map


def memory(case: Case, done: Compiled) -> dict[str, Any]:
    """What a device holds in GiB: `fits`, `gib` (needed, usable, peak) and `gib_by_kind`."""
    usable = case.topology.chip.usable_gib
    kinds = {name: size / 2**30 for name, size in done.parts.items()}
    if done.text:
        saved = _saved_activations(case, done.text) / 2**30
        kinds["kept for the backward pass"] = saved
        kinds["other temporaries"] = max(0.0, done.temporary / 2**30 - saved)
    return {
        "fits": done.needed <= usable,
        "gib": {"needed": done.needed, "usable": usable, "peak": done.peak / 2**30},
        "gib_by_kind": kinds,
    }


def _micro_batch_rows(case: Case) -> int:
    """Rows of a micro-batch on one device."""
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
    """The time of a step and its parts.

    Returns:
        `seconds` by part, `mfu`, `flops` of all devices, `transfers` by kind, axis and whether
        hidden, and `warnings`.
    """
    config, chip, devices = case.config, case.topology.chip, case.topology.devices
    program = hlo.parse(done.text)
    counts = hlo.count(program, _data_dependent_rounds(case))
    transfers = collectives.find_collectives(program, counts.times, mesh_sizes(config.mesh))
    kernel_flops = _kernel_flops(case, program, counts.times)
    model_flops = train_flops(config.model, case.rows, config.data.seq_len)
    if config.lora:
        model_flops *= 2 / 3  # no gradients of the frozen parameters
    cycles, moved = hlo.cycles(program, counts.times)
    compute = cycles / chip.clock_hz + 2 * moved / chip.hbm_rate  # read and written
    kernels = kernel_flops / (KERNEL_SHARE * chip.peak_flops)
    took = {True: 0.0, False: 0.0}
    for one in transfers:
        took[one.hidden] += collectives.seconds(one, case.topology)
    step = max(compute + kernels, took[True]) + took[False]
    return {
        "seconds": {
            "step": step,
            "compute": compute,
            "kernels": kernels,
            "hidden_transfers": took[True],
            "exposed_transfers": took[False],
        },
        "mfu": model_flops / (step * devices * chip.peak_flops),
        "flops": {
            "model": model_flops,
            "program": hlo.matmul_flops(program, counts.times) * devices,
            "kernels": kernel_flops * devices,
            "xla_loops_once": done.xla_flops * devices,
            "model_per_token": model_flops / (case.rows * config.data.seq_len),
        },
        "transfers": _grouped(transfers),
        "warnings": _warnings(done, transfers, counts.unknown),
    }


def _data_dependent_rounds(case: Case) -> dict[str, int]:
    """The most rounds of the head's loop over blocks: every token of a micro-batch is a target."""
    from zephyr_jax.models.head import TOKENS_AT_ONCE

    tokens = _micro_batch_rows(case) * case.config.data.seq_len // case.config.mesh.context
    return {_HEAD_LOOP: -(-tokens // TOKENS_AT_ONCE)}


def _kernel_flops(case: Case, program: hlo.Program, times: dict[str, float]) -> float:
    """FLOPs of the attention kernels on one device, over the pairs that the mask leaves."""
    total = 0.0
    window = case.config.model.sliding_window
    for name, body in program.computations.items():
        for one in body:
            if _KERNEL not in one.attributes:
                continue
            products = next((n for kernel, n in _PRODUCTS.items() if kernel in one.name), 0)
            shapes = hlo.array_shapes(one.attributes.split("frontend")[0])
            queries = max((dims for _, dims in shapes if len(dims) >= 3), key=math.prod)
            *heads, length, width = queries
            seen = min(window or length, length)
            pairs = seen * length - seen**2 / 2
            total += times[name] * products * 2 * pairs * math.prod(heads) * width
    return total


def _warnings(
    done: Compiled, transfers: list[Collective], unknown: list[hlo.Instruction]
) -> list[str]:
    """What ruins a run, a line each."""
    warnings = []
    for one in transfers:
        if one.kind in _COSTLY and not one.hidden and one.bytes > LARGE:
            origin = f", of {one.origin[-60:]}" if one.origin else ""
            warnings.append(
                f"a synchronous {one.kind} over {one.axis} ({one.bytes / 2**20:.0f} MiB, "
                f"{one.times:.0f} times a step{origin})"
            )
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
