"""A tokenizer.json with its model's own chat template, as the packages tokenizers and jinja2 read.

The library tokenizes. Added are which special tokens of a chat are tokens, at which character each
token begins, and a decoder whose streamed parts join to the decoded whole.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from zephyr_jax.data import tokenizer_files
from zephyr_jax.data.text.chat_template import TemplateFormat
from zephyr_jax.data.text.tokenizer import Tokenizer, check_ids, check_text
from zephyr_jax.data.tokenizer_files import CONFIG_NAME, DOUBLED, FILES, JSON_NAME
from zephyr_jax.storage import write_atomic


class JsonTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`, and the chat template of its model.

    `files` has the bytes of "tokenizer.json" and of those other FILES that the model has. A
    ValueError says that they are not a tokenizer, or name no end-of-turn token.
    """

    def __init__(self, files: Mapping[str, bytes], source: str = "the tokenizer") -> None:
        self.files = {name: bytes(files[name]) for name in FILES if name in files}
        self.source = source
        parts = [f"{name} {len(c)}\n".encode() + c for name, c in sorted(self.files.items())]
        self.digest = hashlib.sha256(b"".join(parts)).hexdigest()
        self.tokens = tokenizer_files.named_tokens(self.files, source)
        self._tok = self._load()
        added = sorted(self._tok.get_added_tokens_decoder().items())
        self.specials = {token.content: i for i, token in added if token.special}
        self._plain = {i: token.content for i, token in added if not token.special}
        self._special_ids = frozenset(self.specials.values())
        self.added_ids = self._special_ids | self._plain.keys()
        self.vocab_size = 1 + max(self._tok.get_vocab(with_added_tokens=True).values())
        ids = {name: self._tok.token_to_id(text) for name, text in self.tokens.items()}
        if ids.get("eos_token") is None:
            raise ValueError(
                f"{source} names {self.tokens.get('eos_token')} as eos_token, which is not in its "
                f"vocabulary; write the token that ends a turn into {CONFIG_NAME} next to it"
            )
        self.bos_id, self.eos_id = ids.get("bos_token"), ids["eos_token"]
        self._unk_id = ids.get("unk_token")
        padding = [i for i in (ids.get("pad_token"), self._unk_id) if i is not None]
        self.pad_id = next((i for i in padding if i != self.eos_id), self.eos_id)
        self.chat_template = tokenizer_files.template_of(self.files, source)
        self.chat_format = TemplateFormat(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files, self.source)

    def _load(self, *, parse_special: bool = True, prefix: bool = True) -> Any:
        """A `tokenizers.Tokenizer`; without `prefix` it puts no blank before a text."""
        try:
            library: Any = importlib.import_module("tokenizers")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a tokenizer.json needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            data = tokenizer_files.tokenizer_object(self.files, self.source)
            # A post-processor would cut blanks off the offsets; what it adds is not wanted either.
            data |= {"post_processor": None, "truncation": None, "padding": None}
            if not prefix:
                for name in ("normalizer", "pre_tokenizer", "decoder"):
                    data[name] = _without_prefix(data.get(name))
            tok = library.Tokenizer.from_str(json.dumps(data))
        except ValueError:
            raise
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{self.source} is not read by the package tokenizers {library.__version__} "
                f"({error}); copy it again, or install a newer one"
            ) from error
        for token in data["added_tokens"]:
            if (i := tok.token_to_id(token["content"])) != token["id"]:
                raise ValueError(
                    f"{self.source} gives the added token {token['content']!r} the id "
                    f"{token['id']}, where the packages tokenizers and transformers read {i}; its "
                    "ids must have no gap and no two tokens"
                )
        tok.encode_special_tokens = not parse_special
        return tok

    @functools.cached_property
    def _text(self) -> Any:
        """The library's tokenizer for which literal special tokens are text."""
        return self._load(parse_special=False)

    @functools.cached_property
    def _inner(self) -> Any:
        """The same for what follows other text: no blank is put before it or dropped."""
        return self._load(parse_special=False, prefix=False)

    @functools.cached_property
    def _after_special(self) -> Any:
        """That of the two which encodes as the library does behind a special token."""
        behind = self._tok.encode(self.tokens["eos_token"] + "a").ids[1:]
        return self._inner if behind == self._inner.encode("a").ids else self._text

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of `text`, as in `Tokenizer`; added tokens that are not special are tokens."""
        check_text(text)
        if parse_special:
            return self._tok.encode(text).ids
        return self._encode_text(self._text, text).ids

    def _encode_text(self, tok: Any, text: str) -> Any:
        encoding = tok.encode(text)
        if self._special_ids.difference([self._unk_id]).intersection(encoding.ids):
            raise ValueError(
                f"{self.source} makes special tokens of what a user wrote; replace them in the "
                "text, or set parse_special"
            )
        return encoding

    def encode_rendered(
        self, text: str, masked: str, continuation: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of a rendered chat, and at which character of `text` each token begins.

        `masked` is as long and differs from `text` at the special tokens that are to be text. With
        `continuation` the text follows other text, with which it does not merge.
        """
        check_text(text)
        whole = self._tok.encode(masked)
        if masked == text and not continuation:
            return whole.ids, [start for start, _ in whole.offsets]
        added = [
            (token, start, end)
            for token, (start, end) in zip(whole.ids, whole.offsets, strict=True)
            if token in self._plain
            or (token in self._special_ids and self.special_pattern.search(masked[start:end]))
        ]
        ids, starts, at = [], [], 0
        tok = self._inner if continuation else self._text
        for token, start, end in [*added, (None, len(text), len(text))]:
            between = self._encode_text(tok, text[at:start])
            ids += between.ids
            starts += [at + begin for begin, _ in between.offsets]
            if token is not None:
                ids.append(token)
                starts.append(start)
            at, tok = end, self._after_special
        return ids, starts

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        """Token id -> byte of the vocabulary entries that stand for bytes."""
        if "ByteFallback" not in repr(self._tok.decoder):
            return {}
        ids = {self._tok.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {i: byte for i, byte in ids.items() if i is not None}

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, as in `Tokenizer`."""
        ids = [int(token) for token in ids]
        check_ids(ids, self.vocab_size)
        text = ""
        tok = self._inner if continuation else self._tok
        kinds = itertools.groupby(ids, lambda i: (i in self.added_ids, i in self._bytes))
        for (is_added, is_byte), group in kinds:
            if is_added:
                text += "".join(self._plain.get(i, "") for i in group)
                tok = self._after_special if tok is self._inner else tok
                continue
            if is_byte:  # the library reads every byte of a broken character as U+FFFD
                text += bytes(self._bytes[i] for i in group).decode("utf-8", "replace")
            else:
                text += tok.decode(list(group), skip_special_tokens=False)
            tok = self._inner
        return text

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the original files into `folder`; returns the path of tokenizer.json."""
        for name, content in self.files.items():
            write_atomic(epath.Path(folder) / name, content)
        return epath.Path(folder) / JSON_NAME


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer or decoder that neither adds nor drops a leading blank."""
    if part is None or part["type"] == "Prepend" or part == DOUBLED:
        return None
    for name in part.keys() & {"normalizers", "pretokenizers", "decoders"}:
        inner = [_without_prefix(step) for step in part[name]]
        part = part | {name: [step for step in inner if step is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part | {"start": 0} if part["type"] == "Strip" and "start" in part else part
