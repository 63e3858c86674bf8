"""GGUF in and out, for llama.cpp and what is built on it: one table of tensors, both directions.

A Mistral model is written as llama.cpp's architecture `llama`, which has no sliding window: the
context is capped at the window instead, within which the two are the same function. Read back are
files of that architecture in every quantization that the package `gguf` can undo.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.parameters import count_params
from zephyr_jax.types import Params
from zephyr_jax.weights import huggingface
from zephyr_jax.weights.gguf_io import (
    OURS,
    GgufReader,
    check_replaceable,
    is_rotated,
    library,
    permute,
)
from zephyr_jax.weights.gguf_tokenizer import add_tokenizer, read_tokenizer
from zephyr_jax.weights.huggingface_files import CARD_FIELDS
from zephyr_jax.weights.tensor_check import check_tensors

_NAMES = {
    "embed": "token_embd",
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/attention/q": "blk.{}.attn_q",
    "layers/attention/k": "blk.{}.attn_k",
    "layers/attention/v": "blk.{}.attn_v",
    "layers/attention/o": "blk.{}.attn_output",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
# The layout of each matrix is Hugging Face's, but for the order of rows that gguf_io undoes.
TABLE = tuple(rule._replace(theirs=_NAMES[rule.ours] + ".weight") for rule in huggingface.TABLE)
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
    writes. The file appears when it is complete, in place of an earlier export if there is one.

    Args:
        cfg: the architecture.
        params: the tree of `init_params`, of jax or NumPy arrays.
        tok: the tokenizer that the model was trained with.
        path: a name that ends in .gguf, or a folder, in which the file is called as LM Studio
            expects it: `NAME-SIZE-TYPE.gguf`.
        dtype: of the matrices: float32, float16, bfloat16, or q8_0 (8 bits and a scale for every
            32 numbers; rows that are no multiple of 32 become float16). Norms stay float32.
        card: what the metadata tells, see `huggingface_files.CARD_FIELDS`: name, summary, license,
            language, tags and lineage have a place in it.

    Raises:
        FileExistsError: if something that is no export of ours stands at the path.
        ModuleNotFoundError: if the package `gguf` is not installed.
        ValueError: if parameters, tokenizer or card do not fit, or float16 cannot hold a weight.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    card = card or {}
    if unknown := sorted(set(card) - set(CARD_FIELDS)):
        raise ValueError(
            f"unknown fields of the model card: {', '.join(unknown)}; it has "
            f"{', '.join(CARD_FIELDS)}"
        )
    tensors = huggingface.hf_tensors(cfg, params, "float32", TABLE)
    path, name = _destination(path, cfg, dtype, card)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return path
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    writer = library().GGUFWriter(temporary, "llama")
    try:
        _add_metadata(writer, cfg, dtype, card, name)
        add_tokenizer(writer, cfg, tok)
        _write_tensors(writer, cfg, dtype, tensors)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = "float32",
    shardings: dict[str, Any] | None = None,
) -> tuple[MistralConfig, Params, Tokenizer]:
    """The configuration, the dequantized parameters and the tokenizer of a GGUF file.

    Arrays are born with their sharding: each process dequantizes the rows of its own devices, one
    tensor at a time. The computation is in float32, unless the file is an export that says more.

    Args:
        path: a file of architecture llama (Llama, Mistral, SmolLM, TinyLlama).
        dtype: of the parameters; None: that of the computation.
        shardings: the tree of the parameters with a `jax.sharding.Sharding` for each; None: what
            `param_shardings` says on the ambient mesh.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the package `gguf`, or one that the tokenizer needs, is missing.
        ValueError: if it is no whole GGUF file, of another architecture, has a feature or a type
            that is not supported, or naming every tensor that is missing, that has no place, or
            that has another shape.
    """
    reader = GgufReader(path)
    _check_features(reader)
    tok = read_tokenizer(reader)
    cfg = _read_config(reader, tok)
    wanted = {k: v.shape for k, v in huggingface.hf_specs(cfg, "float32", TABLE).items()}
    check_tensors(wanted, reader.shapes, f"{path}: tensors and metadata")
    reader.check_types()
    return cfg, huggingface.read_params(cfg, reader, dtype or cfg.dtype, shardings, TABLE), tok


def _destination(
    path: str | os.PathLike[str], cfg: MistralConfig, dtype: str, card: dict[str, Any]
) -> tuple[Path, str]:
    """The file to write, and the name of the model."""
    given = Path(path)
    if given.suffix == ".gguf" and not given.is_dir():
        return given, card.get("name") or given.stem
    name = card.get("name") or given.absolute().name.removesuffix("-GGUF")
    kind = DTYPES[dtype][0]
    file = library().naming_convention(name, None, None, None, _size_label(cfg), kind)
    return given / f"{file}.gguf", name


def _size_label(cfg: MistralConfig) -> str:
    return library().size_label(count_params(cfg), 0, 0, 0)


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
    writer.add_size_label(_size_label(cfg))
    for key, add in (
        ("summary", writer.add_description),
        ("license", writer.add_license),
        ("language", writer.add_languages),
        ("lineage", functools.partial(writer.add_array, "zephyr_jax.lineage")),
    ):
        if card.get(key):
            add(card[key])
    writer.add_tags(["zephyr_jax", "text-generation", *card.get("tags", ())])
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(OURS, json.dumps({key: getattr(cfg, key) for key in _KEPT}))
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
    writer: Any, cfg: MistralConfig, dtype: str, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """The header with every tensor's place, then the tensors as they come."""
    gguf, kinds = library(), {}
    for name, spec in huggingface.hf_specs(cfg, "float32", TABLE).items():
        kind = "F32" if len(spec.shape) == 1 else DTYPES[dtype][0]
        if kind == "Q8_0" and spec.shape[-1] % 32:
            kind = "F16"
        kinds[name] = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = math.prod(spec.shape) // block * size
        # The shape is that of the numbers: the writer derives it from bytes for uint8 only.
        writer.add_tensor_info(name, spec.shape, np.dtype(np.float32), nbytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in tensors:
        if is_rotated(name):
            array = permute(array, cfg.head_dim)
        with np.errstate(over="ignore"):
            stored = gguf.quantize(np.ascontiguousarray(array), kinds[name])
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise ValueError(f"{name} has weights above 65504, float16's largest; use bfloat16")
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
    found = {key: reader.value(key, plain) for key, plain in _PLAIN.items()}
    odd = [f"{key}={value}" for key, value in found.items() if value != _PLAIN[key]]
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
    read = {
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
    ours = json.loads(reader.value(OURS, "{}"))
    try:
        return MistralConfig(**read | {key: ours[key] for key in _KEPT if key in ours})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{reader.path} describes no model: {error}") from error


def _shortest(number: float) -> float:
    """The shortest decimal that is this float32: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))
