"""Safetensors files: a reader of slices, and a writer that holds one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from zephyr_jax.storage import read_json, write_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
MAX_SHARD_BYTES = 5_000_000_000
WRITER = {"writer": "zephyr_jax"}  # metadata of every file that is written here
_AGAIN = "copy or download the model again"
Shapes = Mapping[str, tuple[int, ...]]
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # our name -> that in a file


def check_dtype(dtype: str, allowed: Iterable[str] = DTYPES) -> None:
    """Raises a ValueError unless weights can be stored in this dtype."""
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(allowed)}")


def plan_shards(
    shapes: Shapes, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[str]]:
    """File name -> tensors, in the same order; a tensor above the limit has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(shape, dtype)
        if shards[-1] and used + nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def write_safetensors(
    folder: Path,
    shapes: Shapes,
    dtype: str,
    tensors: Iterable[tuple[str, Shaped[np.ndarray, "*shape"]]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors, in the order of `shapes`, as one file, or as shards and then their index."""
    shards, source = plan_shards(shapes, dtype, max_shard_bytes), iter(tensors)
    for file, names in shards.items():
        write_file(folder / file, {name: shapes[name] for name in names}, dtype, source)
    if len(shards) == 1:
        return
    sizes = {"total_size": sum(_nbytes(shape, dtype) for shape in shapes.values())}
    sizes["total_parameters"] = sum(math.prod(shape) for shape in shapes.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": sizes, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(
    path: Path,
    shapes: Shapes,
    dtype: str,
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, which takes its tensors from `tensors`; `metadata` goes into its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **WRITER, **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors are aligned, so that files can be mapped

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for expected, shape in shapes.items():
            name, array = next(tensors)
            assert (name, array.dtype, array.shape) == (expected, dtype, shape), (name, expected)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    write_atomic(path, write)


class SafetensorsReader:
    """The tensors of a folder (one file, or shards with an index) or of a file; read on demand."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        files, index = [path / SINGLE], {}  # preferred to an index, as by transformers
        if not path.is_dir():
            files = [path]
        elif not files[0].is_file():
            if not (path / INDEX).is_file():
                raise no_weights(path, [file.name for file in path.iterdir()])
            index = read_index(path)
            files = [path / file for file in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            listed = f"{', '.join(missing):.200}"
            raise FileNotFoundError(f"{path} lacks {listed}; copy or download it again")
        opened = {file.name: _open(file) for file in files}
        holders: dict[str, str] = {}
        held = ((name, file) for file, tensors in opened.items() for name in tensors.keys())  # noqa: SIM118
        for name, file in held:
            if (other := holders.setdefault(name, file)) != file:
                raise ValueError(f"{path}: tensor {name} is in {other} and in {file}; {_AGAIN}")
        for name, file in index.items():
            if holders.get(name) != file:
                raise ValueError(f"{path / INDEX}: tensor {name} is not in {file}; {_AGAIN}")
        self._slices = {name: opened[file].get_slice(name) for name, file in holders.items()}
        self.metadata: dict[str, str] = opened[files[0].name].metadata() or {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, of any dtype."""
        return {name: tuple(each.get_shape()) for name, each in self._slices.items()}

    @property
    def dtype(self) -> str:
        """A dtype that holds every tensor: the one that all have, or else float32."""
        kinds = {each.get_dtype() for each in self._slices.values()}
        same = [ours for ours, theirs in DTYPES.items() if kinds == {theirs}]
        return same[0] if same else "float32"

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Raises a ValueError unless these tensors are float32, bfloat16 or float16."""
        for name in names:
            if (dtype := self._slices[name].get_dtype()) not in DTYPES.values():
                use = ", ".join(DTYPES)
                raise ValueError(f"tensor {name} has dtype {dtype}; save the model in {use}")

    def read(self, name: str, index: Sequence[slice] = ()) -> Shaped[np.ndarray, "*shape"]:
        """A tensor, or the part of it that a slice (of step 1) for each leading axis selects."""
        return self._slices[name][tuple(index)]


def read_index(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor, by the index of a sharded model."""
    files = read_json(folder / INDEX, "copy it again", ["weight_map"])["weight_map"]
    for file in files.values() if files and isinstance(files, dict) else [files]:
        if not isinstance(file, str) or file != os.path.basename(file) or len(file) > 200:
            raise ValueError(f"{folder / INDEX} names {file!r:.80}, no file of its folder")
    return files


def no_weights(where: object, names: Iterable[str]) -> FileNotFoundError:
    """What to raise where no safetensors are, with the way out that the files there suggest."""
    names, advice = set(names), ""
    suffixes = {Path(name).suffix for name in names}
    if ADAPTER_CONFIG in names:
        advice = " but a PEFT adapter: port_weights.py import FOLDER DESTINATION --base=MODEL"
    elif ".gguf" in suffixes:
        advice = "; download one of its GGUF files and name that file"
    elif ".bin" in suffixes:
        advice = "; .bin files are pickles and may run code: save the model as safetensors first"
    return FileNotFoundError(f"{where} holds neither {SINGLE} nor {INDEX}{advice}")


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        check_no_pointer(path)
        why = f"{path.stat().st_size} bytes: {error}"
        raise ValueError(f"{path} is truncated or corrupt ({why}); copy it again") from error


def check_no_pointer(path: Path) -> None:
    """Raises a ValueError for a git-lfs pointer in the place of a file."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer; run `git lfs pull` or download it")
