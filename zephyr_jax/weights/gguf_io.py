"""GGUF files on disk: a reader of metadata and of dequantized slices.

The format and its quantizations are the package `gguf`'s. A model whose `general.architecture` is
llama rotates adjacent pairs of a head's coordinates (RoPE as in Su et al. 2021, arXiv:2104.09864),
where Hugging Face and this project rotate its two halves. So the rows of the query and key matrices
are in another order in the file: pair i of a head is (2i, 2i+1) there, (i, i + H/2) here.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from zephyr_jax.weights.safetensors import check_no_pointer

ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")


def library() -> Any:
    """The package `gguf`.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GGUF files need one more package; install it with: pip install 'zephyr_jax[gguf]'"
        ) from error


def permute(rows: Float[np.ndarray, "N D"], head_dim: int) -> Float[np.ndarray, "N D"]:
    """Rows of whole heads, from halves to adjacent pairs: `0 1 2 3 -> 0 2 1 3`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: Float[np.ndarray, "N D"], head_dim: int) -> Float[np.ndarray, "N D"]:
    """Rows of whole heads, from adjacent pairs to halves: the inverse of `permute`."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


class GgufReader:
    """The metadata and the tensors of one GGUF file, which is memory-mapped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no GGUF file, damaged, big-endian, or one part of several.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist; name a .gguf file")
        self._gguf = library()
        self._file = _open(self._gguf, self.path)
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
        parts = self.value("split.count", 0)
        if parts > 1:
            raise ValueError(
                f"{path} is one of {parts} parts; join them first (llama.cpp: "
                "llama-gguf-split --merge)"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """A key's value as Python has it, or `default` where the file lacks it."""
        field = self._file.get_field(key)
        return default if field is None else field.contents()

    def required(self, key: str) -> Any:
        """A key's value; raises a ValueError if the file lacks it."""
        value = self.value(key)
        if value is None:
            raise ValueError(f"{self.path} lacks {key}; convert the model to GGUF again")
        return value

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, the slowest axis first (GGUF lists the fastest first)."""
        return {name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()}

    def read(self, name: str, index: Sequence[slice] = ()) -> Float[np.ndarray, "*shape"]:
        """A tensor in float32, or the part that a slice for each leading axis selects.

        Queries and keys come in halves; of these, whole heads must be selected.

        Raises:
            ValueError: if it is of a type that `gguf` cannot dequantize.
        """
        tensor = self._tensors[name]
        rows = tensor.data[index[0]] if index else tensor.data
        try:
            array = self._gguf.dequantize(np.ascontiguousarray(rows), tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} has a tensor of a type that cannot be read: "
                f"{tensor.tensor_type.name} ({name}); take the F16, Q8_0 or Q4_K_M of this model"
            ) from error
        if ROTATED.fullmatch(name):
            array = unpermute(array, self.head_dim)
        return array[(slice(None), *index[1:])]

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        if width := self.value("llama.attention.key_length"):
            return int(width)
        heads = self.required("llama.attention.head_count")
        return int(self.required("llama.embedding_length") // heads)


def _open(gguf: Any, path: Path) -> Any:
    check_no_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ValueError(f"{path} is no GGUF file ({size} bytes, beginning {start!r})")
    try:
        file = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({size} bytes: {error}); copy or download it again"
        ) from error
    if file.endianess == gguf.GGUFEndian.BIG:
        raise ValueError(f"{path} is big-endian; take the little-endian file of this model")
    return file
