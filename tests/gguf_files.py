"""GGUF files of other programs, and what is in a file, by the package `gguf` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from zephyr_jax.weights.gguf import export_gguf


@pytest.fixture(scope="module")
def exported(cfg: Any, params: Any, tok: Any, tmp_path_factory: Any) -> Path:
    """The small model in float32."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return export_gguf(cfg, params, tok, path, dtype="float32")


def fields_of(path: Path) -> dict[str, Any]:
    """A file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def types_of(path: Path) -> dict[str, str]:
    """The type of every tensor in a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def rewritten(
    source: Path,
    target: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    arch: str = "llama",
    stored: dict[str, tuple[np.ndarray, Any]] | None = None,
) -> Path:
    """A copy of a GGUF with other metadata and tensors (None removes), made without our code.

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
