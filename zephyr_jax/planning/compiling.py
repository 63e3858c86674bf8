"""Slices by name, and the training step of a run compiled for one by libtpu, without having it.

A compiled program is cached by a digest of its text, the slice and the versions of the compiler.
JAX is imported only inside functions, so that `ENVIRONMENT` can be set before.
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
import zlib
from typing import Any, NamedTuple

from absl import logging

from zephyr_jax.chips import CHIPS, Chip
from zephyr_jax.config.run import RunConfig
from zephyr_jax.storage import user_cache, write_atomic

DOCUMENTS = 32  # the most pairs in a row; arrays of this size are small in any case
_NAME = re.compile(r"(?:([1-9]\d*)\*)?([a-z0-9]+):(\d+(?:x\d+){1,2})")

# Set before libtpu is loaded: it asks no metadata server, several processes may load it at once,
# and it prints nothing.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Some slices of one shape, named as `v5e:4x4` or `2*v5e:8x8`."""

    slices: int
    family: str
    sizes: tuple[int, ...]  # chips along each axis of a slice

    @property
    def name(self) -> str:
        """The name on the command line."""
        shape = f"{self.family}:{'x'.join(map(str, self.sizes))}"
        return shape if self.slices == 1 else f"{self.slices}*{shape}"

    @property
    def chip(self) -> Chip:
        """Published figures of its chips."""
        return CHIPS[self.family]

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return self.slices * math.prod(self.sizes)

    @property
    def devices(self) -> int:
        """The number of devices in all slices, as JAX counts."""
        return self.chips * self.chip.devices


def parse_topology(name: str) -> Topology:
    """The slices of a name; a ValueError says what a name is."""
    match = _NAME.fullmatch(name.strip())
    slices, family, shape = match.groups() if match else (None, "", "0")
    sizes = tuple(int(size) for size in shape.split("x"))
    axes = 3 if family in ("v4", "v5p", "tpu7x") else 2
    if family not in CHIPS or len(sizes) != axes or min(sizes) < 1:
        raise ValueError(
            f"topology {name!r} is not known; write FAMILY:CHIPSxCHIPS, such as v5e:4x4, with "
            "three axes for v4, v5p and tpu7x, such as v5p:2x2x4 (16 chips), or 2*v5e:8x8 (two "
            f"slices); families: {', '.join(CHIPS)}"
        )
    return Topology(int(slices or 1), family, sizes)


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology; a ValueError if libtpu is absent, or does not know it."""
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.sizes) == 1:  # a machine of one chip; libtpu expects four
        options["chips_per_host_bounds"] = [1, 1, 1]
    slice_name = topology._replace(slices=1).name
    try:
        return topologies.get_topology_desc(slice_name, platform="tpu", **options).devices
    except Exception as error:  # libtpu raises errors of many types
        message = " ".join(str(error).split())[:200]
        if "not installed" in message:
            message = "libtpu is not installed; it comes with the extra plan: "
            message += "pip install -e '.[plan]'"
        raise ValueError(f"topology {topology.name} cannot be described: {message}") from error


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
    wanted: float  # GiB that a program needs that the compiler refuses, else 0
    seconds: float  # of compiling
    options: dict[str, str]  # of the compiler


def make_case(
    config: RunConfig, topology: Topology, rows: int | None = None, auto: bool = False
) -> Case:
    """The program of a run on a topology; a ValueError if mesh, batch and topology do not fit.

    `rows` are those of a batch of pairs; None: as many as the real pairs of docs/recipes.md fill.
    With `auto`, or a mesh that is, mesh and micro-batches are chosen.
    """
    from zephyr_jax.training.sizes import Devices, fitted, rows_of, with_remat, with_train

    chip = topology.chip
    devices = Devices(topology.devices, topology.slices, chip.usable_gib, chip.keeps_hidden)
    rows = rows if rows and config.dpo else rows_of(config)
    if auto or config.mesh.auto:
        config = with_train(fitted(with_train(config, remat="full"), devices, rows), remat="auto")
    mesh = config.mesh.sized(topology.devices, f"of {topology.name}")
    if mesh.data % topology.slices:
        raise ValueError(
            f"mesh.data={mesh.data} is not divisible by the {topology.slices} slices of "
            f"{topology.name}, between which only data may be sharded"
        )
    config = with_remat(dataclasses.replace(config, mesh=mesh), devices, rows)
    unit = mesh.data * mesh.fsdp * config.train.micro_batches
    if not config.dpo and rows % unit:
        raise ValueError(
            f"train.batch_size={rows} rows is not divisible by data x fsdp x micro_batches = "
            f"{unit} on {topology.name}; take a mesh with mesh.tensor above 1, or fewer "
            "micro-batches"
        )
    return Case(config, topology, -(-rows // unit) * unit)


def lower(case: Case) -> tuple[Any, dict[str, str], dict[str, int]]:
    """The step lowered on the topology's mesh, its options, bytes of its arguments by kind."""
    import jax

    from zephyr_jax.sharding import compiler_options, make_mesh
    from zephyr_jax.training import steps
    from zephyr_jax.training.optim import make_optimizer, make_schedule

    config = case.config
    with jax.set_mesh(make_mesh(**config.mesh.axes, devices=describe(case.topology))):
        optimizer = make_optimizer(config.optim, make_schedule(config.optim, 1000))
        state = steps.abstract_state(config, optimizer)
        documents = DOCUMENTS if config.dpo else None
        batch = steps.abstract_batch(case.rows, config.data.seq_len, documents)
        base = steps.abstract_base(config.model, config.lora) if config.lora else None
        step, _ = steps.jitted_steps(config, optimizer)
        lowered = step.trace(state, batch, base).lower(lowering_platforms=("tpu",))
        options = compiler_options(config.train.compiler_options)
    parts = {"parameters": state.params, "moments": state.opt_state, "frozen base": base}
    parts |= {"synced reference": state.reference, "batch": batch}
    sizes = {name: bytes_of(tree) for name, tree in parts.items() if tree is not None}
    return lowered, options, sizes


def bytes_of(tree: Any) -> int:
    """Bytes on one device, without what waits in host memory."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


def report(
    lowered: Any, options: dict[str, str], parts: dict[str, int], where: Topology, mesh: Any
) -> Compiled:
    """The report on a lowered program, which is kept; `parts`: bytes of its arguments by kind."""
    import jax

    start = time.monotonic()
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    words = [*versions, where.name, str(tuple(mesh.axes.values()))]
    key = "\n".join([*words, str(sorted(options.items())), lowered.as_text()])
    path = user_cache() / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json.gz"
    try:
        stored = json.loads(gzip.decompress(path.read_bytes()))
        return Compiled(**stored)._replace(parts=parts, options=options)
    except (OSError, EOFError, zlib.error) as error:
        if path.is_file():
            logging.warning("%s is damaged (%s), so the program is compiled again", path, error)
    text, sizes, wanted = "", (0, sum(parts.values()), 0, 0), 0.0
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = needed_gib(str(error))
    else:
        text, memory = program.as_text(), program.memory_analysis()
        sizes = memory.peak_memory_in_bytes, memory.argument_size_in_bytes
        sizes += memory.temp_size_in_bytes, memory.alias_size_in_bytes
    done = Compiled(text, *sizes, parts, wanted, time.monotonic() - start, options)
    write_atomic(path, gzip.compress(json.dumps(done._asdict()).encode()))
    return done


def needed_gib(message: str) -> float:
    """GiB that a program needs, by the message of libtpu 0.0.42.1: in all, or temporaries alone."""
    units = {"G": 1.0, "M": 2.0**-10, "T": 1024.0}
    for pattern in (r"Used ([0-9.]+)([GMT]) of", r"temporaries \(([0-9.]+)([GMT])\)"):
        if match := re.search(pattern, message):
            return float(match[1]) * units[match[2]]
    return math.inf
