"""The training step of a run, compiled for a topology by libtpu; nothing is allocated.

A compiled program is cached by a digest of its text, the slice and the versions of the compiler.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.config.run import RunConfig
from zephyr_jax.planning.topologies import Topology, mesh_sizes, resolve_sizes, topology_mesh
from zephyr_jax.storage import write_atomic
from zephyr_jax.training.auto_mesh import rows_of

DOCUMENTS = 32  # the most pairs in a row; arrays of this size are small in any case


class Case(NamedTuple):
    """One program to compile."""

    config: RunConfig  # its mesh has no -1
    topology: Topology
    rows: int  # of a batch


class Compiled(NamedTuple):
    """What the compiler reports of a program; sizes in bytes on one device."""

    text: str  # of the program; empty if it does not fit
    peak: int
    arguments: int
    temporary: int
    aliased: int  # results that take the place of arguments
    parts: dict[str, int]  # arguments by kind
    xla_flops: float  # by the compiler's own count, loops once
    wanted: float  # GiB that a program needs that does not fit, else 0
    seconds: float  # of lowering and compiling

    @property
    def needed(self) -> float:
        """GiB on a device: the larger of the peak and of arguments and temporaries together."""
        return self.wanted or max(self.peak, self.arguments + self.temporary) / 2**30


def make_case(config: RunConfig, topology: Topology, rows: int | None = None) -> Case:
    """The program of a run on a topology; a ValueError if mesh, batch and topology do not fit.

    `rows` are those of a batch of pairs; None: as many as the real pairs of docs/recipes.md fill.
    """
    mesh = resolve_sizes(config.mesh, topology)
    config = dataclasses.replace(config, mesh=mesh)
    unit = mesh.data * mesh.fsdp * config.train.micro_batches
    if config.dpo:
        return Case(config, topology, -(-(rows or rows_of(config)) // unit) * unit)
    rows = config.train.batch_size
    if rows % unit:
        raise ValueError(
            f"train.batch_size={rows} rows is not divisible by data x fsdp x micro_batches = "
            f"{unit} on {topology.name}; take a mesh with mesh.tensor above 1, or fewer "
            "micro-batches"
        )
    return Case(config, topology, rows)


def lower(case: Case) -> tuple[Any, dict[str, int]]:
    """The lowered step on the topology's mesh, and the bytes of its arguments by kind."""
    import jax

    from zephyr_jax.training import steps
    from zephyr_jax.training.optim import make_optimizer, make_schedule

    config = case.config
    with jax.set_mesh(topology_mesh(case.topology, config.mesh)):
        optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1000))
        state = steps.abstract_state(config, optimizer)
        batch = steps.abstract_batch(
            case.rows, config.data.seq_len, DOCUMENTS if config.dpo else None
        )
        base = steps.abstract_base(config.model, config.lora) if config.lora else None
        step, _ = steps.jitted_steps(config, steps.loss_sums(config), optimizer)
        inputs = (state, batch) if base is None else (state, batch, base)
        lowered = step.trace(*inputs).lower(lowering_platforms=("tpu",))
    parts = {
        "parameters": state.params,
        "moments": state.opt_state,
        "frozen base": base,
        "synced reference": state.reference,
        "batch": batch,
    }
    return lowered, {name: _bytes(tree) for name, tree in parts.items() if tree is not None}


def _bytes(tree: Any) -> int:
    """Bytes on one device, without what waits in host memory."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


def compile_case(case: Case, cache: Path | None) -> Compiled:
    """The compiler's report, from the cache if the same program was compiled before."""
    import jax

    start = time.monotonic()
    lowered, parts = lower(case)
    path = None if cache is None else cache / f"{_key(case, lowered)}.json.gz"
    if path is not None and path.is_file():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))._replace(parts=parts)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, took = needed_gib(str(error)), time.monotonic() - start
        report = Compiled("", 0, sum(parts.values()), 0, 0, parts, 0.0, needed, took)
    else:
        memory = program.memory_analysis()
        report = Compiled(
            text=program.as_text(),
            peak=memory.peak_memory_in_bytes,
            arguments=memory.argument_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            parts=parts,
            xla_flops=float((program.cost_analysis() or {}).get("flops", 0.0)),
            wanted=0.0,
            seconds=time.monotonic() - start,
        )
    if path is not None:
        write_atomic(path, gzip.compress(json.dumps(report._asdict()).encode()))
    return report


def needed_gib(message: str) -> float:
    """GiB that a program needs, from the compiler's message that it does not fit.

    libtpu 0.0.42.1 (samples in tests/planning/test_planning.py) names either what is used of the
    whole, or the temporaries alone.
    """
    units = {"G": 1.0, "M": 2.0**-10, "T": 1024.0}
    for pattern in (r"Used ([0-9.]+)([GMT]) of", r"temporaries \(([0-9.]+)([GMT])\)"):
        if match := re.search(pattern, message):
            return float(match[1]) * units[match[2]]
    return math.inf


def _key(case: Case, lowered: Any) -> str:
    """A digest of the program, the slice, the mesh and the compiler."""
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    mesh = str(tuple(mesh_sizes(case.config.mesh).values()))
    parts = [*versions, case.topology.name, mesh, lowered.as_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
