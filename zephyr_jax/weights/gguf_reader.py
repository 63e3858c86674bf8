"""GGUF files, read, of every quantization that the package `gguf` can undo; gguf.py writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data import tokenizer_files as files
from zephyr_jax.data.text.chat import renders_as_zephyr
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, reading
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.types import Params
from zephyr_jax.weights import gguf as tables
from zephyr_jax.weights.exports import GGUF_KEY
from zephyr_jax.weights.layouts import check_tensors
from zephyr_jax.weights.safetensors import check_no_pointer


def load_gguf(
    path: str | os.PathLike[str], *, dtype: str | None = "float32"
) -> tuple[MistralConfig, Params, Tokenizer]:
    """The configuration, the dequantized parameters and the tokenizer of a GGUF file.

    Parameters are sharded over the ambient mesh. `dtype` None is that of the computation, which is
    float32 unless an export of ours says otherwise.
    """
    reader = GgufReader(path)
    with reading(path):
        _check_features(reader)
        tok = read_tokenizer(reader)
        cfg = _read_config(reader, tok)
        layout = tables.gguf_layout(cfg)
        check_tensors(layout.shapes, reader.shapes, "tensors and metadata")
    return cfg, layout.read(reader, dtype or cfg.dtype, param_shardings(cfg)), tok


class _Bytes(np.memmap):
    """Bytes that end where the file ends; the package `gguf` would count on beyond."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and (index.stop or 0) > len(self):
            raise ValueError("a count or a length in it leads beyond its end; download it again")
        return super().__getitem__(index)


class _File(gguf.GGUFReader):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.view(_Bytes) if name == "data" else value)


class GgufReader:
    """The metadata and the tensors of one GGUF file, which is memory-mapped."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist; name a .gguf file")
        check_no_pointer(self.path)
        with reading(f"{path} ({self.path.stat().st_size} bytes)"):
            self._file = _File(self.path)
            if self._file.endianess == gguf.GGUFEndian.BIG:
                raise ValueError("it is big-endian; take the little-endian file of this model")
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}

    @property
    def dtype(self) -> str:
        """What holds the matrices: a key of tables.DTYPES; float16 for coarser types than these."""
        kinds = {x.tensor_type.name for x in self._tensors.values() if len(x.shape) > 1}
        plain = {theirs: ours for ours, theirs in tables.DTYPES.items() if ours != "q8_0"}
        if quantized := kinds - plain.keys():
            return "q8_0" if quantized == {"Q8_0"} else "float16"
        return plain[kinds.pop()] if len(kinds) == 1 else "float32"

    def value(self, key: str, *default: Any) -> Any:
        """A key's value, or `default`; without one a ValueError if the file lacks the key."""
        field = self._file.get_field(key)
        if field is None and not default:
            raise ValueError(f"it lacks {key}; convert the model to GGUF again")
        return default[0] if field is None else field.contents()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, the slowest axis first (GGUF lists the fastest first)."""
        return {name: tuple(map(int, x.shape[::-1])) for name, x in self._tensors.items()}

    def read(self, name: str, index: Sequence[slice] = ()) -> Float[np.ndarray, "*shape"]:
        """A tensor in float32, or a part by slices of leading axes; queries and keys by heads."""
        tensor = self._tensors[name]
        rows = tensor.data[index[0]] if index else tensor.data
        try:
            array = gguf.dequantize(np.ascontiguousarray(rows), tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} has a tensor of type {tensor.tensor_type.name} ({name}), which "
                "cannot be read; take the F16, Q8_0 or Q4_K_M of this model"
            ) from error
        if tables.ROTATED.fullmatch(name):
            array = tables.unpermute(array, self.head_dim)
        return array[(slice(None), *index[1:])]

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        width = self.value("llama.embedding_length") // self.value("llama.attention.head_count")
        return self.value("llama.attention.key_length", width)


def _check_features(reader: GgufReader) -> None:
    """Refuses another architecture, and metadata that makes another function of the tensors."""
    architecture = reader.value("general.architecture")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}; only 'llama' is supported")
    plain = {
        "general.type": "model",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.dimension_count": reader.head_dim,
        "llama.attention.value_length": reader.head_dim,
        "llama.expert_count": 0,
    }
    values = {key: reader.value(key, default) for key, default in plain.items()}
    if odd := [f"{key}={value}" for key, value in values.items() if value != plain[key]]:
        hint = "only plain Llama models (RoPE without scaling, no experts) can be imported"
        raise ValueError(f"it has what this architecture lacks: {', '.join(odd)}; {hint}")


def _read_config(reader: GgufReader, tok: Tokenizer) -> MistralConfig:
    heads = reader.value("llama.attention.head_count")
    defaults = {"num_key_value_heads": heads, "head_dim": reader.head_dim, "rope_theta": 10000.0}
    fields = {}
    for field, key in tables.KEYS.items():
        value = reader.value(f"llama.{key}", *(defaults[x] for x in [field] if x in defaults))
        # The shortest decimal that is this float32: 1e-5 for 9.999999747378752e-06
        fields[field] = float(str(np.float32(value))) if isinstance(value, float) else value
    if fields["num_hidden_layers"] > len(reader.shapes):
        raise ValueError(f"its {len(reader.shapes)} tensors are too few for its block_count")
    ends = [reader.value(f"tokenizer.ggml.{name}_token_id", -1) for name in tables.OTHER_ENDS]
    fields |= {
        "vocab_size": len(reader.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in reader.shapes,
        "sliding_window": None,  # llama.cpp reads none for this architecture
        "bos_token_id": tok.eos_id if tok.bos_id is None else tok.bos_id,
        "eos_token_id": tuple(dict.fromkeys((tok.eos_id, *(i for i in ends if i >= 0)))),
        "dtype": "float32",
    }
    ours = json.loads(reader.value(GGUF_KEY, "{}"))
    return MistralConfig(**fields | {key: ours[key] for key in tables.KEPT if key in ours})


def read_tokenizer(reader: GgufReader) -> Tokenizer:
    """The tokenizer that a file's metadata describes, with the file's chat template."""
    with reading(reader.path):
        kind = reader.value("tokenizer.ggml.model")
        tokens = reader.value("tokenizer.ggml.tokens")
        types = reader.value("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        # Unused tokens at the end only fill the matrices.
        n = max((i for i in range(len(tokens)) if types[i] != UNUSED), default=-1) + 1
        readers = {"llama": _read_sentencepiece, "gpt2": _read_bpe}
        if kind not in readers:
            raise _unsupported(f"tokenizer is of the kind {kind!r}", ", ".join(readers))
        return readers[kind](reader, tokens[:n], types[:n])


def _unsupported(what: str, supported: str) -> ValueError:
    hint = "import the model's Hugging Face folder instead"
    return ValueError(f"its {what}; supported are {supported}; {hint}")


def _named(reader: GgufReader) -> dict[str, int]:
    """The ids of `bos`, `eos`, `unk` and `pad`, of those that the file has."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {x: reader.value(f"tokenizer.ggml.{name}_token_id", -1) for name, x in names.items()}
    return {name: i for name, i in ids.items() if i >= 0}


def _read_sentencepiece(reader: GgufReader, tokens: list[str], types: list[int]) -> Tokenizer:
    if not reader.value("tokenizer.ggml.add_space_prefix", True):
        raise _unsupported("tokenizer puts no blank before a text", "only those that do")
    scores = reader.value("tokenizer.ggml.scores")
    ids = {"unk": 0, "bos": 1, "eos": 2} | _named(reader)
    ends = ids["bos"], ids["eos"]
    # Converters call the unknown token a control token, and what ends a text a user's; these are
    # control tokens to llama.cpp, too.
    types = [
        UNKNOWN if i == ids["unk"] else CONTROL if i in ends and kind == USER_DEFINED else kind
        for i, kind in enumerate(types)
    ]
    trainer: dict[str, Any] = {"model_type": 2, "byte_fallback": True, "vocab_size": len(tokens)}
    for name in ("unk", "bos", "eos"):
        trainer |= {f"{name}_id": ids[name], f"{name}_piece": tokens[ids[name]]}
    model = files.ModelProto(
        pieces=[{"piece": x, "type": types[i], "score": scores[i]} for i, x in enumerate(tokens)],
        trainer_spec=trainer,
        normalizer_spec={"name": "identity", "remove_extra_whitespaces": False},
    )
    tok = SentencePieceTokenizer(model.SerializeToString(deterministic=True), str(reader.path))
    template = reader.value("tokenizer.chat_template", "")
    if not template or renders_as_zephyr(template, tok.tokens, tok.tokens):
        return tok
    add_bos = reader.value("tokenizer.ggml.add_bos_token", True)
    data = files.tokenizer_json(tok.vocabulary, tokens[ids["bos"]] if add_bos else None)
    return _json_tokenizer(reader, data, tokens, add_bos)


def _read_bpe(reader: GgufReader, tokens: list[str], types: list[int]) -> Tokenizer:
    name = reader.value("tokenizer.ggml.pre", "default")
    if name not in tables.PRE_TOKENIZERS:
        what = f"tokenizer splits text by the rule {name!r} (tokenizer.ggml.pre)"
        raise _unsupported(what, ", ".join(tables.PRE_TOKENIZERS))
    pre, ignore_merges = tables.PRE_TOKENIZERS[name]
    ids = {token: i for i, token in enumerate(tokens)}
    add_bos = reader.value("tokenizer.ggml.add_bos_token", name == "llama-bpe")
    begin = tokens[_named(reader)["bos"]] if add_bos else None
    model = {"type": "BPE", "ignore_merges": ignore_merges, "vocab": ids}
    model["merges"] = [pair.split(" ") for pair in reader.value("tokenizer.ggml.merges")]
    data = {
        "version": "1.0",
        "added_tokens": [
            files.added_token(token, i, types[i] != USER_DEFINED)
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "pre_tokenizer": pre[0] if len(pre) == 1 else {"type": "Sequence", "pretokenizers": pre},
        "post_processor": files.surround(begin, ids),
        "decoder": tables.LEVEL | {"add_prefix_space": True},
        "model": model,
    }
    return _json_tokenizer(reader, data, tokens, add_bos)


def _json_tokenizer(
    reader: GgufReader, data: dict[str, Any], tokens: list[str], add_bos: bool
) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json, with special tokens and chat template from the file."""
    config = {
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        **{f"{name}_token": tokens[i] for name, i in _named(reader).items()},
        "model_max_length": reader.value("llama.context_length"),
        "chat_template": reader.value("tokenizer.chat_template", ""),
    }
    return JsonTokenizer(files.encoded(data, config), str(reader.path))
