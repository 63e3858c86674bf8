"""GGUF files for llama.cpp and what is built on it: written here, read in gguf_reader.py.

A Mistral model is written as llama.cpp's architecture `llama`, which has no sliding window: the
context is capped at the window instead, within which the two are the same function.

llama.cpp rotates adjacent pairs of a head's coordinates (RoPE as in Su et al. 2021,
arXiv:2104.09864), where Hugging Face and this project rotate its two halves: pair i of a head is
in rows (2i, 2i+1) of the file's query and key matrices, in (i, i + H/2) of ours.

A rule that splits a text which is not in `PRE_TOKENIZERS` is refused: it would give wrong ids.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Float

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data import tokenizer_files as files
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import Vocabulary
from zephyr_jax.models.parameters import count_params
from zephyr_jax.types import Params
from zephyr_jax.weights import huggingface
from zephyr_jax.weights.exports import GGUF_KEY, check_card, check_tokenizer, end_ids, new_export
from zephyr_jax.weights.layouts import Layout, check_finite
from zephyr_jax.weights.safetensors import check_dtype

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
# Fields of the configuration -> keys of the file, which begin with "llama."
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
KEPT = ("max_position_embeddings", "sliding_window", "initializer_range", "dtype")
ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
# name in GGUF -> the pre-tokenizers of tokenizer.json, and its flag ignore_merges
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([LEVEL], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, LEVEL], False),
    "llama-bpe": ([_SPLIT, LEVEL | {"use_regex": False}], True),
}
OTHER_ENDS = ("eot", "eom")  # next to eos, of a turn and of a message; each ends a reply


def permute(rows: Float[np.ndarray, "N D"], head_dim: int) -> Float[np.ndarray, "N D"]:
    """Rows of whole heads, from halves to adjacent pairs: `0 1 2 3 -> 0 2 1 3`."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: Float[np.ndarray, "N D"], head_dim: int) -> Float[np.ndarray, "N D"]:
    """Rows of whole heads, from adjacent pairs to halves: the inverse of `permute`."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def gguf_layout(cfg: MistralConfig) -> Layout:
    """Hugging Face's layout under the names of the package `gguf`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)

    def rename(theirs: str) -> str:
        name = names.get_name(theirs.format(0), try_suffixes=(".weight",))
        return str(name).replace("blk.0.", "blk.{}.")

    return Layout.of(cfg, [x._replace(theirs=rename(x.theirs)) for x in huggingface.TABLE])


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
    `exports.CARD_FIELDS`; all else is as in `export_hf`.
    """
    check_dtype(dtype, DTYPES)
    card = card or {}
    check_card(card)
    layout = gguf_layout(cfg)
    tensors = layout.write(params, "float32")
    path, size = Path(path), gguf.size_label(count_params(cfg), 0, 0, 0)
    name = card.get("name") or path.absolute().name.removesuffix("-GGUF").removesuffix(".gguf")
    if path.suffix != ".gguf" or path.is_dir():
        path /= gguf.naming_convention(name, None, None, None, size, DTYPES[dtype]) + ".gguf"
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return path
    bits = {"float32": 32, "q8_0": 8.5}.get(dtype, 16)
    with (
        new_export(path, overwrite, int(count_params(cfg) * bits / 8)) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, "llama")) as writer,
    ):
        writer.add_name(name)
        writer.add_size_label(size)
        _add_metadata(writer, cfg, dtype, card)
        add_tokenizer(writer, cfg, tok)
        _write_tensors(writer, layout, dtype, tensors)
    return path


def _add_metadata(writer: Any, cfg: MistralConfig, dtype: str, card: dict[str, Any]) -> None:
    context, window = cfg.max_position_embeddings, cfg.sliding_window
    if window is not None and window < context:
        context, why = window, "which llama.cpp lacks for this architecture"
        logging.warning("context_length is the sliding window, %d, %s", context, why)
    writer.add_type("model")
    names = {"summary": "description", "license": "license", "language": "languages"}
    for field in filter(card.get, names):
        getattr(writer, f"add_{names[field]}")(card[field])
    if card.get("lineage"):
        writer.add_array("zephyr_jax.lineage", card["lineage"])
    writer.add_tags(["zephyr_jax", "text-generation", *card.get("tags", ())])
    kind = "ALL_F32" if dtype == "float32" else f"MOSTLY_{DTYPES[dtype]}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(GGUF_KEY, json.dumps({key: getattr(cfg, key) for key in KEPT}))
    numbers = {key: getattr(cfg, field) for field, key in KEYS.items()}
    numbers |= {"context_length": context, "vocab_size": cfg.vocab_size}
    numbers |= dict.fromkeys(("attention.value_length", "rope.dimension_count"), cfg.head_dim)
    for key, number in numbers.items():
        add = writer.add_float32 if isinstance(number, float) else writer.add_uint32
        add(f"llama.{key}", number)


def _write_tensors(
    writer: Any, layout: Layout, dtype: str, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    kinds = {}
    for name, shape in layout.shapes.items():
        kind = "F32" if len(shape) == 1 else DTYPES[dtype]
        if kind == "Q8_0" and shape[-1] % 32:
            kind = "F16"
        kinds[name] = gguf.GGMLQuantizationType[kind]
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kinds[name]))
        # The shape is that of the numbers: the writer derives it from bytes for uint8 only.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in tensors:
        if ROTATED.fullmatch(name):
            array = permute(array, layout.sizes["H"])
        with np.errstate(over="ignore"):
            stored = gguf.quantize(np.ascontiguousarray(array), kinds[name])
        check_finite(name, stored)
        writer.write_tensor_data(stored)
    writer.flush()


def add_tokenizer(writer: Any, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Adds tokenizer and chat template to a `gguf.GGUFWriter`; further ids become `[PADi]`."""
    check_tokenizer(cfg, tok)
    pre, adds_bos, template, merges = None, True, CHAT_TEMPLATE, []
    if isinstance(tok, SentencePieceTokenizer):
        vocabulary = tok.vocabulary
    else:
        assert isinstance(tok, JsonTokenizer)
        vocabulary, pre, merges = _from_json(tok)
        template = tok.chat_template
        listed = tok.files.object(files.CONFIG_NAME).get("add_bos_token")
        original = tokenizers.Tokenizer.from_str(tok.files[files.JSON_NAME].decode())
        adds_bos = bool(listed) or original.encode("a").ids[:1] == [tok.bos_id]
    unused = range(len(vocabulary.tokens), cfg.vocab_size)
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*vocabulary.types, *(files.UNUSED for _ in unused)])
    if pre:
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores([*vocabulary.scores, *(0.0 for _ in unused)])
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for name in ("bos", "eos", "unk", "pad"):
        if (token := tok.tokens.get(f"{name}_token", "")) in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    ends = [i for i in end_ids(cfg, tok) if i != tok.eos_id]
    for name, token in zip(OTHER_ENDS, ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    if unwritten := ends[len(OTHER_ENDS) :]:
        logging.warning("a GGUF file has no room for the tokens %s, which end a text", unwritten)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(pre is None)
    if template:
        writer.add_chat_template(template)


def _from_json(tok: JsonTokenizer) -> tuple[Vocabulary, str | None, list[str]]:
    """The entries of a tokenizer.json; if it is BPE over bytes, the splitting rule and merges."""
    data = tok.files.tokenizer_object()
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model.get("type") != "BPE":
        raise ValueError(f"{tok.source} is of the kind {model.get('type')!r}; GGUF takes only BPE")
    if strips := [t["content"] for t in added.values() if t.get("lstrip") or t.get("rstrip")]:
        logging.warning("llama.cpp keeps the blanks around %s, which are dropped here", strips)
    entries = {i: (text, files.NORMAL) for text, i in model["vocab"].items()}
    for i, token in added.items():
        entries[i] = token["content"], files.CONTROL if token["special"] else files.USER_DEFINED
    rows = [entries.get(i, (f"[PAD{i}]", files.UNUSED)) for i in range(tok.vocab_size)]
    vocabulary = Vocabulary([row[0] for row in rows], [row[1] for row in rows], [0.0] * len(rows))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _with_scores(tok, data, vocabulary, merges), None, []
    pre = data.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    steps = [step | {"trim_offsets": True} if "trim_offsets" in step else step for step in steps]
    for name, rule in PRE_TOKENIZERS.items():
        if (steps, bool(model.get("ignore_merges"))) == rule and not data.get("normalizer"):
            return vocabulary, name, [" ".join(pair) for pair in merges]
    raise ValueError(
        f"{tok.source} splits text by a rule that has no supported name in GGUF (normalizer "
        f"{data.get('normalizer')}, pre_tokenizer {pre}); supported are {', '.join(PRE_TOKENIZERS)}"
    )


def _with_scores(
    tok: JsonTokenizer, data: dict, vocabulary: Vocabulary, merges: list[list[str]]
) -> Vocabulary:
    """The entries of a tokenizer.json made from SentencePiece; scores are ranks of first merges."""
    made = ["".join(pair) for pair in merges]
    ranks = {token: rank for rank, token in reversed([*enumerate(made)])}
    kinds = {tok.tokens.get("unk_token", data["model"].get("unk_token")): files.UNKNOWN}
    kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), files.BYTE)
    types = [kinds.get(token, kind) for token, kind in zip(*vocabulary[:2], strict=True)]
    scores = [-float(ranks.get(token, len(merges))) for token in vocabulary.tokens]
    out = Vocabulary(vocabulary.tokens, types, scores)
    again = out.merges()
    same = ["".join(pair) for pair in again] == made and sorted(again) == sorted(map(list, merges))
    if not same or not any(data | form == data for form in (files.EVERYWHERE, files.REWRITTEN)):
        raise ValueError(
            f"{tok.source} has byte fallback, but is not what SentencePiece does (its normalizer, "
            "pre_tokenizer or order of merges), so GGUF cannot express it"
        )
    return out
