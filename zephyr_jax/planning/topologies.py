"""Slices by their names, and their devices as libtpu describes them without having one."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from zephyr_jax.chips import CHIPS, Chip
from zephyr_jax.config.run import MeshConfig

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
    if not match or match[2] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is not known; write FAMILY:CHIPSxCHIPS, such as v5e:4x4, "
            f"v5p:2x2x4 (16 chips) or 2*v5e:8x8 (two slices); families: {', '.join(CHIPS)}"
        )
    slices, family = int(match[1] or 1), match[2]
    sizes = tuple(int(size) for size in match[3].split("x"))
    cubic = family in ("v4", "v5p", "tpu7x")
    if len(sizes) != 2 + cubic or min(sizes) < 1:
        axes = "three axes, such as 2x2x4" if cubic else "two axes, such as 4x4"
        raise ValueError(f"topology {name!r}: a slice of {family} has {axes}")
    return Topology(slices, family, sizes)


def resolve_sizes(mesh: MeshConfig, topology: Topology) -> MeshConfig:
    """The mesh with a number for -1; several slices shard the data axis, or a ValueError."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor, mesh.context]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [topology.devices // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != topology.devices or sizes.count(0):
        raise ValueError(
            f"mesh data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor}, context="
            f"{mesh.context} does not multiply to the {topology.devices} devices of "
            f"{topology.name}; use -1 for one of them"
        )
    if sizes[0] % topology.slices:
        raise ValueError(
            f"mesh.data={sizes[0]} is not divisible by the {topology.slices} slices of "
            f"{topology.name}, between which only data may be sharded"
        )
    return MeshConfig(*sizes)


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


def topology_mesh(topology: Topology, mesh: MeshConfig) -> Any:
    """The mesh of a run on the topology's devices, in the order of a real run."""
    import jax
    from jax.sharding import AxisType

    from zephyr_jax.sharding import arrange_devices

    sizes = mesh_sizes(mesh)
    devices = arrange_devices(describe(topology), tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Size by axis, in the order of the mesh."""
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return sizes | ({"context": mesh.context} if mesh.context != 1 else {})
