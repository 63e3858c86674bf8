"""The training step of a run, compiled for a topology by libtpu; nothing is allocated.

A compiled program is kept by a key of what it was made from, so that the same question costs
nothing the second time.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.config.run import RunConfig
from zephyr_jax.planning.topologies import Topology, mesh_sizes, resolved, topology_mesh
from zephyr_jax.training.auto_mesh import rows_of

DOCUMENTS = 32  # the most pairs in a row: its arrays are small whatever this says


class Case(NamedTuple):
    """One program to compile."""

    config: RunConfig  # its mesh has no -1
    topology: Topology
    rows: int  # of a batch


class Compiled(NamedTuple):
    """What the compiler says of a program; sizes in bytes on one device."""

    text: str  # of the program; empty where it does not fit
    peak: int
    arguments: int
    temporary: int
    aliased: int  # of the results, in the place of arguments
    parts: dict[str, int]  # arguments by kind
    xla_flops: float  # by the compiler's own count, loops once
    wanted: float  # GiB that a program needs that does not fit, else 0
    seconds: float  # of lowering and compiling

    @property
    def needed(self) -> float:
        """GiB on a device: the larger of the peak and of arguments and temporaries together."""
        return self.wanted or max(self.peak, self.arguments + self.temporary) / 2**30


def make_case(config: RunConfig, topology: Topology, rows: int | None = None) -> Case:
    """The program of a run on a topology, its mesh and rows by number.

    Args:
        config: of the run.
        topology: where it is to run.
        rows: of a batch of pairs; without it as many as the real pairs of docs/recipes.md fill.

    Raises:
        ValueError: if mesh, batch and topology do not go together.
    """
    mesh = resolved(config.mesh, topology)
    config = dataclasses.replace(config, mesh=mesh)
    unit = mesh.data * mesh.fsdp * config.train.micro_batches
    if not config.dpo:
        rows = config.train.batch_size
        if rows % unit:
            raise ValueError(
                f"train.batch_size={rows} rows is not divisible by data x fsdp x micro_batches = "
                f"{unit} on {topology.name}; take a mesh with mesh.tensor above 1, or fewer "
                "micro-batches"
            )
    else:
        rows = rows or rows_of(config)
        rows = -(-rows // unit) * unit
    return Case(config, topology, rows)


def lower(case: Case) -> tuple[Any, dict[str, int]]:
    """The lowered step on the topology's mesh, and the bytes of its arguments by kind."""
    import jax

    from zephyr_jax.training.optim import make_optimizer, make_schedule
    from zephyr_jax.training.programs import (
        abstract_base,
        abstract_batch,
        abstract_state,
        jitted_steps,
    )
    from zephyr_jax.training.steps import loss_sums

    config = case.config
    mesh = topology_mesh(case.topology, config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1000))
        state = abstract_state(config, optimizer)
        batch = abstract_batch(config, case.rows, DOCUMENTS)
        base = abstract_base(config)
        step, _ = jitted_steps(config, loss_sums(config), optimizer)
        given = (state, batch) if base is None else (state, batch, base)
        lowered = step.trace(*given).lower(lowering_platforms=("tpu",))
    parts = {
        "parameters": state.params,
        "moments": state.opt_state,
        "frozen base": base,
        "synced reference": state.reference,
        "batch": batch,
    }
    return lowered, {name: _bytes(tree) for name, tree in parts.items() if tree is not None}


def _bytes(tree: Any) -> int:
    """On one device; what waits in host memory does not count."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


def compiled(case: Case, cache: Path | None) -> Compiled:
    """The compiler's answer, from the cache where the same was asked before."""
    import jax

    began = time.monotonic()
    lowered, parts = lower(case)
    place = None if cache is None else cache / f"{_key(case, lowered)}.json.gz"
    if place is not None and place.is_file():
        stored = Compiled(**json.loads(gzip.decompress(place.read_bytes())))
        return stored._replace(parts=parts)
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        took = time.monotonic() - began
        answer = Compiled("", 0, sum(parts.values()), 0, 0, parts, 0.0, wanted(str(error)), took)
    else:
        memory = done.memory_analysis()
        costs = done.cost_analysis() or {}
        answer = Compiled(
            done.as_text(),
            memory.peak_memory_in_bytes,
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.alias_size_in_bytes,
            parts,
            float(costs.get("flops", 0.0)),
            0.0,
            time.monotonic() - began,
        )
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_bytes(gzip.compress(json.dumps(answer._asdict()).encode()))
        os.replace(temporary, place)
    return answer


def wanted(message: str) -> float:
    """GiB that a program needs, as the compiler says where it does not fit.

    It names either the temporaries alone, or what is used of the whole.
    """
    units = {"G": 1.0, "M": 2.0**-10, "T": 1024.0}
    for pattern in (r"Used ([0-9.]+)([GMT]) of", r"temporaries \(([0-9.]+)([GMT])\)"):
        if found := re.search(pattern, message):
            return float(found[1]) * units[found[2]]
    return math.inf


def _key(case: Case, lowered: Any) -> str:
    """Of the program, the machine and the compiler."""
    import importlib.metadata

    import jax

    versions = [jax.__version__, importlib.metadata.version("libtpu")]
    said = [*versions, case.topology.name, str(tuple(mesh_sizes(case.config.mesh).values()))]
    text = lowered.as_text()
    return hashlib.sha256("\n".join([*said, text]).encode()).hexdigest()[:24]
