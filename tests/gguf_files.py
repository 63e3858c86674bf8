"""What the tests of GGUF share: a small model, odd files, trees compared bit by bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import traverse_util

import zephyr_jax as zj
from zephyr_jax.models.parameters import param_shapes

gguf = pytest.importorskip("gguf", reason="the extra gguf")


def small_config(**changes: Any) -> zj.MistralConfig:
    """Grouped queries, heads * head_dim != hidden; rows of 32s only in the MLP's second matrix."""
    fields = {"vocab_size": 424, "intermediate_size": 96, "sliding_window": 64}
    fields |= {"rope_theta": 54321.0, "initializer_range": 0.2}
    return dataclasses.replace(zj.MistralConfig.tiny(), **fields | changes)


def random_tree(cfg: zj.MistralConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters that are all of one size, in NumPy."""
    rng = np.random.default_rng(seed)
    flat = {k: rng.normal(size=s).astype(np.float32) for k, s in param_shapes(cfg).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same_tree(a: Any, b: Any) -> None:
    """Two trees are equal to the bit, dtypes included."""
    a, b = (traverse_util.flatten_dict(x, sep="/") for x in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


def fields_of(path: Path) -> dict[str, Any]:
    """A file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def rewritten(
    source: Path,
    target: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    arch: str = "llama",
    stored: dict[str, tuple[np.ndarray, Any]] | None = None,
) -> Path:
    """A copy of a GGUF with other metadata and tensors (None takes away), made without our code.

    `stored` are tensors as bytes of a type.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in {"general.architecture", *(keys or {})}:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in (keys or {}).items():
        if value is not None:
            before = reader.fields[name].types if name in reader.fields else ()
            kind = before[0] if before else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(name, value, kind)
    held = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    held |= {name: (array, None) for name, array in (tensors or {}).items()} | (stored or {})
    for name, (array, kind) in held.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
