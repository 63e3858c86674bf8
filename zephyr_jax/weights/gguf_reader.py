"""GGUF files, read: metadata, tensors and tokenizers, of every quantization that `gguf` can undo.

What is in them is described in gguf.py, which writes them.
"""

from __future__ import annotations

import json
import math
import os
import struct
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

    Parameters are sharded over the ambient mesh: each process dequantizes the rows of its own
    devices, one tensor at a time. `dtype` None is that of the computation, which is float32 unless
    an export of ours says otherwise. A ValueError names a feature or type that is not supported,
    or every tensor that does not fit.
    """
    reader = GgufReader(path)
    with reading(path):
        _check_features(reader)
        tok = read_tokenizer(reader)
        cfg = _read_config(reader, tok)
        layout = tables.gguf_layout(cfg)
        check_tensors(layout.shapes, reader.shapes, "tensors and metadata")
    return cfg, layout.read(reader, dtype or cfg.dtype, param_shardings(cfg)), tok


class _Header:
    """Reads what is in the bytes of a GGUF file, one value after another."""

    kinds = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # numbers, as in `struct`
    string, array = 8, 9

    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + kinds, self.data, self.at)  # or it ends too early
        self.at += struct.calcsize("<" + kinds)
        return values

    def text(self) -> str:
        return self.numbers(f"{self.numbers('Q')[0]}s")[0].decode()

    def value(self) -> Any:
        """A value, which its type precedes; an array is a list."""
        (kind,) = self.numbers("I")
        if kind == self.string:
            return self.text()
        if kind != self.array:
            return self.numbers(self.kinds[kind])[0]
        kind, n = self.numbers("IQ")
        if kind == self.string:
            return [self.text() for _ in range(n)]
        return list(self.numbers(f"{n}{self.kinds[kind]}"))


class GgufReader:
    """The metadata and the tensors of one GGUF file, which is memory-mapped.

    Nothing is allocated for what a header claims and the file does not hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist; name a .gguf file")
        check_no_pointer(self.path)
        self._fields: dict[str, Any] = {}
        self._tensors: dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # the slowest axis first
        with reading(f"{path} ({self.path.stat().st_size} bytes)"):
            self._read_header(_Header(np.memmap(self.path, np.uint8, mode="r")))

    def _read_header(self, header: _Header) -> None:
        magic, version, n_tensors, n_keys = header.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic} and {version}, not with b'GGUF' and 2 or 3")
        infos: dict[str, tuple[int, ...]] = {}
        for table, n in ((self._fields, n_keys), (infos, n_tensors)):
            for _ in range(n):
                name = header.text()
                if name in table:
                    raise ValueError(f"{name} is in it twice")
                is_key = table is self._fields
                table[name] = (
                    header.value() if is_key else header.numbers(f"{header.numbers('I')[0]}QIQ")
                )
        block = self.value("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-header.at // block) * block
        for name, (*sizes, kind, offset) in infos.items():
            kind, shape = gguf.GGMLQuantizationType(kind), tuple(sizes[::-1])
            rows = gguf.quant_shape_to_byte_shape(shape, kind)
            data = header.data[start + offset :][: math.prod(rows)]
            if len(data) < math.prod(rows):
                raise ValueError(f"the tensor {name} {shape} reaches beyond its end")
            self.shapes[name], self._tensors[name] = shape, (kind, data.reshape(rows))

    @property
    def dtype(self) -> str:
        """What holds the matrices: a key of tables.DTYPES; float16 for coarser types than these."""
        kinds = {kind.name for kind, data in self._tensors.values() if data.ndim > 1}
        plain = {theirs: ours for ours, theirs in tables.DTYPES.items() if ours != "q8_0"}
        if quantized := kinds - plain.keys():
            return "q8_0" if quantized == {"Q8_0"} else "float16"
        return plain[kinds.pop()] if len(kinds) == 1 else "float32"

    def value(self, key: str, *default: Any) -> Any:
        """A key's value, or `default`; without one a ValueError if the file lacks the key."""
        if key not in self._fields and not default:
            raise ValueError(f"it lacks {key}; convert the model to GGUF again")
        return self._fields.get(key, *default)

    def read(self, name: str, index: Sequence[slice] = ()) -> Float[np.ndarray, "*shape"]:
        """A tensor in float32, or the part that a slice for each leading axis selects.

        Queries and keys come in halves; of these, whole heads must be selected.
        """
        kind, rows = self._tensors[name]
        try:
            whole = rows if rows.ndim == 1 or not index else rows[index[0]]
            array = gguf.dequantize(np.ascontiguousarray(whole), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} has a tensor of type {kind.name} ({name}), which cannot be read; "
                "take the F16, Q8_0 or Q4_K_M of this model"
            ) from error
        if tables.ROTATED.fullmatch(name):
            array = tables.unpermute(array, self.head_dim)
        return array[tuple(index) if array.ndim == 1 else (slice(None), *index[1:])]

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        width = self.value("llama.embedding_length") // self.value("llama.attention.head_count")
        return self.value("llama.attention.key_length", width)


def _check_features(reader: GgufReader) -> None:
    """Refuses another architecture, and metadata that makes another function of the tensors."""
    architecture = reader.value("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"its architecture is {architecture!r}; only 'llama' is supported (Llama, Mistral, "
            "SmolLM, TinyLlama)"
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
            f"it has what this architecture lacks: {', '.join(odd)}; only plain Llama models "
            "(RoPE without scaling, no experts) can be imported"
        )


def _read_config(reader: GgufReader, tok: Tokenizer) -> MistralConfig:
    defaults = {
        "num_key_value_heads": reader.value("llama.attention.head_count"),
        "head_dim": reader.head_dim,
        "rope_theta": 10000.0,
    }
    fields = {
        field: reader.value(f"llama.{key}", *([defaults[field]] if field in defaults else ()))
        for field, key in tables.KEYS.items()
    }
    fields |= {field: _shortest(x) for field, x in fields.items() if isinstance(x, float)}
    if fields["num_hidden_layers"] > len(reader.shapes):
        raise ValueError(
            f"it claims {fields['num_hidden_layers']} layers and holds {len(reader.shapes)} "
            "tensors; convert the model to GGUF again"
        )
    fields |= {
        "vocab_size": len(reader.value("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in reader.shapes,
        "sliding_window": None,  # llama.cpp reads none for this architecture
        "bos_token_id": tok.eos_id if tok.bos_id is None else tok.bos_id,
        "eos_token_id": tuple(dict.fromkeys((tok.eos_id, *read_other_ends(reader)))),
        "dtype": "float32",
    }
    ours = json.loads(reader.value(GGUF_KEY, "{}"))
    return MistralConfig(**fields | {key: ours[key] for key in tables.KEPT if key in ours})


def _shortest(number: float) -> float:
    """The shortest decimal that is this float32: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))


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


def read_other_ends(reader: GgufReader) -> list[int]:
    """The ids of tokens that end a text, other than eos."""
    ids = [reader.value(f"tokenizer.ggml.{name}_token_id", -1) for name in tables.OTHER_ENDS]
    return [i for i in ids if i >= 0]


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
    model = files.ModelProto(
        pieces=[
            {"piece": token, "type": types[i], "score": scores[i]} for i, token in enumerate(tokens)
        ],
        trainer_spec={
            "model_type": 2,  # BPE
            "vocab_size": len(tokens),
            "byte_fallback": True,
            "pad_id": -1,
            **{f"{name}_id": ids[name] for name in ("unk", "bos", "eos")},
            **{f"{name}_piece": tokens[ids[name]] for name in ("unk", "bos", "eos")},
        },
        normalizer_spec={
            "name": "identity",
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": False,
            "escape_whitespaces": True,
        },
    )
    tok = SentencePieceTokenizer(model.SerializeToString(deterministic=True), str(reader.path))
    template = reader.value("tokenizer.chat_template", "")
    if not template or renders_as_zephyr(template, tok.tokens, tok.tokens):
        return tok
    adds = {x: reader.value(f"tokenizer.ggml.add_{x}_token", x == "bos") for x in ("bos", "eos")}
    begin, end = (tokens[ids[name]] if adding else None for name, adding in adds.items())
    data = files.tokenizer_json(tok.vocabulary, begin, end=end)
    return _json_tokenizer(reader, data, tokens, adds)


def _read_bpe(reader: GgufReader, tokens: list[str], types: list[int]) -> Tokenizer:
    name = reader.value("tokenizer.ggml.pre", "default")
    if name not in tables.PRE_TOKENIZERS:
        what = f"tokenizer splits text by the rule {name!r} (tokenizer.ggml.pre)"
        raise _unsupported(what, ", ".join(tables.PRE_TOKENIZERS))
    pre, ignore_merges = tables.PRE_TOKENIZERS[name]
    ids = {token: i for i, token in enumerate(tokens)}
    adds = {"bos": reader.value("tokenizer.ggml.add_bos_token", name == "llama-bpe")}
    begin = tokens[_named(reader)["bos"]] if adds["bos"] else None
    data = {
        "version": "1.0",
        "added_tokens": [
            files.added_token(token, i, types[i] != USER_DEFINED)
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "pre_tokenizer": pre[0] if len(pre) == 1 else {"type": "Sequence", "pretokenizers": pre},
        "post_processor": files.surround(begin, None, ids),
        "decoder": tables.LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "ignore_merges": ignore_merges,
            "vocab": ids,
            "merges": [pair.split(" ") for pair in reader.value("tokenizer.ggml.merges")],
        },
    }
    return _json_tokenizer(reader, data, tokens, adds)


def _json_tokenizer(
    reader: GgufReader, data: dict[str, Any], tokens: list[str], adds: dict[str, bool]
) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json, with special tokens and chat template from the file."""
    config = {
        "clean_up_tokenization_spaces": False,
        **{f"add_{name}_token": adds.get(name, False) for name in ("bos", "eos")},
        **{f"{name}_token": tokens[i] for name, i in _named(reader).items()},
        "model_max_length": reader.value("llama.context_length"),
        "chat_template": reader.value("tokenizer.chat_template", ""),
    }
    return JsonTokenizer(files.encoded(data, config), str(reader.path))
