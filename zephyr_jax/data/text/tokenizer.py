"""Tokenizers: text to ids and back, with the rules that the masks rest on.

`Tokenizer` is what the rest of the package knows. A `SentencePieceTokenizer` is a Mistral or Llama
model's tokenizer.model, whose chats are in Zephyr's template; `json_tokenizer` has
the other kind, a tokenizer.json with the chat template of its own model.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
from absl import logging
from etils import epath

from zephyr_jax.data.text import tokenizer_files
from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE, renders_as_zephyr
from zephyr_jax.storage import write_atomic

FILE_NAME, JSON_NAME = "tokenizer.model", tokenizer_files.JSON_NAME
_PROBE = " a  ﬁ½ \t é\u3000语\r\n  12\u200d \x01 b "


class Tokenizer(abc.ABC):
    """Text to token ids and back. It pickles as its files and loads again where it is first used.

    In text from outside, a literal special token (`</s>`) is the characters that it is.
    """

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a tokenizer.json (and the files beside it), or a SentencePiece file.

        Raises:
            FileNotFoundError: if there is no such file.
            ModuleNotFoundError: if it is JSON and the package `tokenizers` is not installed.
            ValueError: if it is no tokenizer, or one that breaks a rule of its kind.
        """
        path = epath.Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path} {what}; name the file {FILE_NAME} or {JSON_NAME}")
        if path.suffix != ".json":
            return SentencePieceTokenizer(path.read_bytes(), str(path))
        from zephyr_jax.data.text.json_tokenizer import JsonTokenizer  # which imports this module

        return JsonTokenizer(tokenizer_files.read_files(path), str(path))

    @staticmethod
    def from_folder(folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a model's folder.

        A tokenizer.model counts where its chats are Zephyr's: beside no chat template, or beside
        one that renders what ours renders. Otherwise a tokenizer.json does, with its template.

        Raises:
            FileNotFoundError: if the folder holds neither, saying where to take one from.
            ModuleNotFoundError: as `from_file`; also if jinja2 is needed and not installed.
            ValueError: as `from_file`.
        """
        folder = epath.Path(folder)
        model, fast = folder / FILE_NAME, folder / JSON_NAME
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder that could hold a {FILE_NAME}")
        if not model.is_file() and not fast.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {FILE_NAME} and no {JSON_NAME}; copy the tokenizer's files of "
                "the model that it was trained from into it"
            )
        if not model.is_file():
            return Tokenizer.from_file(fast)
        files = tokenizer_files.read_files(fast)
        template = tokenizer_files.template_of(files, str(folder))
        if not fast.is_file():
            if template not in ("", CHAT_TEMPLATE):
                logging.warning(
                    "%s has a chat template of its own, which takes a %s: chats are Zephyr's",
                    *(folder, JSON_NAME),
                )
            return Tokenizer.from_file(model)
        try:
            tok = SentencePieceTokenizer(model.read_bytes(), str(model))
        except ValueError as error:
            logging.info("%s; taking %s", error, fast)
            return Tokenizer.from_file(fast)
        told = tokenizer_files.read_object(files, JSON_NAME, str(folder)).get("added_tokens") or []
        pieces = dict(enumerate(map(tok.piece, range(tok.vocab_size)))) if told else {}
        if more := [t["content"] for t in told if t["content"] != pieces.get(t["id"])]:
            logging.info("%s lacks %s; taking %s", model, ", ".join(more[:3]), fast)
            return Tokenizer.from_file(fast)
        ours = {"bos_token": tok.piece(tok.bos_id), "eos_token": tok.piece(tok.eos_id)}
        theirs = ours | tokenizer_files.named_tokens(files, str(folder))
        zephyr = not template or renders_as_zephyr(template, theirs, ours)
        return tok if zephyr else Tokenizer.from_file(fast)

    @functools.cached_property
    @abc.abstractmethod
    def digest(self) -> str:
        """The sha256 of the tokenizer's files, in hexadecimal."""

    @property
    @abc.abstractmethod
    def bos_id(self) -> int | None:
        """The id of the begin-of-text token; None where there is none."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The id of the token that ends a turn, such as `</s>`."""

    @property
    @abc.abstractmethod
    def pad_id(self) -> int:
        """An id for padding. Masks come from positions, never from ids."""

    @functools.cached_property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """The number of pieces; ids are below it."""

    @functools.cached_property
    @abc.abstractmethod
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, by their text."""

    @functools.cached_property
    @abc.abstractmethod
    def chat_template(self) -> str | None:
        """The Jinja text of the model's own chat template; "": it has none; None: Zephyr's."""

    @abc.abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of `text`, without BOS; with `parse_special` literal specials are tokens.

        Raises:
            ValueError: if `text` holds half of a surrogate pair and so is no Unicode text.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, specials left out; the inverse of `encode`.

        With `continuation` the ids follow other tokens (an answer after its header), so a leading
        blank is text and stays. Bytes that are no UTF-8, such as the first half of an emoji, read
        as U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the tokenizer's files, byte for byte as they came; the path of the main one."""

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a literal special token, the longest where several begin."""
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def stream(self, ids: Iterable[int], continuation: bool = True) -> Iterator[str]:
        """Yields the text that each further id makes certain; the parts join to `decode(ids)`.

        What ends in U+FFFD is held back: it may be a character of which some bytes are still to
        come. The last ids are decoded anew for every id; those before them are let go of where
        the text is certain and no special token, after which a blank may be dropped, stands last.
        """
        specials = frozenset(self.specials.values())
        seen: list[int] = []
        done = 0
        for token in ids:
            seen.append(token)
            text = self.decode(seen, continuation)
            certain = text.rstrip("\ufffd")
            yield certain[done:]
            done = max(done, len(certain))
            if len(seen) >= 32 and certain == text and token not in specials:
                seen, done, continuation = [], 0, True
        yield self.decode(seen, continuation)[done:]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model.

    Checked when it is built: BPE with byte fallback, text that comes back as it went in, a dummy
    prefix `▁` before every stretch, a newline that is always `<0x0A>`, so that nothing merges
    across it.

    Raises:
        ValueError: if the bytes are no SentencePiece model, or one that breaks a rule above.
    """

    def __init__(self, model_bytes: bytes, source: str = "the tokenizer model") -> None:
        self.model_bytes = model_bytes
        try:
            broken = _broken_rule(self._sp)
        except RuntimeError as error:
            raise ValueError(
                f"{source} ({len(model_bytes)} bytes) is not a SentencePiece model; copy or "
                f"download {FILE_NAME} again"
            ) from error
        if broken:
            raise ValueError(
                f"{source} cannot be used: {broken}; train a BPE model with byte_fallback, "
                "the identity normalizer, a dummy prefix, bos and eos, or use Mistral's"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"model_bytes": self.model_bytes}

    @functools.cached_property
    def _sp(self) -> Any:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the model file, in hexadecimal."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @property
    def bos_id(self) -> int:
        """The id of the begin-of-text token, `<s>`."""
        return self._sp.bos_id()

    @property
    def eos_id(self) -> int:
        """The id of the end-of-turn token, `</s>`."""
        return self._sp.eos_id()

    @property
    def unk_id(self) -> int:
        """The id of the unknown token; byte fallback leaves it unused, so it can pad."""
        return self._sp.unk_id()

    @property
    def pad_id(self) -> int:
        """The unknown token: padding by it hides no text where somebody masks by ids."""
        return self.unk_id

    @functools.cached_property
    def chat_template(self) -> None:
        """None: chats are in Zephyr's template."""

    @functools.cached_property
    def vocab_size(self) -> int:
        """The number of pieces; ids are below it."""
        return self._sp.get_piece_size()

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """The control pieces and the unknown piece, by their text."""
        sp = self._sp
        ids = [i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i)]
        return {sp.id_to_piece(i): i for i in ids}

    def merge_pieces(self) -> dict[str, tuple[int, float]]:
        """Text -> (id, score) of every piece that merges can make; the higher score merges first.

        Bytes and specials are not among them.
        """
        sp = self._sp
        return {sp.id_to_piece(i): (i, sp.get_score(i)) for i in _normal_ids(sp)}

    def piece(self, token: int) -> str:
        """The text of one piece, with `▁` for a blank and `<0x0A>` for a byte."""
        return self._sp.id_to_piece(int(token))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        r"""The ids of `text`, without BOS.

        The whole text is one stretch: a `</s>` that a user typed is encoded as the characters it
        is. With `parse_special` the literals `<unk>`, `<s>` and `</s>` become their tokens and
        every stretch between them gets a dummy prefix of its own, as in Hugging Face.

        Example (Mistral): "\nHello" gives [28705, 13, 16230], which is `▁`, `<0x0A>`, `Hello`.

        Raises:
            ValueError: if `text` holds half of a surrogate pair and so is no Unicode text.
        """
        check_text(text)
        if not parse_special:
            return self._sp.encode(text)
        ids: list[int] = []
        for part in self.special_pattern.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
            elif part:
                ids += self._sp.encode(part)
        return ids

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, as in `Tokenizer`; the dummy prefix of every stretch is dropped."""
        specials = frozenset(self.specials.values())
        stretches: list[list[int]] = [[]]
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is not in a vocabulary of {self.vocab_size}")
            if token in specials:
                stretches.append([])
            else:
                stretches[-1].append(token)
        text = [self._sp.decode(stretch) for stretch in stretches]
        if continuation and self.piece((stretches[0] or [self.eos_id])[0]).startswith("▁"):
            text[0] = " " + text[0]
        return "".join(text)

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes `folder/tokenizer.model`, byte for byte the file it came from; its path."""
        return write_atomic(epath.Path(folder) / FILE_NAME, self.model_bytes)


def check_text(text: str) -> None:
    """Raises a ValueError if `text` holds half of a surrogate pair and so is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate {text[error.start]!r} at character {error.start}; "
            "replace it, for instance by text.encode('utf-8', 'replace').decode()"
        ) from error


def _normal_ids(sp: Any) -> list[int]:
    def special(i: int) -> bool:
        return sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i)

    return [i for i in range(sp.get_piece_size()) if not special(i)]


def _broken_rule(sp: Any) -> str | None:
    """What is wrong with the model in a few words, or None."""
    for name, token in (("bos", sp.bos_id()), ("eos", sp.eos_id()), ("unk", sp.unk_id())):
        if token < 0:
            return f"it has no {name} token"
    if not all(sp.is_byte(sp.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256)):
        return "it has no byte fallback"
    normal = _normal_ids(sp)
    for i, piece in zip(normal, sp.id_to_piece(normal), strict=True):
        if "\n" in piece:
            return f"piece {i} ({piece!r}) contains a newline, across which nothing may merge"
    # Scores of BPE are merge ranks; those of a unigram model are log-probabilities.
    if not all(float(sp.get_score(i)).is_integer() for i in normal):
        return "it is a unigram model, not BPE"
    if not sp.id_to_piece(sp.encode("a"))[0].startswith("▁"):
        return "it has no dummy prefix"
    if sp.decode(sp.encode(_PROBE)) != _PROBE:
        return "it normalizes text (the identity is needed; extra blanks must stay)"
    if sp.id_to_piece(sp.encode("\n")) != ["▁", "<0x0A>"]:
        return f"a newline gives {sp.id_to_piece(sp.encode(chr(10)))}, not ▁ and <0x0A>"
    return None
