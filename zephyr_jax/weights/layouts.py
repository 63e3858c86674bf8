"""How our arrays and the tensors of another format are the same numbers, read and written.

A table of rules describes a format: its name for each tensor and where our axes are in it. Our
layers are stacked on a leading axis; the other formats have one tensor for each layer. One tensor
at a time is in host memory, next to the arrays themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.models.parameters import axis_sizes, param_axes
from zephyr_jax.types import Params

Shapes = Mapping[str, tuple[int, ...]]


class Rule(NamedTuple):
    """How one of their tensors and one layer of one of our arrays are the same numbers.

    `axes` reads "theirs -> ours" in the logical axes of zephyr_jax.types; axes in brackets are one
    axis there, the first varying slowest.
    """

    theirs: str  # `{}` stands for the layer
    ours: str
    axes: str

    @property
    def stacked(self) -> bool:
        """Whether our array holds all layers."""
        return "{}" in self.theirs


class Layout(NamedTuple):
    """The tensors of a model in another format."""

    rules: list[Rule]
    sizes: dict[str, int]  # of every logical axis

    @classmethod
    def of(cls, cfg: MistralConfig, table: Sequence[Rule]) -> Layout:
        """The layout of this configuration's parameters: tied embeddings have no head."""
        return cls([rule for rule in table if rule.ours in param_axes(cfg)], axis_sizes(cfg))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in writing order: embedding, layers, norm, head."""
        return {name: self._shape(rule) for name, rule, _ in self._tensors()}

    def _shape(self, rule: Rule) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[a] for a in group) for group in _parse(rule.axes)[0])

    def _our_shape(self, rule: Rule) -> tuple[int, ...]:
        axes = _parse(rule.axes)[1]
        return tuple(self.sizes[a] for a in (("L", *axes) if rule.stacked else axes))

    def _tensors(self) -> Iterator[tuple[str, Rule, int | None]]:
        for stacked, group in itertools.groupby(self.rules, lambda rule: rule.stacked):
            rules = list(group)
            for layer in range(self.sizes["L"]) if stacked else (None,):
                yield from ((rule.theirs.format(layer), rule, layer) for rule in rules)

    def write(
        self, params: Params, dtype: str
    ) -> Iterator[tuple[str, Float[np.ndarray, "*shape"]]]:
        """Yields every tensor by name in its own layout, in the order of `shapes`.

        One layer of one stacked array at a time comes to the host, gathered from all processes,
        which all must take part. A ValueError names what does not fit, or is not finite.
        """
        flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
        actual = {path: tuple(array.shape) for path, array in flat.items()}
        expected = {rule.ours: self._our_shape(rule) for rule in self.rules}
        check_tensors(expected, actual, "parameters and configuration")
        for name, rule, layer in self._tensors():
            groups, ours = _parse(rule.axes)
            theirs = [a for group in groups for a in group]
            out = np.empty([self.sizes[a] for a in theirs], jnp.dtype(dtype))
            with np.errstate(over="ignore"):
                _to_host(flat[rule.ours], layer, out.transpose([theirs.index(a) for a in ours]))
            check_finite(name, out)
            yield name, out.reshape(self._shape(rule))

    def read(self, reader: Any, dtype: str, shardings: Params) -> Params:
        """The arrays that the tensors of a file make up, in `dtype`, sharded as in `shardings`.

        `reader.read(name, slices)` gives a tensor, or a part of it. Each process reads the slices
        of its own devices, one tensor at a time.
        """
        flat: dict[str, Any] = dict(traverse_util.flatten_dict(shardings, sep="/"))
        arrays = {}
        for rule in self.rules:
            read = functools.partial(_read_part, reader, rule, self.sizes, jnp.dtype(dtype))
            arrays[rule.ours] = from_parts(self._our_shape(rule), flat[rule.ours], read)
        return traverse_util.unflatten_dict(arrays, sep="/")


@functools.cache
def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """`"(K H) D -> D K H"` as `((("K", "H"), ("D",)), ("D", "K", "H"))`."""
    theirs, ours = axes.split("->")
    groups = (tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w", theirs))
    return tuple(groups), tuple(ours.split())


def _to_host(array: Any, layer: int | None, out: np.ndarray) -> None:
    """Copies an array, or one layer of a stacked one, from all devices into `out`, cast to it."""
    if isinstance(array, np.ndarray):
        _copy(out, array if layer is None else array[layer])
        return
    if layer is not None:  # the index is an operand: one program for all layers
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    elif jax.default_backend() != "cpu":
        array = jnp.copy(array)  # an array keeps the host copy of its values, a copy is dropped
    if not array.is_fully_addressable:
        replicated = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.device_put(array, replicated).addressable_data(0)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            _copy(out[shard.index], np.asarray(shard.data))  # NumPy itself would cast a copy


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies and casts; where it transposes, in parts that stay in the processor's cache."""
    order = sorted(range(target.ndim), key=lambda axis: -target.strides[axis])
    target, source = target.transpose(order), source.transpose(order)
    if source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], 16):
        part = slice(start, start + 16)
        target[..., part] = source[..., part].astype(target.dtype)


def not_finite(params: Params) -> str:
    """Which parameters hold nan or inf, as the beginning of a message; "" if there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_are_finite(params)))
    names = [jax.tree_util.keystr(path) for path, holds in leaves if not holds]
    return f"{', '.join(names)} has values that are not finite" if names else ""


@jax.jit
def _are_finite(params: Params) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises a ValueError where a tensor overflowed float16, or holds NaN or infinity."""
    if np.isfinite(array).all():
        return
    if array.dtype == np.float16 and not np.isnan(array).any():
        raise ValueError(f"{name} has weights above 65504, float16's largest; use bfloat16")
    raise ValueError(f"{name} has weights that are not finite; take a checkpoint from before that")


def from_parts(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array of which this process reads only its own devices' parts, each of them once.

    `read` is called with the bounds of a part, a slice with start and stop for each axis.
    """
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "an addressable device without a part"
        bounds = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        if str(bounds) not in parts:
            parts[str(bounds)] = read(tuple(slice(*bound) for bound in bounds))
        return parts[str(bounds)]

    # Before the next array is read, this one's host memory is free.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def _read_part(
    reader: Any, rule: Rule, sizes: Mapping[str, int], dtype: np.dtype, part: tuple[slice, ...]
) -> np.ndarray:
    """The part of one of our arrays with these bounds, layer by layer from the file."""
    out = aligned_empty(tuple(s.stop - s.start for s in part), dtype)
    names, targets, inner = [rule.theirs], [out], part
    if rule.stacked:
        layers, *inner = part
        names = [rule.theirs.format(i) for i in range(layers.start, layers.stop)]
        targets = list(out)
    for name, target in zip(names, targets, strict=True):
        with np.errstate(over="ignore"):  # transposed and cast on the way, without another copy
            _copy(target, _read_layer(reader, name, rule.axes, sizes, inner))
        if dtype == np.float16:
            check_finite(name, target)
    return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that jax uses on CPU without a copy: aligned to 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read_layer(
    reader: Any, name: str, axes: str, sizes: Mapping[str, int], part: Sequence[slice]
) -> np.ndarray:
    """The part of one layer with these bounds, in our layout: a view of what is read."""
    groups, ours = _parse(axes)
    bounds = dict(zip(ours, part, strict=True))
    rows, split, cut = [], [], []
    for first, *rest in groups:
        # A range of a group's first axis is one range of rows; its other axes are cut afterwards.
        outer, inner = bounds[first], math.prod(sizes[a] for a in rest)
        rows.append(slice(outer.start * inner, outer.stop * inner))
        split += [outer.stop - outer.start, *(sizes[a] for a in rest)]
        cut += [slice(None), *(bounds[a] for a in rest)]
    array = reader.read(name, rows).reshape(split)[tuple(cut)]
    theirs = [a for group in groups for a in group]
    return array.transpose([theirs.index(a) for a in ours])


def check_tensors(expected: Shapes, actual: Shapes, where: str) -> None:
    """Raises a ValueError, beginning with `where`, that names the tensors that do not fit."""
    both = sorted(expected.keys() & actual.keys())
    odd = [f"{x} {actual[x]} instead of {expected[x]}" for x in both if expected[x] != actual[x]]
    missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    problems = {"missing": sorted(missing), "extra": sorted(extra), "shapes": odd}
    lines = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            lines.append(f"{what}: {', '.join(names[:20])}{more}")
    if lines:
        raise ValueError(f"{where} do not fit; {'; '.join(lines)}")
