"""GGUF in and out, for llama.cpp and what is built on it: one table of tensors, both directions.

A Mistral model is written as llama.cpp's architecture `llama`, which has no sliding window: the
context is capped at the window instead, within which the two are the same function. Read back are
files of that architecture in every quantization that the package `gguf` can undo.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.parameters import count_params, param_shardings
from zephyr_jax.types import Params
from zephyr_jax.weights import huggingface
from zephyr_jax.weights.exports import GGUF_KEY, check_card, new_export
from zephyr_jax.weights.gguf_io import ROTATED, GgufReader, library, permute
from zephyr_jax.weights.gguf_tokenizer import add_tokenizer, read_tokenizer
from zephyr_jax.weights.layouts import Layout, check_finite, check_tensors
from zephyr_jax.weights.safetensors import check_dtype

# Of an export: the type of the matrices, and what `general.file_type` calls the file.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_KEPT = ("max_position_embeddings", "sliding_window", "initializer_range", "dtype")
# Metadata that makes another function of the same tensors, with the value that does not.
_PLAIN = {
    "general.type": "model",
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scale_linear": 1.0,
    "llama.expert_count": 0,
    "llama.attention.causal": True,
    "llama.attention.clamp_kqv": 0.0,
}


def gguf_layout(cfg: MistralConfig) -> Layout:
    """Hugging Face's layout under the names of the package `gguf`.

    The rows of queries and keys are in another order, which `gguf_io` undoes.
    """
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
) -> Path:
    """Writes one GGUF file that llama.cpp, LM Studio and text-generation-webui load; its path.

    One tensor at a time is in host memory. On several processes all must call it; the first
    writes. The file appears when it is complete, and replaces an earlier export.

    Args:
        cfg: the architecture.
        params: the tree of `init_params`, of jax or NumPy arrays.
        tok: the tokenizer that the model was trained with.
        path: a name that ends in .gguf, or a folder, in which the file gets the name that LM Studio
            expects: `NAME-SIZE-TYPE.gguf`.
        dtype: of the matrices: float32, float16, bfloat16, or q8_0 (8 bits and a scale for every
            32 numbers; rows that are no multiple of 32 become float16). Norms stay float32.
        card: fields of `exports.CARD_FIELDS`; name, summary, license, language, tags and lineage go
            into the metadata.

    Raises:
        FileExistsError: if something other than an export of ours is at the path.
        ModuleNotFoundError: if the package `gguf` is not installed.
        ValueError: if parameters, tokenizer or card do not fit, or float16 cannot hold a weight.
    """
    check_dtype(dtype, DTYPES)
    card = card or {}
    check_card(card)
    huggingface.check_params(cfg, params)
    layout = gguf_layout(cfg)
    tensors = layout.write(params, "float32")
    path, name = _destination(Path(path), cfg, dtype, card)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return path
    with new_export(path) as temporary:
        writer = library().GGUFWriter(temporary, "llama")
        try:
            _add_metadata(writer, cfg, dtype, card, name)
            add_tokenizer(writer, cfg, tok)
            _write_tensors(writer, layout.shapes, dtype, tensors, cfg.head_dim)
        finally:
            writer.close()
    return path


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = "float32",
    shardings: Params | None = None,
) -> tuple[MistralConfig, Params, Tokenizer]:
    """The configuration, the dequantized parameters and the tokenizer of a GGUF file.

    Arrays are created with their sharding: each process dequantizes the rows of its own devices,
    one tensor at a time. The computation is in float32, unless an export of ours says otherwise.

    Args:
        path: a file of architecture llama (Llama, Mistral, SmolLM, TinyLlama).
        dtype: of the parameters; None: that of the computation.
        shardings: the tree of the parameters with a `jax.sharding.Sharding` for each; None: those
            of `param_shardings` on the ambient mesh.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the package `gguf`, or one that the tokenizer needs, is missing.
        ValueError: if it is no complete GGUF file, of another architecture, has a feature or a type
            that is not supported, or naming every tensor that is missing, unexpected, or of another
            shape.
    """
    reader = GgufReader(path)
    _check_features(reader)
    tok = read_tokenizer(reader)
    cfg = _read_config(reader, tok)
    layout = gguf_layout(cfg)
    check_tensors(layout.shapes, reader.shapes, f"{path}: tensors and metadata")
    params = layout.read(reader, dtype or cfg.dtype, shardings or param_shardings(cfg))
    return cfg, params, tok


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
            "context_length is the sliding window, %d, instead of %d: llama.cpp has no window for "
            "this architecture, and beyond it another function",
            context,
            cfg.max_position_embeddings,
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count_params(cfg), 0, 0, 0))
    adds = {"summary": writer.add_description, "license": writer.add_license}
    adds["language"] = writer.add_languages
    for key, add in adds.items():
        if card.get(key):
            add(card[key])
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
    writer: Any,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterator[tuple[str, np.ndarray]],
    head_dim: int,
) -> None:
    """The header with every tensor's place, then the tensors as they come."""
    gguf, kinds = library(), {}
    for name, shape in shapes.items():
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
        if ROTATED.fullmatch(name):
            array = permute(array, head_dim)
        with np.errstate(over="ignore"):
            stored = gguf.quantize(np.ascontiguousarray(array), kinds[name])
        check_finite(name, stored)
        writer.write_tensor_data(stored)
    writer.flush()


def _check_features(reader: GgufReader) -> None:
    """Refuses another architecture, and what this one has in llama.cpp beyond ours."""
    architecture = reader.required("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{reader.path} has the architecture {architecture!r}; only 'llama' is supported "
            "(Llama, Mistral, SmolLM, TinyLlama)"
        )
    values = {key: reader.value(key, plain) for key, plain in _PLAIN.items()}
    odd = [f"{key}={value}" for key, value in values.items() if value != _PLAIN[key]]
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if reader.value(key, reader.head_dim) != reader.head_dim:
            odd.append(f"{key}={reader.value(key)} where a head has {reader.head_dim}")
    odd += [n for n in reader.shapes if n == "rope_freqs.weight" or n.endswith((".bias", ".scale"))]
    if odd:
        raise ValueError(
            f"{reader.path} has what this architecture lacks: {', '.join(odd)}; only plain "
            "Llama models (RoPE without scaling, no biases, no experts) can be imported"
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
        "eos_token_id": tok.eos_id,
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
