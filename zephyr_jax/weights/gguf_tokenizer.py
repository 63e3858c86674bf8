"""Tokenizers in the metadata of a GGUF file, written and read.

llama.cpp has two kinds. "llama" is SentencePiece: tokens with scores, the best of which is merged
first. "gpt2" is BPE over bytes: merges for what is left after a text was split by rules that the
file only names (`tokenizer.ggml.pre`); a name that is not in `PRE_TOKENIZERS` is refused, since a
wrong rule gives wrong ids silently.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging
from sentencepiece import sentencepiece_model_pb2

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE, renders_as_zephyr
from zephyr_jax.data.text.json_tokenizer import (
    CONFIG_NAME,
    JSON_NAME,
    JsonTokenizer,
    read_object,
    tokenizer_object,
)
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.weights.huggingface_files import (
    BPE,
    FLAGS,
    TOKENIZER_JSON,
    begin_with,
    check_tokenizer,
    end_ids,
    tokenizer_json,
)

if TYPE_CHECKING:
    from zephyr_jax.weights.gguf import GgufReader

_ModelProto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009  # made at import

# Types of tokens; SentencePiece and GGUF number them alike.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
# name in GGUF -> the pre-tokenizers of tokenizer.json, and its flag ignore_merges
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_LEVEL], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _LEVEL], False),
    "llama-bpe": ([_SPLIT, _LEVEL | {"use_regex": False}], True),
}


_OTHER_ENDS = ("eot", "eom")  # next to eos, of a turn and of a message; each ends a reply


class _Vocabulary(NamedTuple):
    """Tokens and their types by id, with scores or, for BPE over bytes, merges."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"


def add_tokenizer(writer: Any, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Adds the tokenizer and its chat template to a `gguf.GGUFWriter`.

    Ids that the model has and the tokenizer lacks become unused tokens `[PADi]`. A ValueError says
    why a tokenizer is not the model's, or cannot be expressed.
    """
    check_tokenizer(cfg, tok)
    add_bos, template = True, CHAT_TEMPLATE
    if isinstance(tok, SentencePieceTokenizer):
        vocabulary = _from_model(tok.model_bytes)
    else:
        assert isinstance(tok, JsonTokenizer)
        vocabulary, add_bos, template = _from_json(tok), _adds_bos(tok), tok.chat_template
    unused = range(len(vocabulary.tokens), cfg.vocab_size)
    writer.add_tokenizer_model("gpt2" if vocabulary.merges else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*vocabulary.types, *(_UNUSED for _ in unused)])
    if vocabulary.scores:
        writer.add_token_scores([*vocabulary.scores, *(0.0 for _ in unused)])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for name in ("bos", "eos", "unk", "pad"):
        if (token := tok.tokens.get(f"{name}_token", "")) in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    ends = [i for i in end_ids(cfg, tok) if i != tok.eos_id]
    for name, token in zip(_OTHER_ENDS, ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    if unwritten := ends[len(_OTHER_ENDS) :]:
        logging.warning("a GGUF file has no room for the tokens %s, which end a text", unwritten)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.merges is None)
    if template:
        writer.add_chat_template(template)


def _from_model(model_bytes: bytes) -> _Vocabulary:
    """The vocabulary of a SentencePiece model."""
    entries = _ModelProto.FromString(model_bytes).pieces
    if any(entry.type == _USER_DEFINED for entry in entries):
        raise ValueError(
            "the tokenizer has user-defined symbols, around which llama.cpp puts other blanks than "
            "SentencePiece; train it without them"
        )
    return _Vocabulary(
        [entry.piece for entry in entries],
        [entry.type for entry in entries],
        [entry.score for entry in entries],
    )


def _from_json(tok: JsonTokenizer) -> _Vocabulary:
    """The vocabulary of a tokenizer.json: BPE over bytes, or made from a SentencePiece model."""
    data = tokenizer_object(tok.files, tok.source)
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model.get("type") != "BPE":
        raise ValueError(f"{tok.source} is of the kind {model.get('type')!r}; GGUF takes only BPE")
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    types = dict.fromkeys(texts, _NORMAL)
    types |= {i: _CONTROL if t["special"] else _USER_DEFINED for i, t in added.items()}
    vocabulary = _Vocabulary(
        [texts.get(i, f"[PAD{i}]") for i in range(tok.vocab_size)],
        [types.get(i, _UNUSED) for i in range(tok.vocab_size)],
    )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _with_scores(tok, data, vocabulary, merges)
    pre = data.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    steps = [step | {"trim_offsets": True} if "trim_offsets" in step else step for step in steps]
    for name, rule in PRE_TOKENIZERS.items():
        if (steps, bool(model.get("ignore_merges"))) == rule and not data.get("normalizer"):
            return vocabulary._replace(merges=[" ".join(pair) for pair in merges], pre=name)
    raise ValueError(
        f"{tok.source} splits text by a rule that has no supported name in GGUF (normalizer "
        f"{data.get('normalizer')}, pre_tokenizer {pre}); supported are {', '.join(PRE_TOKENIZERS)}"
    )


def _with_scores(
    tok: JsonTokenizer, data: dict, vocabulary: _Vocabulary, merges: list[list[str]]
) -> _Vocabulary:
    """The vocabulary of a tokenizer.json that was made from a SentencePiece model.

    A token's score is the rank of the first merge that makes it. The inverse shows that this loses
    nothing: the merges that follow from the scores must be the same.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokens = vocabulary.tokens
    bos, eos = tok.tokens.get("bos_token", ""), tok.tokens["eos_token"]
    unk = tok.tokens.get("unk_token", data["model"].get("unk_token"))
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    types = [
        _UNKNOWN if token == unk else _BYTE if token in byte_tokens else kind
        for token, kind in zip(tokens, vocabulary.types, strict=True)
    ]
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    ids = [tokens.index(token) if token in tokens else -1 for token in (unk, bos, eos)]
    again = tokenizer_json(SentencePieceTokenizer(_model_bytes(tokens, types, scores, *ids)))
    same = again["model"]["merges"] == merges and again["normalizer"] == data.get("normalizer")
    if not same or data.get("pre_tokenizer"):
        raise ValueError(
            f"{tok.source} has byte fallback, but is not what SentencePiece does (its normalizer, "
            "pre_tokenizer or order of merges), so GGUF cannot express it"
        )
    return _Vocabulary(tokens, types, scores)


def _adds_bos(tok: JsonTokenizer) -> bool:
    """Whether plain text begins with the begin-of-text token in Hugging Face."""
    config = read_object(tok.files, CONFIG_NAME, tok.source)
    after = read_object(tok.files, JSON_NAME, tok.source).get("post_processor") or {}
    steps = [s for s in after.get("processors", [after]) if s.get("type") == "TemplateProcessing"]
    first = [step["single"][0].get("SpecialToken", {}).get("id") for step in steps]
    return tok.tokens.get("bos_token", "") in first or bool(config.get("add_bos_token"))


def _model_bytes(
    tokens: list[str], types: list[int], scores: list[float], unk: int, bos: int, eos: int
) -> bytes:
    """A SentencePiece model with the settings that all tokenizers of this kind share."""
    model = _ModelProto()
    for i, (token, kind, score) in enumerate(zip(tokens, types, scores, strict=True)):
        # The official converter calls the unknown token a control token.
        model.pieces.add(piece=token, type=_UNKNOWN if i == unk else kind, score=score)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, len(tokens), True  # BPE
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unk, bos, eos, -1
    for name, token in (("unk_piece", unk), ("bos_piece", bos), ("eos_piece", eos)):
        if token >= 0:
            setattr(trainer, name, tokens[token])
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString(deterministic=True)


def read_tokenizer(reader: GgufReader) -> Tokenizer:
    """The tokenizer that a file's metadata describes, with the file's chat template."""
    kind = reader.required("tokenizer.ggml.model")
    tokens = reader.required("tokenizer.ggml.tokens")
    types = reader.value("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    # Unused tokens at the end only fill the matrices.
    n = max((i for i, kind in enumerate(types) if kind != _UNUSED), default=-1) + 1
    if kind == "llama":
        return _read_sentencepiece(reader, tokens[:n], types[:n])
    if kind == "gpt2":
        return _read_bpe(reader, tokens[:n], types[:n])
    raise ValueError(
        f"{reader.path} has a tokenizer of the kind {kind!r}; 'llama' (SentencePiece) and 'gpt2' "
        "(BPE over bytes) are supported; import the model's Hugging Face folder instead"
    )


def read_other_ends(reader: GgufReader) -> list[int]:
    """The ids of tokens that end a text, other than eos."""
    ids = [reader.value(f"tokenizer.ggml.{name}_token_id") for name in _OTHER_ENDS]
    return [i for i in ids if i is not None]


def _read_sentencepiece(reader: GgufReader, tokens: list[str], types: list[int]) -> Tokenizer:
    if _USER_DEFINED in types or not reader.value("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(
            f"{reader.path} has a SentencePiece tokenizer with user-defined tokens, or without the "
            "blank before a text, which is not supported; import the Hugging Face folder instead"
        )
    scores = reader.required("tokenizer.ggml.scores")[: len(tokens)]
    names = {"unknown": 0, "bos": 1, "eos": 2}
    ids = [reader.value(f"tokenizer.ggml.{name}_token_id", i) for name, i in names.items()]
    tok = SentencePieceTokenizer(_model_bytes(tokens, types, scores, *ids), str(reader.path))
    template = reader.value("tokenizer.chat_template", "")
    if not template or renders_as_zephyr(template, tok.tokens, tok.tokens):
        return tok
    return _json_tokenizer(reader, tokenizer_json(tok), tokens, add_bos=True)


def _read_bpe(reader: GgufReader, tokens: list[str], types: list[int]) -> Tokenizer:
    name = reader.value("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{reader.path} splits text by the rule {name!r} (tokenizer.ggml.pre); supported are "
            f"{', '.join(PRE_TOKENIZERS)}; import the model's Hugging Face folder instead"
        )
    pre, ignore_merges = PRE_TOKENIZERS[name]
    add_bos = reader.value("tokenizer.ggml.add_bos_token", name == "llama-bpe")
    bos = reader.required("tokenizer.ggml.bos_token_id") if add_bos else None
    data = TOKENIZER_JSON | {
        "added_tokens": [
            {"id": i, "content": token, **FLAGS, "special": kind != _USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": pre[0] if len(pre) == 1 else {"type": "Sequence", "pretokenizers": pre},
        "post_processor": None if bos is None else begin_with(tokens[bos], bos),
        "decoder": _LEVEL | {"add_prefix_space": True},
        "model": BPE
        | {
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in reader.required("tokenizer.ggml.merges")],
        },
    }
    return _json_tokenizer(reader, data, tokens, add_bos=add_bos)


def _json_tokenizer(
    reader: GgufReader, data: dict[str, Any], tokens: list[str], *, add_bos: bool
) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json, with special tokens and chat template from the file."""
    reader.required("tokenizer.ggml.eos_token_id")
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {ours: reader.value(f"tokenizer.ggml.{name}_token_id") for name, ours in names.items()}
    config = {
        # Classes named after a model make transformers rebuild the tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "model_max_length": reader.required("llama.context_length"),
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        "chat_template": reader.value("tokenizer.chat_template", ""),
    }
    files = {JSON_NAME: data, CONFIG_NAME: config}
    encoded = {name: json.dumps(x, ensure_ascii=False).encode() for name, x in files.items()}
    return JsonTokenizer(encoded, str(reader.path))
