"""Tokenizers: the interface of both kinds, and the SentencePiece kind."""

from __future__ import annotations

import abc
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sentencepiece
from etils import epath

from zephyr_jax.data import tokenizer_files
from zephyr_jax.data.tokenizer_files import JSON_NAME, MODEL_NAME, Vocabulary
from zephyr_jax.storage import write_atomic

if TYPE_CHECKING:
    from zephyr_jax.data.text.json_tokenizer import TemplateFormat

_BLANK = re.compile("(?<=[^ ▁]) ")  # before a word, and before further blanks
_WORDS, _LONG_WORD = 1 << 16, 64  # words whose ids are kept; characters of a word that is not
_PROBE = " a  ﬁ½ \t é\u3000语\r\n  12\u200d \x01 b "


class Tokenizer(abc.ABC):
    """Text to token ids and back. It pickles as the bytes of its files."""

    source: str  # what error messages call it
    files: tokenizer_files.TokenizerFiles  # the original ones, the main one first
    digest: str  # the sha256 of its files, in hexadecimal
    bos_id: int | None  # the token that begins a text
    eos_id: int  # the token that ends a turn
    pad_id: int  # the token that pads in exports; eos only where there is no other
    vocab_size: int  # the least number above all ids
    specials: dict[str, int]  # the ids of the special tokens, by their text
    added_ids: frozenset[int]  # of these, and of other tokens that merge with no text
    tokens: dict[str, str]  # the texts of special tokens by name: `bos_token`, `eos_token`, ...
    chat_template: str | None  # Jinja; "": the model has none; None: Zephyr's
    chat_format: TemplateFormat | None  # chats in the model's own template; None: Zephyr's

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a tokenizer.json (and the files next to it), or a SentencePiece file."""
        from zephyr_jax.data.text.json_tokenizer import JsonTokenizer  # which imports this module

        path = epath.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; name a {MODEL_NAME} or {JSON_NAME}")
        if path.suffix == ".json":
            return JsonTokenizer(tokenizer_files.TokenizerFiles.read(path), str(path))
        return SentencePieceTokenizer(path.read_bytes(), str(path))

    @staticmethod
    def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a model's folder.

        A tokenizer.model is taken where its chats are Zephyr's: next to no chat template, or next
        to one that renders what ours renders. Otherwise a tokenizer.json is taken, or made of the
        model and what the other files add to it.
        """
        from zephyr_jax.data.text.json_tokenizer import read_folder  # which imports this module

        return read_folder(epath.Path(folder))

    @abc.abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of `text`, without BOS; literal specials are text, or tokens if parsed."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids` without specials, the inverse of `encode`.

        With `continuation` the ids follow other tokens (an answer after its header), so that a
        leading blank is text. Bytes that are not UTF-8, such as half of an emoji, decode to U+FFFD.
        """

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the original files, byte for byte; returns the path of the main one."""
        paths = [write_atomic(epath.Path(folder) / x, self.files[x]) for x in self.files]
        return paths[0]

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a literal special token, the longest where several begin."""
        return _any_of(self.specials)

    def stream(self, ids: Iterable[int], continuation: bool = True) -> Iterator[str]:
        """Yields the text that each further id makes certain; the parts join to `decode(ids)`.

        A tail of U+FFFD is held back: it may be a character whose other bytes are still to come.
        """
        recent, done = [], 0
        for token in ids:
            recent.append(token)
            text = self.decode(recent, continuation)
            certain = text.rstrip("\ufffd")
            yield certain[done:]
            done = max(done, len(certain))
            # Behind an added token a blank may be dropped, so the next ids depend on it.
            if len(recent) >= 32 and certain == text and token not in self.added_ids:
                recent, done, continuation = [], 0, True
        yield self.decode(recent, continuation)[done:]


class _WordIds(dict[str, tuple[int, ...]]):
    """The ids of words, kept since most come again and again; `encode` gives those of a new one."""

    encode: Callable[[str], tuple[int, ...]]

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= _WORDS:
            self.clear()
        ids = self.encode(word)
        return ids if len(word) > _LONG_WORD else self.setdefault(word, ids)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises a ValueError if an id is not in the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in a vocabulary of {vocab_size}")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model, as Mistral's and Llama's; its chats are in Zephyr's format.

    It must be BPE with byte fallback, give text back as it went in, put a dummy prefix `▁` before
    every span between specials, and make a newline `<0x0A>`, so that nothing merges across it.
    Padding is the unknown token, which byte fallback leaves unused. User-defined symbols are tokens
    wherever they stand, each with a prefix behind it.
    """

    chat_template = chat_format = None

    def __init__(self, model_bytes: bytes, source: str = "the tokenizer model") -> None:
        self.files, self.source = tokenizer_files.TokenizerFiles({MODEL_NAME: model_bytes}), source
        with tokenizer_files.reading(source):
            self._sp: Any = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
            self.vocabulary = Vocabulary.of_model(model_bytes)
            if not _is_usable(self._sp, self.vocabulary):
                raise ValueError(
                    "it must be a BPE model with byte_fallback, the identity normalizer, all "
                    "blanks kept, a dummy prefix, bos, eos and unk, and no newline in an entry; "
                    "use Mistral's"
                )
            sp = self._sp
            self.digest = hashlib.sha256(model_bytes).hexdigest()
            self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
            self.unk_id = self.pad_id = sp.unk_id()
            self.vocab_size = sp.get_piece_size()
            symbols = self.vocabulary.of_type(tokenizer_files.USER_DEFINED)
            self.specials = self.vocabulary.of_type(*tokenizer_files.SPECIAL)
            self._added = {False: symbols, True: symbols | self.specials}
            self._patterns = {key: _any_of(texts) for key, texts in self._added.items()}
            self._word_ids = None
            if not any(re.search("[^▁]▁", token) for token in self.vocabulary.tokens):
                # Nothing merges across a blank, which a word's dummy prefix stands for.
                self._word_ids, blank = _WordIds(), (sp.piece_to_id("▁"),)
                self._word_ids.encode = lambda word: tuple(sp.encode(word)) or blank
            self.added_ids = frozenset(self._added[True].values())
            named = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
            self.tokens = {f"{name}_token": sp.id_to_piece(i) for name, i in named.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files[MODEL_NAME], self.source)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        r"""As in `Tokenizer`: "\nHello" is `▁`, `<0x0A>`, `Hello` (Mistral: [28705, 13, 16230])."""
        text.encode()
        added = self._added[parse_special]
        if not added:
            return self._plain_ids(text)
        ids: list[int] = []
        for part in self._patterns[parse_special].split(text):
            if part in added:
                ids.append(added[part])
            elif part:
                ids += self._plain_ids(part)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """The ids of a text without tokens that stand alone, from those of its words."""
        simple = not (text.startswith(" ") or "  " in text or "▁" in text)
        words = text.split(" ") if simple else _BLANK.split(text)
        if not text or self._word_ids is None:
            return self._sp.encode(text)
        return list(itertools.chain.from_iterable(map(self._word_ids.__getitem__, words)))

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, as in `Tokenizer`; the dummy prefix of every span is dropped."""
        ids = [int(token) for token in ids]
        check_ids(ids, self.vocab_size)
        specials = frozenset(self.specials.values())
        spans = itertools.groupby(ids, lambda i: (i in specials, i in self.added_ids))
        text = "".join(self._sp.decode(list(span)) for (special, _), span in spans if not special)
        begin = self.vocabulary.tokens[ids[0]] if ids and ids[0] not in specials else ""
        return " " + text if continuation and begin.startswith("▁") else text


def _is_usable(sp: Any, vocabulary: Vocabulary) -> bool:
    """Whether a model keeps the rules of `SentencePieceTokenizer`."""
    normal = vocabulary.of_type(tokenizer_files.NORMAL, tokenizer_files.USER_DEFINED)
    return (
        min(sp.bos_id(), sp.eos_id(), sp.unk_id()) >= 0
        and all(sp.is_byte(sp.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256))
        # Scores of BPE are merge ranks; those of a unigram model are log-probabilities.
        and all(vocabulary.scores[i].is_integer() for i in normal.values())
        and sp.id_to_piece(sp.encode("a"))[0].startswith("▁")
        and sp.decode(sp.encode(_PROBE)) == _PROBE
        and not any("\n" in piece for piece in normal)
        and sp.id_to_piece(sp.encode("\n")) == ["▁", "<0x0A>"]
    )
