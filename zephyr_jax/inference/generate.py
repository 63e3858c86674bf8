"""Replies as text: prompts to ids, ids to text as they are decoded, and what ends a reply."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import tokenizers

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat import Messages, check_messages, render_chat
from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import JSON_NAME
from zephyr_jax.inference.decoding import cast_params, decode
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.types import Params

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # a user's turn, messages, or token ids

_END = "\U00100001 "  # for private use: marks where a message ends in a rendered chat
STREAM_CHUNK, STOP_CHUNK = 4, 16  # tokens between two looks at a reply: to show it, or to end it


def prompt_ids(tok: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string is one user turn, messages get the generation header.

    A last message of the assistant's is the beginning of the reply, which goes on behind it.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        parts: Any = list(prompt)
        if not parts or not isinstance(parts[0], dict):
            return [operator.index(i) for i in parts]  # not int(), which would take 1.7 for 1
    except TypeError as error:
        forms = "a string (one user turn), a list of messages (role and content) or of token ids"
        raise ValueError(f"a prompt is {_short(prompt)}; give {forms}") from error
    if parts[-1].get("role") == "assistant":
        return unfinished_ids(tok, parts)
    return render_chat(tok, parts, add_generation_prompt=True)[0]


def unfinished_ids(tok: Tokenizer, messages: Messages) -> list[int]:
    """The ids of a chat up to the end of its last message's content, which is to be continued."""
    template, encoder = tok.chat_format, cast(Any, tok)
    if template is None:
        ids, _ = render_chat(tok, messages)
        return ids[: -1 - len(tok.encode("\n"))]  # without the end of the turn
    check_messages(messages)
    last = {**messages[-1], "content": messages[-1]["content"] + _END}
    text, _, masked = template.masked([*messages[:-1], last], False, False)
    at = text.rfind(_END.strip())
    if at < 0:
        why = "the chat template leaves out the end of the last message"
        raise ValueError(f"{why}, so that it cannot be continued; end with a user's message")
    if not text.startswith(_END, at):  # the template strips a message
        at = len(text[:at].rstrip())
    return encoder.encode_rendered(text[:at], masked[:at])[0]


def _short(value: Any) -> str:
    return " ".join(f"{value!r:.60}".split())


@functools.cache
def adds_bos(tok: Any) -> bool:
    """Whether a text begins with BOS by the tokenizer's own files."""
    if not isinstance(tok, JsonTokenizer) or tok.bos_id is None:
        return tok.bos_id is not None
    original = tokenizers.Tokenizer.from_str(tok.files[JSON_NAME].decode())
    return original.encode("a").ids[:1] == [tok.bos_id]


def check_ids(cfg: MistralConfig, ids: Sequence[int], name: str) -> None:
    """Raises a ValueError unless a model can reply to token ids; it calls the prompt `name`."""
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    if len(ids) > cfg.max_position_embeddings:
        limit = f"the model max_position_embeddings={cfg.max_position_embeddings}"
        raise ValueError(f"{name} has {len(ids)} tokens, {limit}; shorten it")
    bad = next((token for token in ids if not 0 <= token < cfg.vocab_size), None)
    if bad is not None:
        raise ValueError(f"{name} has token id {bad}, the model ids 0 to {cfg.vocab_size - 1}")


class Reply:
    """One reply while it is decoded: ids in, text that can no longer change out.

    `finish` becomes "stop" at a stop id or at a stop string, before which the text ends.
    """

    def __init__(self, tok: Tokenizer, sampling: SamplingParams):
        self.finish: str | None = None
        self.length = 0  # characters so far, with those that are held back
        self._begins = dict.fromkeys(sampling.stop, 0)  # where in _held each may begin, at least
        self._stop_ids = sampling.stop_ids or ()
        self._tokens_left = sampling.min_new_tokens  # that no stop string ends
        self._ids: collections.deque[int] = collections.deque()
        self._texts = tok.stream(iter(lambda: self._ids.popleft() if self._ids else None, None))
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token makes certain."""
        if token in self._stop_ids:
            return self.end("stop")
        self._ids.append(token)
        self._tokens_left -= 1
        return self._certain(next(self._texts))  # takes exactly this id

    def end(self, finish: str) -> str:
        """Ends the reply; returns the text that was held back."""
        self.finish = finish
        return self._certain("".join(self._texts)) + self._held

    def _certain(self, text: str) -> str:
        self.length += len(text)
        text, begins = self._held + text, self._begins if self._tokens_left < 0 else {}
        for stop in begins:
            while not stop.startswith(text[begins[stop] : begins[stop] + len(stop)]):
                begins[stop] += 1
        whole = [(at + len(stop), at) for stop, at in begins.items() if at + len(stop) <= len(text)]
        if whole:  # the one that is complete first, and of several that end there the longest
            self.finish, self._held = "stop", ""
            return text[: min(whole)[1]]
        certain = min(begins.values(), default=len(text))
        begins.update({stop: at - certain for stop, at in begins.items()})
        self._held = text[certain:]
        return text[:certain]


def _token_rows(cfg: MistralConfig, tok: Tokenizer, prompts: Any) -> list[list[int]]:
    each = [prompts] if isinstance(prompts, str) else list(prompts)
    if not each or isinstance(prompts, dict) or isinstance(each[0], dict):
        forms = "a string, or a list of strings, message lists or token id lists"
        raise ValueError(f"prompts is {_short(prompts)}; give {forms}")
    rows = [prompt_ids(tok, prompt) for prompt in each]
    for i, row in enumerate(rows):
        check_ids(cfg, row, f"prompt {i}")
    return rows


def _steps(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    rows: list[list[int]],
    sampling: SamplingParams,
    chunk: int | None,
    numbers: Sequence[int] = (0,),
) -> Iterator[list[str]]:
    """What each chunk of tokens adds to every reply; `params` are those of `cast_params`."""
    if sampling.stop_ids is None:
        sampling = dataclasses.replace(sampling, stop_ids=(tok.eos_id, *cfg.end_ids))
    replies = [Reply(tok, sampling) for _ in rows]
    finished = np.zeros(len(rows), bool)
    more = {"vocab": min(cfg.vocab_size, tok.vocab_size), "chunk": chunk, "finished": finished}
    for new, _ in decode(cfg, params, rows, sampling, numbers=numbers, **more):
        yield [
            "".join(reply.add(i) for i in ids if i >= 0 and reply.finish is None)
            for reply, ids in zip(replies, new.tolist(), strict=True)
        ]
        finished[:] = [reply.finish is not None for reply in replies]
    yield ["" if reply.finish else reply.end("length") for reply in replies]


def generate_each(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: str | Sequence[Prompt],
    sampling: SamplingParams,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """The index of every prompt and its reply as they come, `batch_size` at a time (None: all).

    Prompts of about one length are a batch, the longest first: what does not fit into memory fails
    at once. A reply depends on its prompt, the seed and its own of `numbers` (None: the index), not
    on the batches. The prompts are checked at the call.
    """
    rows, params = _token_rows(cfg, tok, prompts), cast_params(cfg, params)
    chunk, size = STOP_CHUNK if sampling.stop else None, batch_size or len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)

    def run() -> Iterator[tuple[int, str]]:
        for batch in (order[at : at + size] for at in range(0, len(order), size)):
            own = batch if numbers is None else [numbers[i] for i in batch]
            steps = _steps(cfg, params, tok, [rows[i] for i in batch], sampling, chunk, own)
            yield from zip(batch, map("".join, zip(*steps, strict=True)), strict=True)

    return run()


def generate(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: str | Sequence[Prompt],
    sampling: SamplingParams | None = None,
    *,
    batch_size: int | None = None,
    **settings: Any,
) -> list[str]:
    """One reply per prompt, without the stop token or stop string.

    `prompts` are one string, or a list of strings (one user turn each), message lists or id lists.
    `settings` are fields of SamplingParams that replace those of `sampling` (None: the defaults).
    `batch_size` prompts are answered at a time (None: all), which changes no reply.
    """
    sampling = dataclasses.replace(sampling or SamplingParams(), **settings)
    each = generate_each(cfg, params, tok, prompts, sampling, batch_size)
    return [text for _, text in sorted(each)]


def stream(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The parts of one reply as they are decoded, with the arguments of `generate`."""
    sampling = dataclasses.replace(sampling or SamplingParams(), **settings)
    rows, params = _token_rows(cfg, tok, [prompt]), cast_params(cfg, params)
    steps = _steps(cfg, params, tok, rows, sampling, STREAM_CHUNK)
    return (parts[0] for parts in steps if parts[0])
