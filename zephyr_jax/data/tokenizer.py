"""The SentencePiece tokenizer: text to ids and back, with the rules that the masks rest on.

What everything else relies on, and what `Tokenizer` therefore checks when it is built: BPE with
byte fallback, text that comes back as it went in, a dummy prefix `▁` before every stretch, and a
newline that is always the one token `<0x0A>`, so that nothing merges across it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

FILE_NAME = "tokenizer.model"
_PROBE = " a  ﬁ½ \t é\u3000语\r\n  12\u200d \x01 b "


class Tokenizer:
    """A SentencePiece BPE model; it pickles as its bytes and loads again where it is first used.

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
                "the identity normaliser, a dummy prefix, bos and eos, or use Mistral's"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in the SentencePiece file `path`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no SentencePiece model, or breaks a rule of this module.
        """
        path = Path(path)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder; name the file {FILE_NAME} inside it")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; name a SentencePiece {FILE_NAME}")
        return cls(path.read_bytes(), str(path))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in `folder/tokenizer.model`.

        Raises:
            FileNotFoundError: if the folder holds none, saying where to take it from.
            ValueError: as `from_file`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder that could hold a {FILE_NAME}")
        if not (folder / FILE_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {FILE_NAME} (a tokenizer.json is not read); copy the "
                "SentencePiece file of the model that it was trained from into it"
            )
        return cls.from_file(folder / FILE_NAME)

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

    def encode(self, text: str, legacy_specials: bool = False) -> list[int]:
        r"""The ids of `text`, without BOS.

        The whole text is one stretch: a `</s>` that a user typed is encoded as the characters it
        is. With `legacy_specials` the literals `<unk>`, `<s>` and `</s>` become their tokens and
        every stretch between them gets a dummy prefix of its own, as in Hugging Face.

        Example (Mistral): "\nHello" gives [28705, 13, 16230], which is `▁`, `<0x0A>`, `Hello`.

        Raises:
            ValueError: if `text` holds half of a surrogate pair and so is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate {text[error.start]!r} at character {error.start}; "
                "replace it, for instance by text.encode('utf-8', 'replace').decode()"
            ) from error
        if not legacy_specials:
            return self._sp.encode(text)
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
            elif part:
                ids += self._sp.encode(part)
        return ids

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.specials))})")

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, specials left out; the inverse of `encode`.

        The dummy prefix is dropped at the start and after every special. With `continuation` the
        ids follow other tokens (an answer after its header), so a leading blank is text and stays.
        Bytes that are no UTF-8, such as the first half of an emoji, read as U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
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

    def stream(self, ids: Iterable[int], continuation: bool = True) -> Iterator[str]:
        """Yields the text that each further id makes certain; the parts join to `decode(ids)`.

        The growing list is decoded anew for every id, and what ends in U+FFFD is held back: it may
        be a character of which some bytes are still to come.
        """
        seen: list[int] = []
        done = 0
        for token in ids:
            seen.append(token)
            certain = self.decode(seen, continuation).rstrip("\ufffd")
            yield certain[done:]
            done = max(done, len(certain))
        yield self.decode(seen, continuation)[done:]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `folder/tokenizer.model`, byte for byte the file it came from; its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        temporary.write_bytes(self.model_bytes)
        os.replace(temporary, path)
        return path


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
        return "it normalises text (the identity is needed; extra blanks must stay)"
    if sp.id_to_piece(sp.encode("\n")) != ["▁", "<0x0A>"]:
        return f"a newline gives {sp.id_to_piece(sp.encode(chr(10)))}, not ▁ and <0x0A>"
    return None
