"""Tokenizers in the metadata of a GGUF file, there and back.

llama.cpp has two kinds that models of this architecture use. "llama" is SentencePiece: pieces with
scores, the best of which is merged first. "gpt2" is BPE over bytes: a list of merges for what is
left after a text was cut by rules that the file only names (`tokenizer.ggml.pre`). The names that
are known here are in `_CUTS`; every other is refused, since a wrong rule gives wrong ids silently.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE, renders_as_zephyr
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.text.tokenizer_files import (
    CONFIG_NAME,
    JSON_NAME,
    read_object,
    tokenizer_object,
)
from zephyr_jax.weights.gguf_io import GgufReader
from zephyr_jax.weights.huggingface_files import check_tokenizer, tokenizer_json

_Model: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009  # made at import

# Types of tokens; SentencePiece and GGUF number them alike.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
# name -> how a text is cut, in the words of tokenizer.json, and whether a piece that is itself a
# token is left whole
_CUTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_LEVEL], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _LEVEL], False),
    "llama-bpe": ([_SPLIT, _LEVEL | {"use_regex": False}], True),
}


class _Vocabulary(NamedTuple):
    """Tokens by id, with what makes tokens of text: scores or, for BPE over bytes, merges."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    cut: str = "default"
    add_bos: bool = True


def add_tokenizer(writer: Any, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Adds the tokenizer and its chat template to a `gguf.GGUFWriter`.

    Ids that the model has and the tokenizer lacks become unused tokens `[PADi]`.

    Raises:
        ValueError: if the tokenizer is not the model's, or is one that GGUF, as far as it is known
            here, has no words for.
    """
    check_tokenizer(cfg, tok)
    if isinstance(tok, SentencePieceTokenizer):
        known, template = _of_model(tok.model_bytes), CHAT_TEMPLATE
        ids = {"bos": tok.bos_id, "eos": tok.eos_id, "unk": tok.unk_id, "pad": tok.pad_id}
    else:
        assert isinstance(tok, JsonTokenizer), "there are two kinds of tokenizers"
        known, template = _of_json(tok), tok.chat_template
        names = ("bos", "eos", "unk", "pad")
        by_text = {token: i for i, token in enumerate(known.tokens)}
        ids = {name: by_text.get(tok.tokens.get(f"{name}_token", "")) for name in names}
    lacking = range(len(known.tokens), cfg.vocab_size)
    writer.add_tokenizer_model("gpt2" if known.merges else "llama")
    writer.add_tokenizer_pre(known.cut)
    writer.add_token_list([*known.tokens, *(f"[PAD{i}]" for i in lacking)])
    writer.add_token_types([*known.types, *(_UNUSED for _ in lacking)])
    if known.scores:
        writer.add_token_scores([*known.scores, *(0.0 for _ in lacking)])
    if known.merges:
        writer.add_token_merges(known.merges)
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(known.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(known.merges is None)
    if template:
        writer.add_chat_template(template)


def _of_model(model_bytes: bytes) -> _Vocabulary:
    """The vocabulary of a SentencePiece model."""
    pieces = _Model.FromString(model_bytes).pieces
    user = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    if user:
        raise ValueError(
            f"the tokenizer has user-defined symbols ({', '.join(map(repr, user[:5]))}), around "
            "which llama.cpp puts other blanks than SentencePiece; train it without them"
        )
    tokens, types, scores = (
        [getattr(p, name) for p in pieces] for name in ("piece", "type", "score")
    )
    return _Vocabulary(tokens, types, scores)


def _of_json(tok: JsonTokenizer) -> _Vocabulary:
    """The vocabulary of a tokenizer.json.

    Raises:
        ValueError: if it is neither BPE over bytes, cut by a rule of `_CUTS`, nor SentencePiece's.
    """
    data = tokenizer_object(tok.files, tok.source)
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model.get("type") != "BPE":
        raise ValueError(f"{tok.source} is of the kind {model.get('type')!r}; GGUF takes only BPE")
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(tok.vocab_size)]

    def kind(i: int) -> int:
        if i in added:
            return _CONTROL if added[i]["special"] else _USER_DEFINED
        return _NORMAL if i in texts else _UNUSED

    types = [kind(i) for i in range(tok.vocab_size)]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _of_merges(tok, data, tokens, types, merges)
    found = data.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    steps = [step | {"trim_offsets": True} if "trim_offsets" in step else step for step in steps]
    for name, cut in _CUTS.items():
        if (steps, bool(model.get("ignore_merges"))) == cut and not data.get("normalizer"):
            joined = [" ".join(pair) for pair in merges]
            return _Vocabulary(tokens, types, None, joined, name, _adds_bos(tok))
    raise ValueError(
        f"{tok.source} cuts text by a rule that has no known name in GGUF (normalizer "
        f"{data.get('normalizer')}, pre_tokenizer {found}); known are {', '.join(_CUTS)}"
    )


def _of_merges(
    tok: JsonTokenizer, data: dict, tokens: list[str], types: list[int], merges: list[list[str]]
) -> _Vocabulary:
    """The vocabulary of a tokenizer.json that was made from a SentencePiece model.

    A piece's score is the rank of the first merge that makes it. That this loses nothing is shown
    by the way back: the merges that follow from the scores must be the same.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    unk = tok.tokens.get("unk_token", data["model"].get("unk_token"))
    kinds = [
        _UNKNOWN if token == unk else _BYTE if _is_byte(token) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    ids = [tokens.index(token) if token in tokens else -1 for token in (unk, *_ends(tok))]
    try:
        back = tokenizer_json(SentencePieceTokenizer(_model_bytes(tokens, kinds, scores, *ids)))
    except ValueError as error:
        raise ValueError(f"{tok.source} cannot be expressed in GGUF: {error}") from error
    same = back["model"]["merges"] == merges and back["normalizer"] == data.get("normalizer")
    if not same or data.get("pre_tokenizer"):
        raise ValueError(
            f"{tok.source} has byte fallback, but is not what SentencePiece does (its normalizer, "
            "pre_tokenizer or order of merges), so GGUF cannot express it"
        )
    return _Vocabulary(tokens, kinds, scores, None, "default", _adds_bos(tok))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _ends(tok: JsonTokenizer) -> tuple[str, str]:
    return tok.tokens.get("bos_token", ""), tok.tokens["eos_token"]


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
    model = _Model()
    for token, kind, score in zip(tokens, types, scores, strict=True):
        # The official converter calls the unknown token a control token.
        model.pieces.add(
            piece=token, type=_UNKNOWN if len(model.pieces) == unk else kind, score=score
        )
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
    """The tokenizer that a file's metadata describes, with the file's chat template.

    Raises:
        ValueError: if it is of a kind, or has a token of a type, that is not supported.
    """
    kind = reader.required("tokenizer.ggml.model")
    if kind == "llama":
        return _read_sentencepiece(reader)
    if kind == "gpt2":
        return _read_bpe(reader)
    raise ValueError(
        f"{reader.path} has a tokenizer of the kind {kind!r}; 'llama' (SentencePiece) and 'gpt2' "
        "(BPE over bytes) are supported; import the model's Hugging Face folder instead"
    )


def _read_tokens(reader: GgufReader) -> tuple[list[str], list[int]]:
    """Tokens and types, without the unused tokens at the end, which only fill the matrices."""
    tokens = reader.required("tokenizer.ggml.tokens")
    types = reader.value("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"{reader.path} has {len(tokens)} tokens and {len(types)} types of tokens")
    n = max((i for i, kind in enumerate(types) if kind != _UNUSED), default=-1) + 1
    return tokens[:n], types[:n]


def _read_sentencepiece(reader: GgufReader) -> Tokenizer:
    tokens, types = _read_tokens(reader)
    scores = reader.required("tokenizer.ggml.scores")[: len(tokens)]
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    if user or not reader.value("tokenizer.ggml.add_space_prefix", True):
        what = f"user-defined tokens ({', '.join(map(repr, user[:5]))})"
        raise ValueError(
            f"{reader.path} has a tokenizer with {what if user else 'no blank before a text'}, "
            "which is not supported; import the model's Hugging Face folder instead"
        )
    names = {"unknown": 0, "bos": 1, "eos": 2}
    ids = [reader.value(f"tokenizer.ggml.{name}_token_id", i) for name, i in names.items()]
    tok = SentencePieceTokenizer(_model_bytes(tokens, types, scores, *ids), str(reader.path))
    template = reader.value("tokenizer.chat_template", "")
    if not template or renders_as_zephyr(template, tok.tokens, tok.tokens):
        return tok
    return _with_template(reader, tokenizer_json(tok), tokens, add_bos=True)


def _read_bpe(reader: GgufReader) -> Tokenizer:
    tokens, types = _read_tokens(reader)
    name = reader.value("tokenizer.ggml.pre", "default")
    if name not in _CUTS:
        raise ValueError(
            f"{reader.path} cuts text by the rule {name!r} (tokenizer.ggml.pre); known are "
            f"{', '.join(_CUTS)}; import the model's Hugging Face folder instead"
        )
    cut, ignore_merges = _CUTS[name]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    add_bos = reader.value("tokenizer.ggml.add_bos_token", name == "llama-bpe")
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": kind != _USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": cut[0] if len(cut) == 1 else {"type": "Sequence", "pretokenizers": cut},
        "post_processor": _bos_first(reader, tokens) if add_bos else None,
        "decoder": _LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in reader.required("tokenizer.ggml.merges")],
        },
    }
    return _with_template(reader, data, tokens, add_bos=add_bos)


def _bos_first(reader: GgufReader, tokens: list[str]) -> dict[str, Any]:
    token = reader.required("tokenizer.ggml.bos_token_id")
    text = tokens[token]
    first, a, b = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _with_template(
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
