"""What the files of a tokenizer say: tokenizer.json, those next to it, and tokenizer.model.

Where a model comes with a SentencePiece model and tokens that were added to it, but without a
tokenizer.json, that file is made here, such that it is read as transformers reads such a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from sentencepiece import sentencepiece_model_pb2

MODEL_NAME, JSON_NAME, CONFIG_NAME = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME, SPECIALS_NAME = "chat_template.jinja", "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
FILES = (JSON_NAME, CONFIG_NAME, TEMPLATE_NAME, SPECIALS_NAME)  # what a JsonTokenizer keeps
# Types of vocabulary entries; SentencePiece and GGUF number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = (UNKNOWN, CONTROL)

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# What every tokenizer.json that is generated here begins with, and its model.
TOKENIZER_JSON = {"version": "1.0", "truncation": None, "padding": None}
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
# In files of transformers 5, where Metaspace puts its prefix only before a text without a blank
DOUBLED = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}
# Where a text has its dummy prefix `▁`: behind every added token, or only where it begins.
EVERYWHERE = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES],
    },
    "pre_tokenizer": None,
}
FIRST = {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}
_ModelProto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009  # made at import


class Vocabulary(NamedTuple):
    """The entries of a SentencePiece BPE model by id; the higher score merges first."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def of_model(cls, model_bytes: bytes) -> Vocabulary:
        """The entries in the bytes of a tokenizer.model."""
        pieces = _ModelProto.FromString(model_bytes).pieces
        columns = zip(*((p.piece, p.type, p.score) for p in pieces), strict=True)
        return cls(*map(list, columns))

    def of_type(self, *types: int) -> dict[str, int]:
        """Text -> id of the entries of these types."""
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in types}

    def merges(self) -> list[list[str]]:
        """The merges of two tokens into one, best first; a ValueError names a token without any."""
        normal, merges = self.of_type(NORMAL), []
        for token, i in normal.items():
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
            if len(token) > 1 and not pairs:
                raise ValueError(
                    f"token {i} ({token!r}) of the tokenizer is no merge of two others, so "
                    "tokenizer.json cannot express it; train the tokenizer without it"
                )
            # The id decides among the runs of blanks, which share one score in Mistral's model.
            merges += [(-self.scores[i], i, normal[a], normal[b], a, b) for a, b in pairs]
        return [[left, right] for *_, left, right in sorted(merges)]


def tokenizer_json(
    vocabulary: Vocabulary,
    begin: str | None,
    *,
    end: str | None = None,
    added: Sequence[Mapping[str, Any]] = (),
    prefix: Mapping[str, Any] = EVERYWHERE,
) -> dict[str, Any]:
    """The content of tokenizer.json: the same BPE as the SentencePiece model, as merges.

    SentencePiece merges the pair whose result has the best score, the leftmost among equals;
    `tokenizers` the pair that comes first in the list of merges. Literal specials, user-defined
    symbols and the tokens of `added` are tokens, and the text after each gets its dummy prefix, as
    in `SentencePieceTokenizer.encode` and in llama.cpp. `begin` and `end` are put around a text.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ids |= {token["content"]: token["id"] for token in added}
    kinds = {True: vocabulary.of_type(*SPECIAL), False: vocabulary.of_type(USER_DEFINED)}
    tokens = {
        text: {"id": i, "content": text, **FLAGS, "special": special}
        for special, entries in kinds.items()
        for text, i in entries.items()
    }
    tokens |= {token["content"]: dict(token) for token in added}
    unknown = next(iter(vocabulary.of_type(UNKNOWN)), None)
    return TOKENIZER_JSON | {
        "added_tokens": sorted(tokens.values(), key=lambda token: token["id"]),
        **prefix,
        "post_processor": surround(begin, end, ids),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": BPE
        | {
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": vocabulary.merges(),
        },
    }


def surround(begin: str | None, end: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor of a tokenizer.json that puts these tokens around every text."""
    tokens = {x: {"id": x, "ids": [ids[x]], "tokens": [x]} for x in (begin, end) if x and x in ids}
    texts = []
    for number, name in enumerate(("A", "B")):
        around = [{"SpecialToken": {"id": x, "type_id": number}} for x in (begin, end)]
        before, after = around[: begin in ids], around[1 : 1 + (end in ids)]
        texts += [[*before, {"Sequence": {"id": name, "type_id": number}}, *after]]
    post = {"type": "TemplateProcessing", "single": texts[0], "pair": [*texts[0], *texts[1]]}
    return post | {"special_tokens": tokens} if tokens else None


def read_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The bytes of a tokenizer.json, under that name, and of the other files next to it."""
    path = epath.Path(path)
    paths = {name: path.with_name(name) for name in (*FILES, ADDED_NAME)} | {JSON_NAME: path}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def read_object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """The JSON object in one of the files, empty without it; a ValueError if it is none."""
    text = files.get(name, b"{}")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        size = f"{len(text)} bytes"
        raise ValueError(f"{source}: {name} ({size}) is no JSON object; copy or download it again")
    return content


def settings(files: Mapping[str, bytes], source: str) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json together.

    As in transformers the latter decides where the former lists no `added_tokens_decoder`.
    """
    config = read_object(files, CONFIG_NAME, source)
    named = read_object(files, SPECIALS_NAME, source)
    return named | config if "added_tokens_decoder" in config else config | named


def template_of(files: Mapping[str, bytes], source: str) -> str:
    """The chat template in a model's files: the default one of several; "" without any."""
    if TEMPLATE_NAME in files:
        try:
            return files[TEMPLATE_NAME].decode()
        except UnicodeDecodeError as error:
            message = f"{source}: {TEMPLATE_NAME} is not UTF-8; copy or download it again"
            raise ValueError(message) from error
    template = read_object(files, CONFIG_NAME, source).get("chat_template") or ""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") or "" if isinstance(template, dict) else template


def named_tokens(files: Mapping[str, bytes], source: str) -> dict[str, str]:
    """What a chat template may call by name: `bos_token`, `eos_token`, ..."""
    named = settings(files, source).items()
    return {name: x for name, v in named if name.endswith("_token") and (x := _content(v))}


def _more_specials(files: Mapping[str, bytes], source: str) -> list[str]:
    """The texts of special tokens that have no name."""
    config = settings(files, source)
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    more = more.values() if isinstance(more, dict) else more
    return [text for text in map(_content, more) if text]


def added_tokens(
    files: Mapping[str, bytes], source: str, data: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The tokens that the files add to a vocabulary, as a tokenizer.json lists them.

    `data` is the content of tokenizer.json, where the caller has it already.
    """
    data = read_object(files, JSON_NAME, source) if data is None else data
    listed = read_object(files, CONFIG_NAME, source).get("added_tokens_decoder")
    tokens = [*(data.get("added_tokens") or ())]
    try:
        if listed is None:
            plain = read_object(files, ADDED_NAME, source)
            special = {*named_tokens(files, source).values(), *_more_specials(files, source)}
            listed = {i: {"content": text, "special": text in special} for text, i in plain.items()}
        known = {token["content"] for token in tokens}
        for i, token in listed.items():
            if token["content"] not in known:
                tokens.append({"id": int(i), **FLAGS, "special": False, **token})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{source}: {CONFIG_NAME} or {ADDED_NAME} has no ids of added tokens ({error!r}); copy "
            "it again"
        ) from error
    return tokens


def tokenizer_object(files: Mapping[str, bytes], source: str) -> dict[str, Any]:
    """The content of tokenizer.json, where tokens that the other files name are special."""
    data = read_object(files, JSON_NAME, source)
    vocabulary = data["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {text: i for i, (text, _) in enumerate(vocabulary)}
    added = {token["content"]: token for token in added_tokens(files, source, data)}
    for text in (*named_tokens(files, source).values(), *_more_specials(files, source)):
        if text in added:
            added[text] = added[text] | {"special": True}
        elif text in vocabulary:  # what is in neither has no row in the model
            added[text] = {"id": vocabulary[text], "content": text, **FLAGS, "special": True}
    return data | {"added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def prefixes_every_span(files: Mapping[str, bytes], source: str) -> bool:
    """Whether text has a dummy prefix behind added tokens too, and not only where it begins."""
    if JSON_NAME not in files:
        return bool(settings(files, source).get("legacy", True))
    return '"first"' not in json.dumps(read_object(files, JSON_NAME, source).get("pre_tokenizer"))


def _content(token: object) -> str | None:
    """The text of a special token, which is written plainly or with flags; None: no token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def converted(
    vocabulary: Vocabulary, names: Mapping[str, str], files: Mapping[str, bytes], source: str
) -> dict[str, bytes]:
    """The FILES of a folder that has a SentencePiece model but no tokenizer.json.

    `names` are the model's own bos, eos and unk. Added tokens keep the ids that the files give them
    and match a text as it is written; one of a lower id than the vocabulary's size takes the place
    of that entry. A ValueError names a token with two ids.
    """
    texts = dict(enumerate(vocabulary.tokens))
    added = [token | {"normalized": False} for token in added_tokens(files, source)]
    texts |= {token["id"]: token["content"] for token in added}
    ids = {text: i for i, text in texts.items()}
    for token in added:
        text, i = token["content"], token["id"]
        if texts[i] != text or ids[text] != i or len(ids) < len(texts) or i < 0:
            raise ValueError(f"{source}: the id {i} of the added token {text!r} is not its alone")
    config = {**names, **settings(files, source)}
    begin, end = (_content(config[f"{name}_token"]) for name in ("bos", "eos"))
    data = tokenizer_json(
        vocabulary._replace(tokens=[texts[i] for i in range(len(vocabulary.tokens))]),
        begin if config.get("add_bos_token", True) else None,
        end=end if config.get("add_eos_token") else None,
        added=added,
        prefix=EVERYWHERE if prefixes_every_span(files, source) else FIRST,
    )
    config.pop("added_tokens_decoder", None)
    # Classes named after a model make transformers rebuild the tokenizer.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    made = {JSON_NAME: data, CONFIG_NAME: config}
    encoded = {name: json.dumps(x, ensure_ascii=False).encode() for name, x in made.items()}
    return encoded | {name: files[name] for name in (TEMPLATE_NAME,) if name in files}
