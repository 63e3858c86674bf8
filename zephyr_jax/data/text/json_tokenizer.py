"""A tokenizer.json, as the package tokenizers reads it, and chats in its model's own template."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from absl import logging
from etils import epath

from zephyr_jax.data.text.chat import Messages, compile_template, renders_as_zephyr
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer, check_ids
from zephyr_jax.data.tokenizer_files import JSON_NAME, MODEL_NAME, TokenizerFiles, reading

MASK = "\U00100000"  # for private use: no template treats it as a blank, a quote or a line end


def read_folder(folder: epath.Path) -> Tokenizer:
    """`Tokenizer.from_folder`."""
    model, fast, tok = folder / MODEL_NAME, folder / JSON_NAME, None
    files = TokenizerFiles.read(fast)
    if model.is_file():
        try:
            tok = SentencePieceTokenizer(model.read_bytes(), str(model))
        except ValueError as error:
            if JSON_NAME not in files:
                raise
            logging.info("%s; taking %s", error, fast)
    with reading(folder):
        if tok and _is_equivalent(tok, files):
            return tok
        if tok and JSON_NAME not in files:
            logging.info("%s has chats or tokens of its own: added to %s", folder, model)
            names = {name: tok.tokens[name] for name in ("bos_token", "eos_token", "unk_token")}
            return JsonTokenizer(files.converted(tok.vocabulary, names), str(folder))
    if JSON_NAME not in files:
        raise FileNotFoundError(
            f"{folder} holds no {MODEL_NAME} and no {JSON_NAME}; copy the tokenizer's files of the "
            "model that it was trained from into it"
        )
    return JsonTokenizer(files, str(fast))


def _is_equivalent(tok: SentencePieceTokenizer, files: TokenizerFiles) -> bool:
    """Whether the files next to a tokenizer.model add no token to it and have Zephyr's chats."""
    for token in files.added_tokens():
        i, strips = token["id"], token.get("lstrip") or token.get("rstrip")
        if strips or i >= tok.vocab_size or tok.vocabulary.tokens[i] != token["content"]:
            return False
    named = tok.tokens | files.named_tokens()
    return not files.template() or (
        files.prefixes_every_span() and renders_as_zephyr(files.template(), named, tok.tokens)
    )


class JsonTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`, and the chat template of its model."""

    def __init__(self, files: Mapping[str, bytes], source: str = "the tokenizer") -> None:
        self.source = source
        kept = [name for name in TokenizerFiles.kept if name in files]
        self.files = TokenizerFiles({name: bytes(files[name]) for name in kept})
        parts = [f"{name} {len(c)}\n".encode() + c for name, c in sorted(self.files.items())]
        self.digest = hashlib.sha256(b"".join(parts)).hexdigest()
        self.chat_format = TemplateFormat(self)
        with reading(source):
            self._read()

    def _read(self) -> None:
        data = self.files.tokenizer_object()
        # A post-processor would cut blanks off the offsets; what it adds is not wanted either.
        data |= {"post_processor": None, "truncation": None, "padding": None}
        self._tok = tok = tokenizers.Tokenizer.from_str(json.dumps(data))
        self._text = copy.deepcopy(tok)  # for which literal special tokens are text
        self._text.encode_special_tokens = True
        fallback = range(256) if "ByteFallback" in repr(tok.decoder) else ()
        ids = {byte: tok.token_to_id(f"<0x{byte:02X}>") for byte in fallback}
        self._bytes = {i: byte for byte, i in ids.items() if i is not None}
        added = sorted(tok.get_added_tokens_decoder().items())
        self.specials = {token.content: i for i, token in added if token.special}
        self._plain = {i: token.content for i, token in added if not token.special}
        self._special_ids = frozenset(self.specials.values())
        self.added_ids = self._special_ids | self._plain.keys()
        self.vocab_size = 1 + max(tok.get_vocab(with_added_tokens=True).values())
        self.chat_template = self.files.template()
        self.tokens = self.files.named_tokens()
        ids = {name: tok.token_to_id(text) for name, text in self.tokens.items()}
        eos = ids.get("eos_token")
        if eos is None:
            raise ValueError(
                f"it names {self.tokens.get('eos_token')} as eos_token, which is not in its "
                "vocabulary; write the token that ends a turn into tokenizer_config.json next to it"
            )
        self.bos_id, self.eos_id = ids.get("bos_token"), eos
        self._reserved = self._special_ids - {ids.get("unk_token")}  # that stands for text, too
        padding = ids.get("pad_token"), ids.get("unk_token")
        self.pad_id = next((i for i in padding if i is not None and i != eos), eos)
        # Whether a text is encoded behind a special token as where a text begins
        self._begins_again = tok.encode(f"{tok.id_to_token(eos)}a").ids[1:] == tok.encode("a").ids

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self.files), self.source)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """As in `Tokenizer`; added tokens that are not special are always tokens."""
        text.encode()
        return _encode(self._tok, text).ids if parse_special else self._encode_text(text, False)[0]

    def _encode_text(self, text: str, behind: bool) -> tuple[list[int], list[int]]:
        """The ids of a text without special tokens, and at which character each begins.

        A text that stands `behind` another does not merge with it, and no blank is put before it.
        """
        head = MASK if behind else ""  # merges with nothing
        encoding = _encode(self._text, head + text)
        if not self._reserved.isdisjoint(encoding.ids):
            raise ValueError(
                f"{self.source} makes special tokens of what a user wrote; replace them in the "
                "text, or set parse_special"
            )
        starts = [start - len(head) for start, _ in encoding.offsets]
        n = sum(start < 0 for start in starts)
        return encoding.ids[n:], starts[n:]

    def encode_rendered(
        self, text: str, masked: str, behind: bool = False
    ) -> tuple[list[int], list[int]]:
        """The ids of a rendered chat, and at which character of `text` each token begins.

        `masked` is as long and differs from `text` at the special tokens that are to be text.
        """
        text.encode()
        whole = _encode(self._tok, masked)
        if masked == text and not behind:
            return whole.ids, [start for start, _ in whole.offsets]
        added = [
            (token, start, end)
            for token, (start, end) in zip(whole.ids, whole.offsets, strict=True)
            # The id of a special token stands for unknown characters, too.
            if token in self._plain
            or (token in self._special_ids and self.special_pattern.search(masked[start:end]))
        ]
        ids, starts, at = [], [], 0
        for token, start, end in [*added, (-1, len(text), len(text))]:
            between, begins = self._encode_text(text[at:start], behind)
            ids += [*between, token]
            starts += [*(at + begin for begin in begins), start]
            at, behind = end, not self._begins_again
        return ids[:-1], starts[:-1]

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """As in `Tokenizer`."""
        ids = [int(token) for token in ids]
        check_ids(ids, self.vocab_size)
        text, behind = "", continuation
        kinds = itertools.groupby(ids, lambda i: (i in self.added_ids, i in self._bytes))
        for (is_added, is_byte), group in kinds:
            if is_added:
                text += "".join(self._plain.get(i, "") for i in group)
                behind = behind and not self._begins_again
                continue
            if is_byte:  # the library reads every byte of a broken character as U+FFFD
                text += bytes(self._bytes[i] for i in group).decode("utf-8", "replace")
            else:  # a blank is dropped only where a text begins
                head = self._tok.encode("a").ids[-1:] if behind else []
                whole = self._tok.decode([*head, *group], skip_special_tokens=False)
                text += whole[len(self._tok.decode(head)) :]
            behind = True
        return text


def _encode(tok: Any, text: str) -> Any:
    """What the library makes of a text; a ValueError if it panics, as over a pattern."""
    try:
        return tok.encode(text)
    except BaseException as error:  # its panics are no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer gives a text up: {error}") from error


class TemplateFormat:
    """Chats in the template of a tokenizer's own model, encoded at once."""

    def __init__(self, tok: JsonTokenizer) -> None:
        self._tok = tok

    @functools.cached_property
    def render(self) -> Callable[..., str]:
        """Messages -> the text of the chat, BOS included where the template writes one."""
        tok = self._tok
        if not tok.chat_template:
            raise ValueError(
                f"{tok.source} comes without a chat template; put that of the model's chat "
                "version next to it as chat_template.jinja"
            )
        return compile_template(tok.chat_template, tok.tokens)

    def chat(
        self, messages: Messages, prompted: bool, parse_special: bool, loss_on_all: bool
    ) -> tuple[list[int], list[int]]:
        """As `render_chat`; what stands between two answers is a target if all its messages are."""
        text, messages, masked = self.masked(messages, prompted, parse_special)
        ids, starts = self._tok.encode_rendered(text, masked)
        trained = [message.get("train", True) for message in messages]
        if loss_on_all and all(trained):
            return ids, [1] * len(ids)
        wanted = [loss_on_all or mark for mark in trained]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and wanted[i]]
        try:
            spans = [self._span(messages, masked, i) for i in answers]
        except ValueError:
            if not prompted:
                raise
            answers = spans = []  # a prompt is not trained on
        parts, first = [], 0  # where each part of the text ends, and whether it is a target
        for i, (start, end) in zip(answers, spans, strict=True):
            parts += [(start, loss_on_all and all(trained[first:i])), (end, trained[i])]
            first = i + 1
        parts.append((len(text) + 1, loss_on_all and trained[-1]))
        return ids, [next(int(on) for end, on in parts if start < end) for start in starts]

    def answer(
        self, messages: Messages, prompt: list[int], content: str, parse_special: bool
    ) -> list[int]:
        """The ids of an answer to messages whose ids with a generation prompt are `prompt`."""
        whole = [*messages, {"role": "assistant", "content": content}]
        text, whole, masked = self.masked(whole, False, parse_special)
        start, end = self._span(whole, masked, len(messages))
        ids, _ = self._tok.encode_rendered(text[:end], masked[:end])
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        # A token would span the end of the prompt.
        return self._tok.encode_rendered(text[start:end], masked[start:end], behind=True)[0]

    def masked(
        self, messages: Messages, prompted: bool, parse_special: bool
    ) -> tuple[str, Messages, str]:
        """The text of a chat; messages and text with MASK in place of specials that users wrote."""
        text, pattern = self.render(messages, prompted), self._tok.special_pattern
        self._check_tools(messages, text, prompted)
        calls = json.dumps([m.get("tool_calls") for m in messages], ensure_ascii=False)
        if not parse_special and pattern.search(calls):
            raise ValueError(
                "a call of a tool spells a special token; set parse_special, or drop it"
            )
        spelled = [i for i, m in enumerate(messages) if pattern.search(m["content"])]
        if parse_special or not spelled:
            return text, messages, text
        hide = lambda content: pattern.sub(lambda match: MASK * len(match[0]), content)  # noqa: E731
        messages = [{**m, "content": hide(m["content"])} for m in messages]
        masked = self.render(messages, prompted)
        same = (a in (b, MASK) for a, b in zip(masked, text, strict=False))
        if len(masked) != len(text) or not all(same):
            raise ValueError(
                f"message {spelled[0]} spells a special token and the chat template alters its "
                "text, so that the two cannot be told apart; replace the token, or set "
                "parse_special"
            )
        return text, messages, masked

    def _check_tools(self, messages: Messages, text: str, prompted: bool) -> None:
        """Raises a ValueError if the template leaves out what a tool is asked or answers."""
        for i, message in enumerate(messages):
            other = {**message, "content": message["content"] + "?"}
            if calls := message.get("tool_calls"):
                call = {**calls[0], "function": {**calls[0]["function"], "name": "?"}}
                other = {**message, "tool_calls": [call, *calls[1:]]}
            elif message["role"] != "tool":
                continue
            if self.render([*messages[:i], other, *messages[i + 1 :]], prompted) == text:
                raise ValueError(
                    f"the chat template leaves out what message {i} ({message['role']}) has of a "
                    "tool; use one that shows it, or prepare without turns of tools"
                )

    def _span(self, messages: Messages, text: str, i: int) -> tuple[int, int]:
        """Where answer `i` begins in the text, behind its generation prompt, and its eos ends."""
        prompt, eos = self.render(messages[:i], True), self._tok.tokens["eos_token"]
        turn = self.render(messages[: i + 1])
        end = turn.rfind(eos, len(prompt)) + len(eos)
        if end < len(eos) or not turn.startswith(prompt) or not text.startswith(turn[:end]):
            raise ValueError(
                f"the chat template does not end message {i} with the eos_token {eos!r}, or "
                f"renders what precedes the end of message {i} otherwise where more follows; name "
                "the token that ends a turn as eos_token in tokenizer_config.json, or use a "
                "template that only appends"
            )
        return len(prompt), end
