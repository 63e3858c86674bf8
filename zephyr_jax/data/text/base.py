"""The interface of a tokenizer."""

from __future__ import annotations

import abc
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

if TYPE_CHECKING:
    from zephyr_jax.data.text.chat_template import TemplateFormat

Messages = Sequence[Mapping[str, Any]]


class PairIds(NamedTuple):
    """Token ids of a preference pair; `prompt + chosen` and `prompt + rejected` are its two chats.

    The prompt ends with the generation prompt, each answer with its `</s>` (or what follows it);
    with `score_header` the generation prompt begins both answers instead.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Tokenizer(abc.ABC):
    """Text to token ids and back. It pickles as the bytes of its files.

    In text from users, a literal special token (`</s>`) is encoded as its characters.
    """

    source: str  # what error messages call it
    digest: str  # the sha256 of its files, in hexadecimal
    bos_id: int | None  # the token that begins a text
    eos_id: int  # the token that ends a turn
    pad_id: int  # the token that pads in exports; eos only where there is no other
    vocab_size: int  # the least number above all ids
    specials: dict[str, int]  # the ids of the special tokens, by their text
    tokens: dict[str, str]  # the texts of special tokens by name: `bos_token`, `eos_token`, ...
    chat_template: str | None  # Jinja; "": the model has none; None: Zephyr's
    chat_format: TemplateFormat | None  # chats in the model's own template; None: Zephyr's

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer:
        """`zephyr_jax.data.text.tokenizer.from_file`."""
        from zephyr_jax.data.text import tokenizer  # which imports this module

        return tokenizer.from_file(path)

    @staticmethod
    def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
        """`zephyr_jax.data.text.tokenizer.from_folder`."""
        from zephyr_jax.data.text import tokenizer

        return tokenizer.from_folder(folder)

    @abc.abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of `text`, without BOS; with `parse_special` literal specials are tokens.

        A ValueError names half of a surrogate pair, which is not Unicode text.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids` without specials, the inverse of `encode`.

        The blank that the tokenizer puts before a text is dropped. With `continuation` the ids
        follow other tokens (an answer after its header), so a leading blank is text and stays.
        Bytes that are not UTF-8, such as the first half of an emoji, decode to U+FFFD. A ValueError
        names an id outside the vocabulary.
        """

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the original files, byte for byte; returns the path of the main one."""

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a literal special token, the longest where several begin."""
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def stream(self, ids: Iterable[int], continuation: bool = True) -> Iterator[str]:
        """Yields the text that each further id makes certain; the parts join to `decode(ids)`.

        A tail of U+FFFD is held back: it may be a character whose other bytes are still to come.
        Older ids are dropped once their text is certain and the last one is not a special token,
        after which a blank may be dropped.
        """
        specials = frozenset(self.specials.values())
        recent: list[int] = []
        done = 0
        for token in ids:
            recent.append(token)
            text = self.decode(recent, continuation)
            certain = text.rstrip("\ufffd")
            yield certain[done:]
            done = max(done, len(certain))
            if len(recent) >= 32 and certain == text and token not in specials:
                recent, done, continuation = [], 0, True
        yield self.decode(recent, continuation)[done:]


def check_text(text: str) -> None:
    """Raises a ValueError if `text` is not Unicode text but holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}; "
            "replace it, for instance by text.encode('utf-8', 'replace').decode()"
        ) from error


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises a ValueError if an id is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in a vocabulary of {vocab_size}")
