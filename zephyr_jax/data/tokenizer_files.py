"""What the files of a tokenizer say: tokenizer.json, those next to it, and tokenizer.model.

Of a SentencePiece model and tokens added to it a tokenizer.json is made, as by transformers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from sentencepiece import sentencepiece_model_pb2

MODEL_NAME, JSON_NAME, CONFIG_NAME = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME, SPECIALS_NAME = "chat_template.jinja", "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
# Types of vocabulary entries; SentencePiece and GGUF number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = (UNKNOWN, CONTROL)

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# Where a text has its dummy prefix `▁`: behind every added token, or only where it begins.
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _SPACES]}
EVERYWHERE = {"normalizer": _PREPEND, "pre_tokenizer": None}
_META = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "first"}
FIRST = {"normalizer": None, "pre_tokenizer": _META}
# EVERYWHERE as transformers 5 writes it: Metaspace puts a blank only before a text without one.
_DOUBLED = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}
REWRITTEN = {
    "normalizer": {"type": "Sequence", "normalizers": [_SPACES, _DOUBLED]},
    "pre_tokenizer": _META | {"prepend_scheme": "always"},
}
TRIAL_SECONDS = 5  # of a processor that untrusted input may take
ModelProto: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009  # made at import


@functools.lru_cache(64)
def trial(program: str, text: str) -> str:
    """Runs a program on untrusted input in a process that may be killed; says how it failed."""
    shell = f'ulimit -c 0; ulimit -t {TRIAL_SECONDS}; ulimit -d {1 << 20}; exec "$0" -P -c "$1"'
    words, paths = ["sh", "-c", shell, sys.executable, program], filter(None, sys.path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, input=text.encode(), capture_output=True, env=environment)
    if done.returncode < 0:
        return f"it takes more than {TRIAL_SECONDS} seconds or 1 GiB; simplify it"
    return done.stderr.decode().strip().rpartition("\n")[2] if done.returncode else ""


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Makes whatever is raised while a file is read a ValueError that begins with its name."""
    try:
        yield
    except Exception as error:
        reason = str(error)
        if isinstance(error, OSError) or reason.startswith(str(source)):
            raise
        if type(error) is not ValueError:
            reason = f"it is damaged, or too new for the installed packages ({error!r:.300})"
            reason += "; copy or download it again"
        raise ValueError(f"{source}: {' '.join(reason.split())}") from error


class Vocabulary(NamedTuple):
    """The entries of a SentencePiece BPE model by id; the higher score merges first."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def of_model(cls, model_bytes: bytes) -> Vocabulary:
        """The entries in the bytes of a tokenizer.model."""
        pieces = ModelProto.FromString(model_bytes).pieces
        return cls(*map(list, zip(*((p.piece, p.type, p.score) for p in pieces), strict=True)))

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


def added_token(text: str, i: int, special: bool) -> dict[str, Any]:
    """A token that merges with no text, as a tokenizer.json lists it."""
    return {"id": i, "content": text, **FLAGS, "special": special}


def tokenizer_json(
    vocabulary: Vocabulary,
    begin: str | None,
    *,
    added: Sequence[Mapping[str, Any]] = (),
    prefix: Mapping[str, Any] = EVERYWHERE,
) -> dict[str, Any]:
    """The content of tokenizer.json: the same BPE as the SentencePiece model, as merges.

    Literal specials, user-defined symbols and `added` are tokens, and the text after each gets its
    dummy prefix, as in `SentencePieceTokenizer.encode` and llama.cpp; `begin` precedes a text.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ids |= {token["content"]: token["id"] for token in added}
    tokens = {
        text: added_token(text, i, vocabulary.types[i] != USER_DEFINED)
        for text, i in vocabulary.of_type(*SPECIAL, USER_DEFINED).items()
    }
    tokens |= {token["content"]: dict(token) for token in added}
    blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    model = {"type": "BPE", "unk_token": next(iter(vocabulary.of_type(UNKNOWN)), None)}
    model |= {"fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": vocabulary.merges()}
    return {
        "version": "1.0",
        "added_tokens": sorted(tokens.values(), key=lambda token: token["id"]),
        **prefix,
        "post_processor": surround(begin, ids),
        "decoder": {
            "type": "Sequence",
            "decoders": [blank, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": model,
    }


def surround(begin: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """The post-processor of a tokenizer.json that puts a token before every text."""
    if begin is None or begin not in ids:
        return None
    special = {"SpecialToken": {"id": begin, "type_id": 0}}
    first, second = ([special, {"Sequence": {"id": name, "type_id": 0}}] for name in "AB")
    tokens = {begin: {"id": begin, "ids": [ids[begin]], "tokens": [begin]}}
    post = {"type": "TemplateProcessing", "single": first, "pair": first + second}
    return post | {"special_tokens": tokens}


class TokenizerFiles(dict[str, bytes]):
    """The bytes of a tokenizer's files by their names, and what they say together."""

    kept = (JSON_NAME, CONFIG_NAME, TEMPLATE_NAME, SPECIALS_NAME)  # by a JsonTokenizer

    @classmethod
    def read(cls, path: epath.Path) -> TokenizerFiles:
        """A tokenizer.json, under that name, and the other files next to it; any may be absent."""
        paths = {name: path.with_name(name) for name in (*cls.kept, ADDED_NAME)} | {JSON_NAME: path}
        return cls({name: file.read_bytes() for name, file in paths.items() if file.is_file()})

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in one of the files, empty without it."""
        with reading(name):
            return {**json.loads(self.get(name, b"{}"))}

    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json and special_tokens_map.json together, as in transformers."""
        config, named = self.object(CONFIG_NAME), self.object(SPECIALS_NAME)
        return named | config if "added_tokens_decoder" in config else config | named

    def template(self) -> str:
        """The chat template: the default one of several; "" without any."""
        if TEMPLATE_NAME in self:
            with reading(TEMPLATE_NAME):
                return self[TEMPLATE_NAME].decode()
        template = self.object(CONFIG_NAME).get("chat_template") or ""
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if isinstance(template, dict):
            template = template.get("default") or ""
        if not isinstance(template, str):
            raise ValueError(f"its chat template is of type {type(template).__name__}, not a text")
        return template

    def named_tokens(self) -> dict[str, str]:
        """What a chat template may call by name: `bos_token`, `eos_token`, ..."""
        named = self.settings().items()
        return {name: x for name, v in named if name.endswith("_token") and (x := _content(v))}

    def special_texts(self) -> set[str]:
        """The texts of special tokens, with a name or without."""
        config = self.settings()
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
        more = more.values() if isinstance(more, dict) else more
        return {*self.named_tokens().values(), *filter(None, map(_content, more))}

    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokens that the files add to a vocabulary, as a tokenizer.json lists them."""
        listed = self.object(CONFIG_NAME).get("added_tokens_decoder")
        tokens = [*(self.object(JSON_NAME).get("added_tokens") or ())]
        if listed is None:
            special, plain = self.special_texts(), self.object(ADDED_NAME)
            listed = {i: {"content": x, "special": x in special} for x, i in plain.items()}
        known = {token["content"] for token in tokens}
        for i, token in listed.items():
            if token["content"] not in known:
                tokens.append(added_token(token["content"], int(i), False) | token)
        return tokens

    def tokenizer_object(self) -> dict[str, Any]:
        """The content of tokenizer.json, where tokens that the other files name are special."""
        data = self.object(JSON_NAME)
        vocabulary = data["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            vocabulary = {text: i for i, (text, _) in enumerate(vocabulary)}
        if max(vocabulary.values()) >> 24:
            raise ValueError("it has a token id above 2**24, which no model has")
        added = {token["content"]: token for token in self.added_tokens()}
        for text in self.special_texts():
            if text in added:
                added[text] = added[text] | {"special": True}
            elif text in vocabulary:  # what is in neither has no row in the model
                added[text] = added_token(text, vocabulary[text], True)
        return data | {"added_tokens": sorted(added.values(), key=lambda token: token["id"])}

    def prefixes_every_span(self) -> bool:
        """Whether text has a dummy prefix behind added tokens too, not only where it begins."""
        if JSON_NAME not in self:
            return bool(self.settings().get("legacy", True))
        return '"first"' not in json.dumps(self.object(JSON_NAME).get("pre_tokenizer"))

    def converted(self, vocabulary: Vocabulary, names: Mapping[str, str]) -> dict[str, bytes]:
        """The files of a JsonTokenizer: a SentencePiece model, whose own specials are `names`."""
        texts = dict(enumerate(vocabulary.tokens))
        added = [token | {"normalized": False} for token in self.added_tokens()]
        texts |= {token["id"]: token["content"] for token in added}
        ids = {text: i for i, text in texts.items()}
        for token in added:
            text, i = token["content"], token["id"]
            if texts[i] != text or ids[text] != i or len(ids) < len(texts) or i < 0:
                raise ValueError(f"the id {i} of the added token {text!r} is not its alone")
        config = {**names, **self.settings()}
        data = tokenizer_json(
            vocabulary._replace(tokens=[texts[i] for i in range(len(vocabulary.tokens))]),
            _content(config["bos_token"]) if config.get("add_bos_token", True) else None,
            added=added,
            prefix=EVERYWHERE if self.prefixes_every_span() else FIRST,
        )
        config.pop("added_tokens_decoder", None)
        template = {TEMPLATE_NAME: self[TEMPLATE_NAME]} if TEMPLATE_NAME in self else {}
        return encoded(data, config) | template


def encoded(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of a tokenizer.json and a tokenizer_config.json of these contents."""
    # Classes named after a model make transformers rebuild the tokenizer.
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {JSON_NAME: data, CONFIG_NAME: config}
    return {name: json.dumps(x, ensure_ascii=False).encode() for name, x in files.items()}


def _content(token: object) -> str | None:
    """The text of a special token, which is written plainly or with flags; None: no token."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
