"""Safetensors files: a writer that holds one tensor at a time, a reader of slices.

The library `safetensors` reads; it writes only tensors that are all in memory, so the writer here
puts the header first and the tensors after it as they come. Models are unknown here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from zephyr_jax.storage import write_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
MAX_SHARD_BYTES = 5_000_000_000
WRITER = {"writer": "zephyr_jax"}  # metadata of every file that is written here
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # our name -> that in a file


class TensorSpec(NamedTuple):
    """Dtype (float32, bfloat16 or float16) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def check_dtype(dtype: str, allowed: Iterable[str] = DTYPES) -> None:
    """Raises a ValueError unless weights can be stored in this dtype."""
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(allowed)}")


def plan_shards(
    specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, TensorSpec]]:
    """File name -> tensors, in the same order; a tensor above the limit has a file of its own.

    Raises:
        ValueError: if the limit is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_safetensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Shaped[np.ndarray, "*shape"]]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes tensors as one file, or as shards with an index; returns the names of the files.

    Each tensor is taken from `tensors` when it is written. A file appears when it is complete, the
    index last.

    Args:
        folder: is created.
        specs: of the tensors, in writing order.
        tensors: (name, array) pairs, in the order of `specs`.
        max_shard_bytes: of tensors in a file.

    Raises:
        ValueError: if a tensor does not have its spec.
    """
    shards, source = plan_shards(specs, max_shard_bytes), iter(tensors)
    for file, shard in shards.items():
        write_file(folder / file, shard, source)
    if len(shards) == 1:
        return list(shards)
    index = {
        "metadata": {
            "total_size": sum(spec.nbytes for spec in specs.values()),
            "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        },
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return [*shards, INDEX]


def write_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, which takes its tensors from `tensors`; `metadata` goes into its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **WRITER, **(metadata or {})}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        place = {"shape": list(spec.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": DTYPES[spec.dtype], **place}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors are aligned, so that files can be mapped

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, spec in specs.items():
            actual, array = next(tensors, ("nothing", np.zeros(0)))
            if (actual, str(array.dtype), array.shape) != (name, *spec):
                raise ValueError(
                    f"expected tensor {name} {spec.dtype} {spec.shape}, got {actual} "
                    f"{array.dtype} {array.shape}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    write_atomic(path, write)


class SafetensorsReader:
    """The tensors of a folder (one file, or shards with an index) or of one file.

    Only headers are read until a tensor, or a slice of one, is read. A context manager.

    Raises:
        FileNotFoundError: if there are no safetensors, or the index names files that are missing.
        ValueError: if a file is truncated or corrupt, or the index and the files disagree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        weight_map: dict[str, str] = {}
        if path.is_file():
            folder, files = path.parent, [path.name]
        elif (path / SINGLE).is_file():  # preferred to an index, as by transformers
            folder, files = path, [SINGLE]
        elif (path / INDEX).is_file():
            folder, weight_map = path, read_index(path)
            files = sorted(set(weight_map.values()))
        elif path.is_dir():
            raise no_weights(path, [file.name for file in path.iterdir()])
        else:
            raise FileNotFoundError(f"{path} is neither a folder nor a safetensors file")
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}, which {INDEX} names; copy or download "
                "them again"
            )
        with contextlib.ExitStack() as stack:
            handles = {file: stack.enter_context(_open(folder / file)) for file in files}
            names = {file: list(handle.keys()) for file, handle in handles.items()}
            actual = {(name, file) for file in files for name in names[file]}
            weight_map = weight_map or dict(actual)
            if lost := [f"{name} ({file})" for name, file in weight_map.items() - actual]:
                raise ValueError(
                    f"the index of {folder} names tensors that their files lack: "
                    f"{', '.join(sorted(lost))}; copy the folder again"
                )
            self._stack = stack.pop_all()
        self._handles = {name: handles[file] for name, file in sorted(weight_map.items())}
        self.metadata: dict[str, str] = handles[files[0]].metadata() or {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; arrays that were read stay valid."""
        self._handles = {}
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of any dtype, from the header."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header.

        Raises:
            ValueError: if the dtype is not float32, bfloat16 or float16.
        """
        label = self._handles[name].get_slice(name).get_dtype()
        for dtype, ours in DTYPES.items():
            if label == ours:
                return TensorSpec(dtype, self.shape(name))
        raise ValueError(
            f"tensor {name} has dtype {label}; only {', '.join(DTYPES)} can be read "
            "(save the model in one of them; a quantized one has to be dequantized first)"
        )

    def read(self, name: str, index: Sequence[slice] = ()) -> Shaped[np.ndarray, "*shape"]:
        """A tensor, or the part of it that a slice (of step 1) for each leading axis selects."""
        handle = self._handles[name]
        return handle.get_slice(name)[tuple(index)] if index else handle.get_tensor(name)


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds each tensor, by the index of a sharded model.

    Raises:
        ValueError: if it is not an index.
    """
    try:
        weight_map = dict(json.loads((folder / INDEX).read_bytes())["weight_map"])
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is no safetensors index; copy it again") from error
    return weight_map


def no_weights(where: object, names: Iterable[str]) -> FileNotFoundError:
    """What to raise where no safetensors are, with the way out that the files there suggest."""
    names = set(names)
    suffixes = {Path(name).suffix for name in names}
    if ADAPTER_CONFIG in names:
        return FileNotFoundError(
            f"{where} holds a PEFT adapter, which is no model without its base; merge them with "
            "port_weights.py import FOLDER DESTINATION --base=MODEL"
        )
    if ".gguf" not in suffixes and ".bin" in suffixes:
        return FileNotFoundError(
            f"{where} holds only .bin files, which are pickles and may run code; save the model "
            "as safetensors first (transformers: model.save_pretrained(FOLDER))"
        )
    message = f"{where} holds neither {SINGLE} nor {INDEX}"
    if ".gguf" in suffixes:
        message += "; download one of its GGUF files and name that file"
    return FileNotFoundError(message)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        check_no_pointer(path)
        raise ValueError(
            f"{path} is truncated or corrupt ({path.stat().st_size} bytes: {error}); copy it again"
        ) from error


def check_no_pointer(path: Path) -> None:
    """Raises a ValueError for a git-lfs pointer in the place of a file."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a git-lfs pointer; run `git lfs pull` or download the file"
            )
