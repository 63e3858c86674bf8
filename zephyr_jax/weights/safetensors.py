"""Safetensors files on disk: a writer that holds one tensor at a time, a reader of single slices.

The writer puts the header first and the tensors behind it as they come; nothing stands under a
final name before it is complete and synced. Names and layouts of models are not known here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
MAX_SHARD_BYTES = 5_000_000_000

# The name of each dtype in the file, by its name everywhere else.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# jax brings NumPy its bfloat16, without which safetensors cannot read any.
_NUMPY: dict[str, np.dtype] = {label: jnp.dtype(name) for name, label in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Dtype (float32, bfloat16 or float16) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * _NUMPY[DTYPES[self.dtype]].itemsize


def plan_shards(
    specs: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, TensorSpec]]:
    """File name -> tensors, in the order given; a tensor above the limit has a file of its own.

    Raises:
        ValueError: if the limit is not positive, or a dtype is none of the three.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise ValueError(f"dtype {spec.dtype!r} of {name}: use one of {', '.join(DTYPES)}")
        if shards[-1] and used + spec.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_safetensors(
    folder: str | os.PathLike[str],
    specs: dict[str, TensorSpec],
    tensors: Iterable[tuple[str, Shaped[np.ndarray, "*shape"]]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> list[str]:
    """Writes tensors as one file, or as shards with an index; the names of the files.

    Each tensor is taken from `tensors` when its turn in `specs` has come, and may be forgotten by
    the caller when the next is asked for. Each file is renamed into place when it is whole, the
    index last.

    Args:
        folder: is created.
        specs: what will come, in this order.
        tensors: (name, array) pairs, in the order of `specs`.
        max_shard_bytes: of tensors in a file.
        metadata: goes into every file's header, beside the customary `format`.

    Raises:
        ValueError: if a tensor is not the one that `specs` announced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(specs, max_shard_bytes)
    source = iter(tensors)
    for file, shard in shards.items():
        _write_file(folder / file, shard, source, {"format": "pt"} | (metadata or {}))
    files = list(shards)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_size": sum(spec.nbytes for spec in specs.values()),
                "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
            },
            "weight_map": {name: file for file, shard in shards.items() for name in shard},
        }
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        files.append(INDEX)
    return files


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file beside its final name, syncs it and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


_NOTHING: tuple[str, Any] = ("nothing", None)


def _write_file(
    path: Path,
    shard: dict[str, TensorSpec],
    source: Iterator[tuple[str, Any]],
    meta: dict[str, str],
) -> None:
    header: dict[str, Any] = {"__metadata__": meta}
    end = 0
    for name, spec in shard.items():
        start, end = end, end + spec.nbytes
        header[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors are aligned, so that files can be mapped
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name, spec in shard.items():
                file.write(_bytes_of(name, spec, *next(source, _NOTHING)).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes_of(name: str, spec: TensorSpec, got: str, array: Any) -> np.ndarray:
    dtype = _NUMPY[DTYPES[spec.dtype]]
    if got != name or array.shape != spec.shape or array.dtype != dtype:
        what = "" if array is None else f" {array.dtype} {array.shape}"
        raise ValueError(f"expected tensor {name} {spec.dtype} {spec.shape}, got {got}{what}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class SafetensorsReader:
    """The tensors of a folder (one file, or shards with an index) or of one file.

    Only headers are read until a tensor, or a slice of one, is asked for. A context manager.

    Raises:
        FileNotFoundError: if there are no safetensors, or the index names files that are missing.
        ValueError: if a file is truncated or corrupt, or the index and the files disagree.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        folder, weight_map = (path.parent, None) if path.is_file() else _find_files(path)
        files = (
            set(weight_map.values()) if weight_map else {path.name if path.is_file() else SINGLE}
        )
        with contextlib.ExitStack() as stack:
            handles = {file: stack.enter_context(_open(folder / file)) for file in sorted(files)}
            inside = {file: set(handle.keys()) for file, handle in handles.items()}
            if weight_map is None:
                weight_map = {name: file for file, names in inside.items() for name in names}
            lost = [f"{name} ({f})" for name, f in weight_map.items() if name not in inside[f]]
            if lost:
                raise ValueError(
                    f"the index of {folder} names tensors that their files lack: "
                    f"{', '.join(lost)}; copy the folder again"
                )
            self._stack = stack.pop_all()
        self._handles = {name: handles[file] for name, file in sorted(weight_map.items())}

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
        view = self._handles[name].get_slice(name)
        for dtype, label in DTYPES.items():
            if view.get_dtype() == label:
                return TensorSpec(dtype, tuple(view.get_shape()))
        raise ValueError(
            f"tensor {name} has dtype {view.get_dtype()}; only {', '.join(DTYPES)} can be read "
            "(save the model in one of them; a quantized one has to be dequantized first)"
        )

    def read(self, name: str, index: Sequence[slice] = ()) -> Shaped[np.ndarray, "*shape"]:
        """A tensor, or the part of it that a slice (of step 1) for each leading axis selects."""
        handle = self._handles[name]
        return handle.get_slice(name)[tuple(index)] if index else handle.get_tensor(name)


def _find_files(folder: Path) -> tuple[Path, dict[str, str] | None]:
    """The folder and its index's map from tensors to files; a single file has no map."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a folder nor a safetensors file")
    # In the order of transformers, which prefers a single file to an index beside it.
    if (folder / SINGLE).is_file():
        return folder, None
    if (folder / INDEX).is_file():
        weight_map = read_index(folder)
        missing = sorted({f for f in weight_map.values() if not (folder / f).is_file()})
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}, which {INDEX} names; copy or download "
                "them again"
            )
        return folder, weight_map
    raise no_weights(folder, [path.name for path in folder.iterdir()])


def read_index(folder: Path) -> dict[str, str]:
    """Which file holds each tensor, by the index of a sharded model.

    Raises:
        ValueError: if the index is none.
    """
    try:
        found = dict(json.loads((folder / INDEX).read_bytes())["weight_map"])
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is no safetensors index; copy it again") from error
    return found


def no_weights(where: object, names: Iterable[str]) -> FileNotFoundError:
    """What to raise where no safetensors are, with the way out that the files there suggest."""
    names = set(names)
    kinds = {Path(name).suffix for name in names}
    said = f"{where} holds neither {SINGLE} nor {INDEX}"
    if ADAPTER_CONFIG in names:
        said = (
            f"{where} holds a PEFT adapter, which is no model without its base; merge them with "
            "port_weights.py import FOLDER DESTINATION --base=MODEL"
        )
    elif ".gguf" in kinds:
        said += "; download one of its GGUF files and name that file"
    elif ".bin" in kinds:
        said = (
            f"{where} holds only .bin files, which are pickles and may run code; save the model "
            "as safetensors first (transformers: model.save_pretrained(FOLDER))"
        )
    return FileNotFoundError(said)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        what = (
            "is a git-lfs pointer, not the weights; run `git lfs pull` or download the file"
            if pointer
            else f"is truncated or corrupt ({path.stat().st_size} bytes: {error}); copy it again"
        )
        raise ValueError(f"{path} {what}") from error
