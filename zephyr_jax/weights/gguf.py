"""GGUF in and out, for llama.cpp and what is built on it: one table of tensors, both directions.

A Mistral model is written as llama.cpp's architecture `llama`, which has no sliding window: the
context is capped at the window instead, within which the two are the same function. Every
quantization that the package `gguf` can undo is read.

llama.cpp rotates adjacent pairs of a head's coordinates (RoPE as in Su et al. 2021,
arXiv:2104.09864), where Hugging Face and this project rotate its two halves: pair i of a head is
in rows (2i, 2i+1) of the file's query and key matrices, in (i, i + H/2) of ours.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.parameters import count_params, param_shardings
from zephyr_jax.types import Params
from zephyr_jax.weights import huggingface
from zephyr_jax.weights.exports import GGUF_KEY, check_card, new_export
from zephyr_jax.weights.gguf_tokenizer import add_tokenizer, read_other_ends, read_tokenizer
from zephyr_jax.weights.layouts import Layout, check_finite, check_tensors
from zephyr_jax.weights.safetensors import check_dtype, check_no_pointer

# Of an export: the type of the matrices, and what `general.file_type` calls the file.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_KEPT = ("max_position_embeddings", "sliding_window", "initializer_range", "dtype")
_ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")


def library() -> Any:
    """The package `gguf`; a ModuleNotFoundError with the way to install it."""
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


def gguf_layout(cfg: MistralConfig) -> Layout:
    """Hugging Face's layout under the names of the package `gguf`."""
    names = library().get_tensor_name_map(library().MODEL_ARCH.LLAMA, 1)

    def rename(theirs: str) -> str:
        name = names.get_name(theirs.format(0), try_suffixes=(".weight",))
        return name.replace("blk.0.", "blk.{}.")

    table = [rule._replace(theirs=rename(rule.theirs)) for rule in huggingface.TABLE]
    return Layout.of(cfg, table)


def export_gguf(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    card: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes one GGUF file that llama.cpp, LM Studio and text-generation-webui load; its path.

    In a folder the file gets the name that LM Studio expects: `NAME-SIZE-TYPE.gguf`. The matrices
    are float32, float16, bfloat16, or q8_0 (8 bits and a scale for every 32 numbers; rows that are
    no multiple of 32 become float16); norms stay float32. `card` has fields of
    `exports.CARD_FIELDS`, of which recipe, data and metrics are left out. Memory, processes and
    errors are as of `export_hf`.
    """
    check_dtype(dtype, DTYPES)
    card = card or {}
    check_card(card)
    layout = gguf_layout(cfg)
    tensors = layout.write(params, "float32")
    path, name = _destination(Path(path), cfg, dtype, card)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return path
    with new_export(path, overwrite) as temporary:
        writer = library().GGUFWriter(temporary, "llama")
        with contextlib.closing(writer):
            _add_metadata(writer, cfg, dtype, card, name)
            add_tokenizer(writer, cfg, tok)
            _write_tensors(writer, layout, dtype, tensors)
    return path


def load_gguf(
    path: str | os.PathLike[str], *, dtype: str | None = "float32"
) -> tuple[MistralConfig, Params, Tokenizer]:
    """The configuration, the dequantized parameters and the tokenizer of a GGUF file.

    Parameters are sharded over the ambient mesh: each process dequantizes the rows of its own
    devices, one tensor at a time. `dtype` None is that of the computation, which is float32 unless
    an export of ours says otherwise. A ValueError names a feature or type that is not supported,
    or every tensor that does not fit.
    """
    reader = GgufReader(path)
    _check_features(reader)
    tok = read_tokenizer(reader)
    cfg = _read_config(reader, tok)
    layout = gguf_layout(cfg)
    check_tensors(layout.shapes, reader.shapes, f"{path}: tensors and metadata")
    return cfg, layout.read(reader, dtype or cfg.dtype, param_shardings(cfg)), tok


class GgufReader:
    """The metadata and the tensors of one GGUF file, which is memory-mapped."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist; name a .gguf file")
        self._gguf = library()
        check_no_pointer(self.path)
        try:
            self._file = self._gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{path} is no GGUF file, or truncated ({self.path.stat().st_size} bytes): {error}"
            ) from error
        if self._file.endianess == self._gguf.GGUFEndian.BIG:
            raise ValueError(f"{path} is big-endian; take the little-endian file of this model")
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}

    @property
    def dtype(self) -> str:
        """What holds the matrices: a key of DTYPES; float16 for coarser types than these."""
        kinds = {x.tensor_type.name for x in self._tensors.values() if len(x.shape) > 1}
        plain = {theirs: ours for ours, (theirs, _) in DTYPES.items() if ours != "q8_0"}
        if quantized := kinds - plain.keys():
            return "q8_0" if quantized == {"Q8_0"} else "float16"
        return plain[kinds.pop()] if len(kinds) == 1 else "float32"

    def value(self, key: str, default: Any = None) -> Any:
        """A key's value, or `default` where the file lacks it."""
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
        """
        tensor = self._tensors[name]
        rows = tensor.data[index[0]] if index else tensor.data
        try:
            array = self._gguf.dequantize(np.ascontiguousarray(rows), tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} has a tensor of type {tensor.tensor_type.name} ({name}), which "
                "cannot be read; take the F16, Q8_0 or Q4_K_M of this model"
            ) from error
        if _ROTATED.fullmatch(name):
            array = unpermute(array, self.head_dim)
        return array[(slice(None), *index[1:])]

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        if width := self.value("llama.attention.key_length"):
            return int(width)
        heads = self.required("llama.attention.head_count")
        return int(self.required("llama.embedding_length") // heads)


def _destination(
    path: Path, cfg: MistralConfig, dtype: str, card: dict[str, Any]
) -> tuple[Path, str]:
    """The file to write, and the name of the model."""
    if path.suffix == ".gguf" and not path.is_dir():
        return path, card.get("name") or path.stem
    name = card.get("name") or path.absolute().name.removesuffix("-GGUF")
    size = library().size_label(count_params(cfg), 0, 0, 0)
    file = library().naming_convention(name, None, None, None, size, DTYPES[dtype][0])
    return path / f"{file}.gguf", name


def _add_metadata(
    writer: Any, cfg: MistralConfig, dtype: str, card: dict[str, Any], name: str
) -> None:
    gguf, context = library(), cfg.max_position_embeddings
    if cfg.sliding_window is not None and cfg.sliding_window < context:
        context = cfg.sliding_window
        logging.warning(
            "context_length is the sliding window, %d, which llama.cpp lacks for this architecture",
            context,
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count_params(cfg), 0, 0, 0))
    adders = {"summary": writer.add_description, "license": writer.add_license}
    adders["language"] = writer.add_languages
    for field, add in adders.items():
        if card.get(field):
            add(card[field])
    if card.get("lineage"):
        writer.add_array("zephyr_jax.lineage", card["lineage"])
    writer.add_tags(["zephyr_jax", "text-generation", *card.get("tags", ())])
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(GGUF_KEY, json.dumps({key: getattr(cfg, key) for key in _KEPT}))
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(context)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)


def _write_tensors(
    writer: Any, layout: Layout, dtype: str, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Writes the header, then the tensors as they come."""
    gguf, kinds = library(), {}
    for name, shape in layout.shapes.items():
        kind = "F32" if len(shape) == 1 else DTYPES[dtype][0]
        if kind == "Q8_0" and shape[-1] % 32:
            kind = "F16"
        kinds[name] = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = math.prod(shape) // block * size
        # The shape is that of the numbers: the writer derives it from bytes for uint8 only.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in tensors:
        if _ROTATED.fullmatch(name):
            array = permute(array, layout.sizes["H"])
        with np.errstate(over="ignore"):
            stored = gguf.quantize(np.ascontiguousarray(array), kinds[name])
        check_finite(name, stored)
        writer.write_tensor_data(stored)
    writer.flush()


def _check_features(reader: GgufReader) -> None:
    """Refuses another architecture, and metadata that makes another function of the tensors."""
    architecture = reader.required("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{reader.path} has the architecture {architecture!r}; only 'llama' is supported "
            "(Llama, Mistral, SmolLM, TinyLlama)"
        )
    plain = {
        "general.type": "model",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.scale_linear": 1.0,
        "llama.rope.dimension_count": reader.head_dim,
        "llama.attention.value_length": reader.head_dim,
        "llama.attention.causal": True,
        "llama.attention.clamp_kqv": 0.0,
        "llama.expert_count": 0,
    }
    values = {key: reader.value(key, default) for key, default in plain.items()}
    if odd := [f"{key}={value}" for key, value in values.items() if value != plain[key]]:
        raise ValueError(
            f"{reader.path} has what this architecture lacks: {', '.join(odd)}; only plain "
            "Llama models (RoPE without scaling, no experts) can be imported"
        )


def _read_config(reader: GgufReader, tok: Tokenizer) -> MistralConfig:
    heads = reader.required("llama.attention.head_count")
    fields = {
        "vocab_size": len(reader.required("tokenizer.ggml.tokens")),
        "hidden_size": reader.required("llama.embedding_length"),
        "intermediate_size": reader.required("llama.feed_forward_length"),
        "num_hidden_layers": reader.required("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.value("llama.attention.head_count_kv", heads),
        "head_dim": reader.head_dim,
        "rms_norm_eps": _shortest(reader.required("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(reader.value("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in reader.shapes,
        "max_position_embeddings": reader.required("llama.context_length"),
        "sliding_window": None,  # llama.cpp reads none for this architecture
        "bos_token_id": tok.eos_id if tok.bos_id is None else tok.bos_id,
        "eos_token_id": tuple(dict.fromkeys((tok.eos_id, *read_other_ends(reader)))),
        "dtype": "float32",
    }
    ours = json.loads(reader.value(GGUF_KEY, "{}"))
    try:
        return MistralConfig(**fields | {key: ours[key] for key in _KEPT if key in ours})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{reader.path} describes no model: {error}") from error


def _shortest(number: float) -> float:
    """The shortest decimal that is this float32: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))
