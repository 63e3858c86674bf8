"""A Mistral or Llama model's tokenizer.model, whose chats are in Zephyr's format."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import sentencepiece
from etils import epath

from zephyr_jax.data.text.base import Tokenizer, check_ids, check_text
from zephyr_jax.storage import write_atomic

FILE_NAME = "tokenizer.model"
_PROBE = " a  ﬁ½ \t é\u3000语\r\n  12\u200d \x01 b "


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model.

    Checked when it is built: BPE with byte fallback, text that comes back as it went in, a dummy
    prefix `▁` before every span between specials, a newline that is always `<0x0A>`, so that
    nothing merges across it. Padding is the unknown token, which byte fallback leaves unused:
    masking padding by its id hides no text.

    Raises:
        ValueError: if the bytes are not a SentencePiece model, or one that breaks a rule above.
    """

    chat_template = chat_format = None

    def __init__(self, model_bytes: bytes, source: str = "the tokenizer model") -> None:
        self.model_bytes, self.source = model_bytes, source
        try:
            self._sp: Any = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise ValueError(
                f"{source} ({len(model_bytes)} bytes) is not a SentencePiece model; copy or "
                f"download {FILE_NAME} again"
            ) from error
        if broken := _broken_rule(self._sp):
            raise ValueError(
                f"{source} cannot be used: {broken}; train a BPE model with byte_fallback, "
                "the identity normalizer, a dummy prefix, bos and eos, or use Mistral's"
            )
        sp = self._sp
        self.digest = hashlib.sha256(model_bytes).hexdigest()
        self.bos_id, self.eos_id, self.unk_id = sp.bos_id(), sp.eos_id(), sp.unk_id()
        self.pad_id = self.unk_id
        self.vocab_size = sp.get_piece_size()
        special = [i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i)]
        self.specials = {sp.id_to_piece(i): i for i in special}
        named = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        self.tokens = {f"{name}_token": sp.id_to_piece(i) for name, i in named.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model_bytes, self.source)

    def merge_pieces(self) -> dict[str, tuple[int, float]]:
        """Text -> (id, score) of every entry that merges can make; the higher score merges first.

        Bytes and specials are not among them.
        """
        return {self.piece(i): (i, self._sp.get_score(i)) for i in _normal_ids(self._sp)}

    def piece(self, token: int) -> str:
        """The text of one vocabulary entry, with `▁` for a blank and `<0x0A>` for a byte."""
        return self._sp.id_to_piece(int(token))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        r"""The ids of `text`, as in `Tokenizer`.

        With `parse_special` every span between `<unk>`, `<s>` and `</s>` gets a dummy prefix of
        its own, as in Hugging Face.

        Example (Mistral): "\nHello" gives [28705, 13, 16230], which is `▁`, `<0x0A>`, `Hello`.
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
        """The text of `ids`, as in `Tokenizer`; the dummy prefix of every span is dropped."""
        ids = [int(token) for token in ids]
        check_ids(ids, self.vocab_size)
        specials = frozenset(self.specials.values())
        spans = itertools.groupby(ids, specials.__contains__)
        text = "".join(self._sp.decode(list(span)) for special, span in spans if not special)
        blank_first = ids[:1] and ids[0] not in specials and self.piece(ids[0]).startswith("▁")
        return " " + text if continuation and blank_first else text

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes `folder/tokenizer.model`, byte for byte the original file; returns its path."""
        return write_atomic(epath.Path(folder) / FILE_NAME, self.model_bytes)


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
            return f"entry {i} ({piece!r}) contains a newline, across which nothing may merge"
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
