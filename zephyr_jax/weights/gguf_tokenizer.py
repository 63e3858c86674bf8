"""Tokenizers in the metadata of a GGUF file, written and read.

llama.cpp has two kinds. "llama" is SentencePiece: tokens with scores, the best of which is merged
first. "gpt2" is BPE over bytes: merges for what is left after a text was split by rules that the
file only names (`tokenizer.ggml.pre`); a name that is not in `PRE_TOKENIZERS` is refused, since a
wrong rule gives wrong ids silently.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging
from sentencepiece import sentencepiece_model_pb2

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE, renders_as_zephyr
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import (
    BPE,
    BYTE,
    CONFIG_NAME,
    CONTROL,
    DOUBLED,
    EVERYWHERE,
    FLAGS,
    JSON_NAME,
    METASPACE,
    NORMAL,
    SPACES,
    TOKENIZER_JSON,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_object,
    surround,
    tokenizer_json,
    tokenizer_object,
)
from zephyr_jax.weights.exports import check_tokenizer, end_ids

if TYPE_CHECKING:
    from zephyr_jax.weights.gguf import GgufReader

_ModelProto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009  # made at import

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


def add_tokenizer(writer: Any, cfg: MistralConfig, tok: Tokenizer) -> None:
    """Adds the tokenizer and its chat template to a `gguf.GGUFWriter`.

    Ids that the model has and the tokenizer lacks become unused tokens `[PADi]`. A ValueError says
    why a tokenizer is not the model's, or cannot be expressed.
    """
    check_tokenizer(cfg, tok)
    bpe, adds, template = None, (True, False), CHAT_TEMPLATE
    if isinstance(tok, SentencePieceTokenizer):
        vocabulary = tok.vocabulary
    else:
        assert isinstance(tok, JsonTokenizer)
        (vocabulary, bpe), template = _from_json(tok), tok.chat_template
        adds = _adds(tok, "bos", first=True), _adds(tok, "eos", first=False)
    unused = range(len(vocabulary.tokens), cfg.vocab_size)
    writer.add_tokenizer_model("gpt2" if bpe else "llama")
    writer.add_tokenizer_pre(bpe.pre if bpe else "default")
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*vocabulary.types, *(UNUSED for _ in unused)])
    if bpe:
        writer.add_token_merges(bpe.merges)
    else:
        writer.add_token_scores([*vocabulary.scores, *(0.0 for _ in unused)])
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for name in ("bos", "eos", "unk", "pad"):
        if (token := tok.tokens.get(f"{name}_token", "")) in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    ends = [i for i in end_ids(cfg, tok) if i != tok.eos_id]
    for name, token in zip(_OTHER_ENDS, ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    if unwritten := ends[len(_OTHER_ENDS) :]:
        logging.warning("a GGUF file has no room for the tokens %s, which end a text", unwritten)
    writer.add_add_bos_token(adds[0])
    writer.add_add_eos_token(adds[1])
    writer.add_add_space_prefix(bpe is None)
    if template:
        writer.add_chat_template(template)


class _ByteBpe(NamedTuple):
    """What BPE over bytes has in addition to its entries."""

    merges: list[str]
    pre: str  # the name of the rule that splits a text first


def _from_json(tok: JsonTokenizer) -> tuple[Vocabulary, _ByteBpe | None]:
    """The vocabulary of a tokenizer.json: BPE over bytes, or made from a SentencePiece model."""
    data = tokenizer_object(tok.files, tok.source)
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model.get("type") != "BPE":
        raise ValueError(f"{tok.source} is of the kind {model.get('type')!r}; GGUF takes only BPE")
    if strips := [t["content"] for t in added.values() if t.get("lstrip") or t.get("rstrip")]:
        logging.warning("llama.cpp keeps the blanks around %s, which are dropped here", strips)
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    types = dict.fromkeys(texts, NORMAL)
    types |= {i: CONTROL if t["special"] else USER_DEFINED for i, t in added.items()}
    ids = range(tok.vocab_size)
    tokens = [texts.get(i, f"[PAD{i}]") for i in ids]
    vocabulary = Vocabulary(tokens, [types.get(i, UNUSED) for i in ids], [0.0] * len(ids))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _with_scores(tok, data, vocabulary, merges), None
    pre = data.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    steps = [step | {"trim_offsets": True} if "trim_offsets" in step else step for step in steps]
    for name, rule in PRE_TOKENIZERS.items():
        if (steps, bool(model.get("ignore_merges"))) == rule and not data.get("normalizer"):
            return vocabulary, _ByteBpe([" ".join(pair) for pair in merges], name)
    raise ValueError(
        f"{tok.source} splits text by a rule that has no supported name in GGUF (normalizer "
        f"{data.get('normalizer')}, pre_tokenizer {pre}); supported are {', '.join(PRE_TOKENIZERS)}"
    )


def _with_scores(
    tok: JsonTokenizer, data: dict, vocabulary: Vocabulary, merges: list[list[str]]
) -> Vocabulary:
    """The vocabulary of a tokenizer.json that was made from a SentencePiece model.

    A token's score is the rank of the first merge that makes it. The inverse shows that this loses
    nothing: the merges that follow from the scores must be the same, those of one token in any
    order.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    symbols = _symbols(data, vocabulary.tokens)
    kinds = {tok.tokens.get("unk_token", data["model"].get("unk_token")): UNKNOWN}
    kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), BYTE)
    kinds |= dict.fromkeys(symbols or (), USER_DEFINED)
    types = [kinds.get(token, kind) for token, kind in zip(*vocabulary[:2], strict=True)]
    scores = [-float(ranks.get(token, len(merges))) for token in vocabulary.tokens]
    out = Vocabulary(vocabulary.tokens, types, scores)
    # What no merge makes, such as a control token of Mistral's that the file does not list.
    merged = [
        UNUSED if kind == NORMAL and len(token) > 1 and token not in ranks else kind
        for token, kind in zip(*out[:2], strict=True)
    ]
    again = out._replace(types=merged).merges()
    same = sorted(map(tuple, again)) == sorted(map(tuple, merges))
    same = same and ["".join(pair) for pair in again] == ["".join(pair) for pair in merges]
    if not same or symbols is None:
        raise ValueError(
            f"{tok.source} has byte fallback, but is not what SentencePiece does (its normalizer, "
            "pre_tokenizer or order of merges), so GGUF cannot express it"
        )
    return out


def _symbols(data: dict[str, Any], tokens: list[str]) -> list[str] | None:
    """The user-defined symbols of a tokenizer.json; None: it has not SentencePiece's prefix.

    Two forms have it: ours, and that of transformers 5.
    """
    if {name: data.get(name) for name in EVERYWHERE} == EVERYWHERE:
        return []
    pre = data.get("pre_tokenizer") or {}
    first, *others = pre.get("pretokenizers") or [pre]
    normalizers = (data.get("normalizer") or {}).get("normalizers")
    if normalizers != [SPACES, DOUBLED] or first != METASPACE | {"prepend_scheme": "always"}:
        return None
    symbols = []
    for split in others:
        if split.get("type") != "Split" or "Regex" not in split["pattern"]:
            return None
        symbols += [token for token in tokens if re.fullmatch(split["pattern"]["Regex"], token)]
    if symbols:
        logging.warning(
            "llama.cpp has a blank behind %d user-defined symbols, such as %s, as is not so here",
            len(symbols),
            symbols[-1],
        )
    return symbols


def _adds(tok: JsonTokenizer, name: str, *, first: bool) -> bool:
    """Whether plain text begins (or ends) with the named token in Hugging Face."""
    config = read_object(tok.files, CONFIG_NAME, tok.source)
    after = read_object(tok.files, JSON_NAME, tok.source).get("post_processor") or {}
    steps = [s for s in after.get("processors", [after]) if s.get("type") == "TemplateProcessing"]
    edge = 0 if first else -1
    added = [step["single"][edge].get("SpecialToken", {}).get("id") for step in steps]
    return tok.tokens.get(f"{name}_token", "") in added or bool(config.get(f"add_{name}_token"))


def _model_bytes(vocabulary: Vocabulary, unk: int, bos: int, eos: int) -> bytes:
    """A SentencePiece model with the settings that all tokenizers of this kind share."""
    model, tokens = _ModelProto(), vocabulary.tokens
    for token, kind, score in zip(*vocabulary, strict=True):
        model.pieces.add(piece=token, type=kind, score=score)
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
    types = reader.value("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    # Unused tokens at the end only fill the matrices.
    n = max((i for i, kind in enumerate(types) if kind != UNUSED), default=-1) + 1
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
    if not reader.value("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(
            f"{reader.path} has a SentencePiece tokenizer without the blank before a text, which "
            "is not supported; import the Hugging Face folder instead"
        )
    scores = reader.required("tokenizer.ggml.scores")[: len(tokens)]
    names = {"unknown": 0, "bos": 1, "eos": 2}
    unk, *ends = (reader.value(f"tokenizer.ggml.{name}_token_id", i) for name, i in names.items())
    # Converters call the unknown token a control token, and what ends a text a user's; these are
    # control tokens to llama.cpp, too.
    types = [
        UNKNOWN if i == unk else CONTROL if i in ends and kind == USER_DEFINED else kind
        for i, kind in enumerate(types)
    ]
    model = _model_bytes(Vocabulary(tokens, types, scores), unk, *ends)
    tok = SentencePieceTokenizer(model, str(reader.path))
    template = reader.value("tokenizer.chat_template", "")
    if not template or renders_as_zephyr(template, tok.tokens, tok.tokens):
        return tok
    adds = [reader.value(f"tokenizer.ggml.add_{x}_token", x == "bos") for x in ("bos", "eos")]
    begin, end = (tokens[i] if adding else None for i, adding in zip(ends, adds, strict=True))
    data = tokenizer_json(tok.vocabulary, begin, end=end)
    return _json_tokenizer(reader, data, tokens, add_bos=adds[0], add_eos=adds[1])


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
            {"id": i, "content": token, **FLAGS, "special": kind != USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": pre[0] if len(pre) == 1 else {"type": "Sequence", "pretokenizers": pre},
        "post_processor": None if bos is None else surround(tokens[bos], None, {tokens[bos]: bos}),
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
    reader: GgufReader,
    data: dict[str, Any],
    tokens: list[str],
    *,
    add_bos: bool,
    add_eos: bool = False,
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
        "add_eos_token": add_eos,
        "model_max_length": reader.required("llama.context_length"),
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        "chat_template": reader.value("tokenizer.chat_template", ""),
    }
    files = {JSON_NAME: data, CONFIG_NAME: config}
    encoded = {name: json.dumps(x, ensure_ascii=False).encode() for name, x in files.items()}
    return JsonTokenizer(encoded, str(reader.path))
