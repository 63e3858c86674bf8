"""Slices by their names, and their devices as libtpu describes them without having one."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from zephyr_jax.chips import CHIPS, Chip
from zephyr_jax.config.run import MeshConfig

_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+){1,2})")

# Set before libtpu is loaded: no metadata server is asked, several processes may load it at once,
# and it keeps quiet.
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
    """Some slices of one form, as `v5e:4x4` or `2*v5e:8x8` names them."""

    slices: int
    family: str
    sizes: tuple[int, ...]  # chips along each axis of a slice

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        form = f"{self.family}:{'x'.join(map(str, self.sizes))}"
        return form if self.slices == 1 else f"{self.slices}*{form}"

    @property
    def chip(self) -> Chip:
        """What is known of its chips."""
        return CHIPS[self.family]

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.sizes)

    @property
    def devices(self) -> int:
        """In all slices, as JAX counts."""
        return self.chips * self.chip.devices


def parse_topology(name: str) -> Topology:
    """The slices of a name.

    Raises:
        ValueError: if it is not one.
    """
    found = _NAME.fullmatch(name.strip())
    known = ", ".join(CHIPS)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is not known; write FAMILY:CHIPSxCHIPS, such as v5e:4x4, "
            f"v5p:2x2x4 (16 chips) or 2*v5e:8x8 (two slices); families: {known}"
        )
    sizes = tuple(int(size) for size in found[3].split("x"))
    slices = int(found[1] or 1)
    if not slices:
        raise ValueError(f"topology {name!r} has no slice; write {found[2]}:{found[3]} for one")
    cubic = found[2] in ("v4", "v5p", "tpu7x")
    if len(sizes) != 2 + cubic or min(sizes) < 1:
        form = "three axes, such as 2x2x4" if cubic else "two axes, such as 4x4"
        raise ValueError(f"topology {name!r}: a slice of {found[2]} has {form}")
    return Topology(slices, found[2], sizes)


def resolved(mesh: MeshConfig, topology: Topology) -> MeshConfig:
    """The sizes of a mesh on a topology; several slices divide the data axis.

    Raises:
        ValueError: if they do not multiply to its devices, or data is not divided by the slices.
    """
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
            f"{topology.name}, between which only data may be divided"
        )
    return MeshConfig(*sizes)


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, as libtpu describes them.

    Raises:
        ValueError: if libtpu is not there, or does not know the topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.sizes) == 1:  # a machine of one chip; libtpu expects four
        options["chips_per_host_bounds"] = [1, 1, 1]
    form = Topology(1, topology.family, topology.sizes).name
    try:
        return topologies.get_topology_desc(form, platform="tpu", **options).devices
    except Exception as error:  # libtpu raises what it likes
        said = " ".join(str(error).split())[:200]
        if "not installed" in said:
            said = "libtpu is not installed; it comes with the extra plan: pip install -e '.[plan]'"
        raise ValueError(f"topology {topology.name} cannot be described: {said}") from error


def topology_mesh(topology: Topology, sizes: MeshConfig) -> Any:
    """The mesh of a run, of devices that are not here, placed as it places its own."""
    import jax
    from jax.sharding import AxisType

    from zephyr_jax.sharding import arrange_devices

    named = mesh_sizes(sizes)
    devices = arrange_devices(describe(topology), tuple(named.values()))
    return jax.sharding.Mesh(devices, tuple(named), axis_types=(AxisType.Explicit,) * len(named))


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Size by axis, in the order of the mesh."""
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return sizes | ({"context": mesh.context} if mesh.context != 1 else {})
