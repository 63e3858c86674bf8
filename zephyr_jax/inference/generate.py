"""Replies as text: prompts to ids, ids to text as they are decoded, and what ends a reply."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.inference.decoding import Throughput, cast_params, decode
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.types import Params

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # a user's turn, messages, or token ids

STREAM_CHUNK = 4  # tokens between two looks at a reply that is streamed
STOP_CHUNK = 16  # the same if only stop strings are looked for: more, to stop the device less


def prompt_ids(tok: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string is one user turn, messages get the generation header.

    Raises:
        ValueError: if it is neither of them nor a list of ids, or the messages are no chat.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    parts: Any = _as_list(prompt)
    if parts and isinstance(parts[0], dict):
        return render_chat(tok, parts, add_generation_prompt=True)[0]
    try:
        return [operator.index(i) for i in parts]  # not int(), which would take 1.7 for 1
    except TypeError as error:
        raise ValueError(
            f"a prompt is {_short(prompt)}; give a string (one user turn), a list of messages "
            "(each with role and content) or a list of token ids"
        ) from error


def _as_list(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, (list, tuple, range, np.ndarray, jax.Array)) else None


def _short(value: Any) -> str:
    return " ".join(f"{value!r:.60}".split())


def check_ids(cfg: MistralConfig, ids: Sequence[int], name: str) -> None:
    """Checks that a model can reply to token ids; error messages call the prompt `name`.

    Raises:
        ValueError: if there are none, too many, or one outside the vocabulary.
    """
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    if len(ids) > cfg.max_position_embeddings:
        raise ValueError(
            f"{name} has {len(ids)} tokens, the model max_position_embeddings="
            f"{cfg.max_position_embeddings}; shorten it"
        )
    bad = next((token for token in ids if not 0 <= token < cfg.vocab_size), None)
    if bad is not None:
        raise ValueError(f"{name} has token id {bad}, the model ids 0 to {cfg.vocab_size - 1}")


def _rows(cfg: MistralConfig, tok: Tokenizer, prompts: Any) -> list[list[int]]:
    """The ids of every prompt, checked."""
    each = [prompts] if isinstance(prompts, str) else _as_list(prompts)
    if each is None:
        raise ValueError(
            f"prompts is {_short(prompts)}; give a string, or a list of strings, message lists or "
            "token id lists"
        )
    if not each:
        raise ValueError("there is no prompt; give at least one")
    if any(isinstance(prompt, dict) for prompt in each):
        raise ValueError("prompts is one list of messages; give a list of such lists")
    rows = [prompt_ids(tok, prompt) for prompt in each]
    for i, row in enumerate(rows):
        check_ids(cfg, row, f"prompt {i}")
    return rows


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins; None if there is none."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(ends)[1] if ends else None


def until_stop(parts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The parts of a text up to its first stop string.

    What could be the beginning of a stop string is held back until that is decided.
    """
    held = ""
    for part in parts:
        held += part
        at = first_stop(held, stop)
        if at is not None:
            yield held[:at]
            return
        lengths = (n for s in stop for n in range(1, len(s)) if held.endswith(s[:n]))
        safe = len(held) - max(lengths, default=0)
        yield held[:safe]
        held = held[safe:]
    yield held


class _Replies:
    """The replies of one call, as they are decoded."""

    def __init__(self, tok: Tokenizer, sampling: SamplingParams, n: int):
        self.finished = np.zeros(n, bool)  # by a stop string
        self.chunks: Iterator[np.ndarray] = iter(())
        self._tok, self._stop, self._stop_ids = tok, sampling.stop, sampling.stop_ids or ()
        self._ids: list[list[int]] = [[] for _ in range(n)]

    def texts(self) -> list[str]:
        """All replies, each cut off at its first stop string."""
        for chunk in self.chunks:
            self._add(chunk)
        texts = [self._text(i) for i in range(len(self._ids))]
        return [text[: first_stop(text, self._stop)] for text in texts]

    def stream(self) -> Iterator[str]:
        """The parts of the first reply, as they are decoded."""
        parts = until_stop(self._tok.stream(self._first()), self._stop)
        return (part for part in parts if part)

    def _first(self) -> Iterator[int]:
        for chunk in self.chunks:
            seen = len(self._ids[0])
            self._add(chunk)
            yield from self._ids[0][seen:]

    def _add(self, chunk: np.ndarray) -> None:
        for i, (ids, row) in enumerate(zip(self._ids, chunk.tolist(), strict=True)):
            ids += [token for token in row if token >= 0 and token not in self._stop_ids]
            if self._stop and not self.finished[i]:
                self.finished[i] = first_stop(self._text(i), self._stop) is not None

    def _text(self, i: int) -> str:
        return self._tok.decode(self._ids[i], continuation=True)


def _start(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: Any,
    sampling: SamplingParams,
    streamed: bool,
    throughput: Throughput | None,
) -> _Replies:
    rows = _rows(cfg, tok, prompts)
    if sampling.stop_ids is None:
        ends = tuple({tok.eos_id, cfg.eos_token_id})
        sampling = dataclasses.replace(sampling, stop_ids=ends)
    replies = _Replies(tok, sampling, len(rows))
    chunk = STOP_CHUNK if sampling.stop else None
    replies.chunks = decode(
        cfg,
        cast_params(cfg, params),
        rows,
        sampling,
        vocab=min(cfg.vocab_size, tok.vocab_size),
        chunk=STREAM_CHUNK if streamed else chunk,
        finished=replies.finished,
        throughput=throughput,
    )
    return replies


def generate(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: str | Sequence[Prompt],
    sampling: SamplingParams | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    throughput: Throughput | None = None,
    **settings: Any,
) -> list[str]:
    """One reply per prompt, without the stop token or stop string.

    Args:
        cfg: the architecture.
        params: its parameters.
        tok: its tokenizer.
        prompts: one string, or a list of strings (one user turn each), message lists or id lists.
        sampling: how replies are drawn and where they end; None: the defaults.
        on_text: called with each new part of the first prompt's reply as it is decoded.
        throughput: adds up tokens and seconds.
        **settings: fields of SamplingParams that replace those of `sampling`.

    Raises:
        ValueError: if there is no prompt, or a prompt or a setting is out of range.
    """
    sampling = dataclasses.replace(sampling or SamplingParams(), **settings)
    replies = _start(cfg, params, tok, prompts, sampling, on_text is not None, throughput)
    if on_text is not None:
        for text in replies.stream():
            on_text(text)
    return replies.texts()


def stream(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The parts of the reply to one prompt as they are decoded; they join to `generate`'s text.

    The arguments are those of `generate`, and so are the errors, which are raised at the call.
    """
    sampling = dataclasses.replace(sampling or SamplingParams(), **settings)
    return _start(cfg, params, tok, [prompt], sampling, True, None).stream()
