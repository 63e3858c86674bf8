"""A tokenizer.json with its model's own chat template, as the packages tokenizers and jinja2 read.

What it does with text is the file's affair. What is ours: which special tokens of a text are
tokens, where in the text each token begins, and that answers decode as they are streamed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from zephyr_jax.data.text.chat_template import ChatTemplate, require
from zephyr_jax.data.text.tokenizer import Tokenizer, check_text
from zephyr_jax.data.text.tokenizer_files import (
    CONFIG_NAME,
    FILES,
    JSON_NAME,
    TEMPLATE_NAME,
    named_tokens,
    template_of,
    tokenizer_object,
)
from zephyr_jax.storage import write_atomic

# Texts whose tokens do not merge with what follows, in one kind of tokenizer or another.
_BARRIERS = ("\n", ".\n", "|")
BLOT = "\U00100000"  # for private use: no template treats it as a blank, a quote or a line end
_ALIASES = range(0xF0000, 0xFFFFD)  # for private use, too


class JsonTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`, and the chat template of its model.

    Args:
        files: the bytes of "tokenizer.json" and, where the model has them, of
            "tokenizer_config.json", "chat_template.jinja" and "special_tokens_map.json".
        source: what error messages call it.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the files are no tokenizer, or name no end-of-turn token.
    """

    def __init__(self, files: Mapping[str, bytes], source: str = "the tokenizer") -> None:
        if JSON_NAME not in files:
            raise ValueError(f"{source} has no {JSON_NAME}; it has {', '.join(files) or 'nothing'}")
        self.files = {name: bytes(files[name]) for name in FILES if name in files}
        self.source = source
        if self._named("eos_token") is None:
            said = self.tokens.get("eos_token")
            raise ValueError(
                f"{source} names no eos_token that is in its vocabulary (it says {said!r}); write "
                f"the token that ends a turn into {CONFIG_NAME} beside it"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "source": self.source}

    @functools.cached_property
    def tokens(self) -> dict[str, str]:
        """The texts of the special tokens that have a name: `bos_token`, `eos_token`, ..."""
        return named_tokens(self.files, self.source)

    @functools.cached_property
    def _tok(self) -> Any:
        return self._load({})

    def _load(self, renamed: Mapping[str, str]) -> Any:
        """A `tokenizers.Tokenizer` that knows special tokens under other texts."""
        library = require("tokenizers")
        try:
            data = tokenizer_object(self.files, self.source)
            for token in data["added_tokens"]:
                token["content"] = renamed.get(token["content"], token["content"])
            # A post-processor would cut blanks off the offsets; what it adds is not wanted either.
            data |= {"post_processor": None, "truncation": None, "padding": None}
            return library.Tokenizer.from_str(json.dumps(data))
        except ValueError:
            raise
        except Exception as error:  # the package raises nothing narrower
            said = " ".join(str(error).split())
            raise ValueError(
                f"{self.source} is not read by the package tokenizers {library.__version__} "
                f"({said}); copy it again, or install a newer one"
            ) from error

    @functools.cached_property
    def _aliased(self) -> Any:
        return functools.lru_cache(maxsize=2)(self._with_aliases)

    def _with_aliases(self, first: int) -> tuple[Any, dict[str, str], dict[int, int]]:
        """The tokenizer that knows special k only as a run of character `first + k`.

        Returns it, special -> run (as long as the special), and its ids -> our ids.
        """
        runs = {text: chr(first + k) * len(text) for k, text in enumerate(self.specials)}
        tok = self._load(runs)
        added = [token.content for token in self._tok.get_added_tokens_decoder().values()]
        pairs = ((tok.token_to_id(runs.get(text, text)), text) for text in added)
        return tok, runs, {theirs: self._tok.token_to_id(text) for theirs, text in pairs}

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the names and bytes of all files, in hexadecimal."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def _named(self, name: str) -> int | None:
        return self._tok.token_to_id(self.tokens[name]) if name in self.tokens else None

    @property
    def bos_id(self) -> int | None:
        """The id of the begin-of-text token; None where there is none."""
        return self._named("bos_token")

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a turn."""
        return self.specials[self.tokens["eos_token"]]

    @property
    def pad_id(self) -> int:
        """The padding token unless that is eos; else the unknown token, else eos."""
        pad, unk = self._named("pad_token"), self._named("unk_token")
        pad = unk if pad in (None, self.eos_id) else pad
        return self.eos_id if pad is None else pad

    @functools.cached_property
    def vocab_size(self) -> int:
        """The least number above all ids."""
        return 1 + max(self._tok.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """The ids of the special tokens, by their text."""
        added = self._tok.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @functools.cached_property
    def chat_template(self) -> str:
        """The Jinja text of the model's chat template; "" where it has none."""
        return template_of(self.files, self.source)

    @functools.cached_property
    def _compiled(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template, self.tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat in the model's own template, BOS included where that writes one.

        Raises:
            ModuleNotFoundError: if jinja2 is not installed.
            ValueError: if there is no template, or it refuses the messages.
        """
        if not self.chat_template:
            raise ValueError(
                f"{self.source} comes without a chat template; put that of the model's chat "
                f"version, or zephyr_jax.data.text.chat.CHAT_TEMPLATE, beside it as {TEMPLATE_NAME}"
            )
        return self._compiled.render(messages, add_generation_prompt)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of `text`, without BOS.

        Literal special tokens are encoded as the characters that they are; with `parse_special`
        they are tokens, as in Hugging Face. Added tokens that are not special are always tokens.

        Raises:
            ValueError: if `text` is no Unicode text, or gives a special token all the same.
        """
        return self.encode_rendered(text, text if parse_special else self.blotted(text))[0]

    def blotted(self, text: str) -> str:
        """The text with its literal special tokens blotted out, character by character."""
        return self.special_pattern.sub(lambda found: BLOT * len(found[0]), text)

    def encode_rendered(
        self, text: str, blotted: str, continuation: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of a rendered chat, and at which character of `text` each token begins.

        Args:
            text: what a template gave.
            blotted: the same with the special tokens blotted out that are not to be tokens.
            continuation: the text follows other text, with which it does not merge.

        Raises:
            ValueError: if `text` is no Unicode text, or plain text cannot be told from specials.
        """
        check_text(text)
        if continuation and self._begins_with_blank:
            return self._encode_behind(text, blotted)
        if blotted == text:
            encoding = self._tok.encode(text, add_special_tokens=False)
            return encoding.ids, [start for start, _ in encoding.offsets]
        n, seen = len(self.specials), set(map(ord, text))
        blocks = range(_ALIASES.start, _ALIASES.stop - n, n)
        first = next(block for block in blocks if seen.isdisjoint(range(block, block + n)))
        tok, runs, our_ids = self._aliased(first)
        aliased = self.special_pattern.sub(lambda found: runs[found[0]], blotted)
        shown = (a if t == b else t for t, b, a in zip(text, blotted, aliased, strict=True))
        encoding = tok.encode("".join(shown), add_special_tokens=False)
        ids = [our_ids.get(i, i) for i in encoding.ids]
        wanted = [self.specials[found] for found in self.special_pattern.findall(blotted)]
        told_apart = set(self.specials.values()) - {self._named("unk_token")}
        if [i for i in ids if i in told_apart] != [i for i in wanted if i in told_apart]:
            raise ValueError(
                f"{self.source} cannot keep the special tokens that a user wrote apart from its "
                "own; replace them in the text, or set parse_special"
            )
        return ids, [start for start, _ in encoding.offsets]

    def _encode_behind(self, text: str, blotted: str) -> tuple[list[int], list[int]]:
        """`encode_rendered` of what follows other text, where the start of a text gets a blank."""
        for barrier in _BARRIERS:
            ids, starts = self.encode_rendered(barrier + text, barrier + blotted)
            head = self._tok.encode(barrier, add_special_tokens=False).ids
            if ids[: len(head)] == head:
                return ids[len(head) :], [at - len(barrier) for at in starts[len(head) :]]
        raise ValueError(f"{self.source} cannot encode {text[:40]!r} apart from what precedes it")

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """Ids after which others are decoded as in the middle of a text, and their text's size."""
        ids = self._tok.encode("a", add_special_tokens=False).ids
        return ids, len(self._plain(ids))

    @functools.cached_property
    def _begins_with_blank(self) -> bool:
        """Whether the start of a text is encoded as if a blank preceded it."""
        return self._inner(self._anchor[0]).startswith(" ")

    @functools.cached_property
    def _resumes_with_blank(self) -> bool:
        """Whether that also holds for what follows a special token."""
        ids = self.encode(self.tokens["eos_token"] + "a", parse_special=True)
        return self._inner(ids[1:]).startswith(" ")

    @functools.cached_property
    def _bytes(self) -> dict[int, int]:
        """Token id -> byte of the pieces that stand for bytes."""
        if "ByteFallback" not in repr(self._tok.decoder):
            return {}
        ids = {self._tok.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {i: byte for i, byte in ids.items() if i is not None}

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of `ids`, specials left out; the inverse of `encode`.

        Where the tokenizer puts a blank before a text, it is dropped. With `continuation` the ids
        follow other tokens (an answer after its header), so a leading blank is text and stays.
        Bytes that are no UTF-8, such as the first half of an emoji, read as U+FFFD.

        Raises:
            ValueError: if an id is not in the vocabulary.
        """
        specials = frozenset(self.specials.values())
        text, fresh = "", not continuation
        for is_special, group in itertools.groupby(map(int, ids), specials.__contains__):
            stretch = list(group)
            if any(not 0 <= i < self.vocab_size for i in stretch):
                wrong = next(i for i in stretch if not 0 <= i < self.vocab_size)
                raise ValueError(f"token id {wrong} is not in a vocabulary of {self.vocab_size}")
            if is_special:
                fresh = fresh or self._resumes_with_blank
            else:
                text, fresh = text + self._stretch(stretch, fresh), False
        return text

    def _stretch(self, ids: list[int], fresh: bool) -> str:
        """The text of ids between two specials. The package reads a broken byte as many."""
        text = ""
        for is_byte, group in itertools.groupby(ids, self._bytes.__contains__):
            if is_byte:
                text += bytes(self._bytes[i] for i in group).decode("utf-8", "replace")
            else:
                text += (self._plain if fresh else self._inner)(list(group))
            fresh = False
        return text

    def _plain(self, ids: list[int]) -> str:
        return self._tok.decode(ids, skip_special_tokens=False)

    def _inner(self, ids: list[int]) -> str:
        anchor, size = self._anchor
        return self._plain(anchor + ids)[size:]

    def save(self, folder: str | os.PathLike[str]) -> epath.Path:
        """Writes the files into `folder`, byte for byte as they came; the tokenizer.json's path."""
        for name, content in self.files.items():
            write_atomic(epath.Path(folder) / name, content)
        return epath.Path(folder) / JSON_NAME
