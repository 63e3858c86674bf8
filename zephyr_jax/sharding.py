"""The device mesh, explicit and ambient (`jax.set_mesh`), its compiler's options, logical axes.

Without a mesh `spec` returns None and the same code runs on one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zephyr_jax.chips import options_of
from zephyr_jax.config.run import MeshConfig

AXES = ("data", "fsdp", "tensor")  # of every mesh; `context` is an optional fourth
BATCH = ("data", "fsdp")  # the rows of a batch are sharded over both
Rules = dict[str, tuple[str, ...]]

# Logical axes are those of zephyr_jax.types; axes that are not listed are never sharded. A row's
# tokens are T in batches and inside attention, C inside a layer's projections, whose heads or
# features are sharded, and Z in the residual stream. N is key-value heads inside attention.
ACTIVATION_RULES: Rules = {
    "B": BATCH,
    "C": ("context",),
    "Z": ("context", "tensor"),
    "K": ("tensor",),
    "N": ("tensor", "context"),
    "F": ("tensor",),
    "V": ("tensor",),
}
WEIGHT_RULES: Rules = {"D": ("fsdp", "context"), **dict.fromkeys("KFV", ("tensor",))}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Any = None
) -> jax.sharding.Mesh:
    """A mesh with explicit axes of these names; one size may be -1 for all that is left."""
    devices = devices or jax.devices()
    sizes = MeshConfig(data, fsdp, tensor, context).sized(len(devices)).axes
    arranged = arrange_devices(devices, tuple(sizes.values()))
    return jax.sharding.Mesh(arranged, tuple(sizes), (AxisType.Explicit,) * len(sizes))


def arrange_devices(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of these sizes, in an order that suits their links."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:  # only data may be sharded across slices
        raise ValueError(f"mesh.data={sizes[0]} is not divisible by the {slices} slices here")
    inside = (sizes[0] // slices, *sizes[1:])
    between = (slices, *[1] * (len(sizes) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, between, devices, allow_split_physical_axes=True
    )


def axis_size(*names: str) -> int:
    """The product of the ambient mesh's sizes along these axes; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape.get(name, 1) for name in names)


def device_of_mesh() -> Any:
    """A device of the ambient mesh, which may be abstract."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the platform of the ambient mesh's devices."""
    return device_of_mesh().platform


def axes_of(axis: str, rules: Rules = ACTIVATION_RULES) -> tuple[str, ...]:
    """The axes of the ambient mesh over which a logical axis is sharded."""
    here = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in rules.get(axis, ()) if name in here)


def spec(axes: str, rules: Rules = ACTIVATION_RULES) -> PartitionSpec | None:
    """The partition of an array with these logical axes; None without an ambient mesh.

    Example: `spec("BTD")` is `P(("data", "fsdp"), None, None)`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return None
    over = (axes_of(axis, rules) for axis in axes)
    return PartitionSpec(*((names[0] if len(names) == 1 else names) or None for names in over))


def token_axes(length: int) -> tuple[str, str]:
    """The logical axes of a row's tokens: in the residual stream (Z if possible), projections."""
    over = axis_size("context")
    if length % over:
        raise ValueError(f"rows of {length} tokens are not divisible by mesh.context={over}")
    over_tensor = axis_size("tensor") > 1 and not length % axis_size("context", "tensor")
    return "Z" if over_tensor else "C", "C"


def token_axes_of(array: Any) -> tuple[str, str]:
    """`token_axes` of an array `B T ...` by its type; T for both if its tokens are not sharded."""
    if spec("") is not None:
        over = PartitionSpec(jax.typeof(array).sharding.spec[1])
        for pair in (("T", "T"), ("C", "C"), ("Z", "C")):
            if spec(pair[0]) == over:
                return pair
    return "T", "T"


def reshard(array: jax.Array, axes: str) -> jax.Array:
    """The array sharded by its logical axes; unchanged without an ambient mesh."""
    partition = spec(axes)
    return array if partition is None else jax.reshard(array, partition)


def weight_spec(axes: str) -> PartitionSpec | None:
    """The partition of a parameter, with or without its layer axis; norm scales are replicated."""
    return spec(axes, {} if len(axes.replace("L", "")) == 1 else WEIGHT_RULES)


def per_device(function: Callable[..., Any], axes: Sequence[str], out: Any) -> Callable[..., Any]:
    """`function` of each device's part of arrays with these logical axes, sharded as `out`."""
    if spec("") is None:
        return function
    # Replicated results are equal by construction, which JAX would not see.
    return jax.shard_map(function, in_specs=tuple(map(spec, axes)), out_specs=out, check_vma=False)


def named_sharding(partition: PartitionSpec | None) -> jax.sharding.Sharding:
    """The sharding on the ambient mesh, abstract or not; the default device without one."""
    if partition is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.get_mesh()
    return NamedSharding(jax.sharding.get_abstract_mesh() if mesh.empty else mesh, partition)


def step_options(more: str | dict[str, str] = "auto") -> dict[str, str] | None:
    """The `compiler_options` that this compiler takes, for `jax.jit`."""
    options = compiler_options(more)
    if options and not jax.sharding.get_mesh().empty:  # else no device compiles it
        options = dict(usable_options(tuple(options.items())))
    return options or None


def compiler_options(more: str | dict[str, str] = "auto") -> dict[str, str]:
    """The compiler's options for the mesh's devices (TPU), and `more`: `train.compiler_options`."""
    if platform() != "tpu" or more == "none":
        return {}
    return options_of(device_of_mesh().device_kind) | (more if isinstance(more, dict) else {})


@functools.cache  # several programs of a run have the same ones
def usable_options(pairs: tuple[tuple[str, str], ...], on: str = "tpu") -> dict[str, str]:
    """Those of the options that this compiler takes; a line in the log for each other one."""
    options = dict(pairs)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=named_sharding(spec("")))
    while options:
        try:
            program = jax.jit(jnp.negative, compiler_options=options).trace(number)
            program.lower(lowering_platforms=(on,)).compile()
            break
        except jax.errors.JaxRuntimeError as error:
            unknown = next((name for name in options if name in str(error)), None)
            if unknown is None:
                raise
            value = options.pop(unknown)
            logging.warning("this compiler does not take %s=%s: it is left out", unknown, value)
    return options
