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
    """The token ids of a prompt: a string is one user turn, messages get the generation header."""
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
    """Raises a ValueError unless a model can reply to token ids; it calls the prompt `name`."""
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
    if not each or any(isinstance(prompt, dict) for prompt in each):
        raise ValueError(
            f"prompts is {_short(prompts)}; give a string, or a list of strings, message lists or "
            "token id lists"
        )
    rows = [prompt_ids(tok, prompt) for prompt in each]
    for i, row in enumerate(rows):
        check_ids(cfg, row, f"prompt {i}")
    return rows


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """The index where the stop string that is complete first begins; None if there is none."""
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


def _start(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: Any,
    sampling: SamplingParams,
    chunk: int | None,
    throughput: Throughput | None,
) -> tuple[list[list[int]], Iterator[None]]:
    """The ids of every reply, empty at first, and the steps that each add a chunk to them."""
    rows = _rows(cfg, tok, prompts)
    stop, ends = sampling.stop, sampling.stop_ids
    if ends is None:
        ends = tuple({tok.eos_id, cfg.eos_token_id})
    finished = np.zeros(len(rows), bool)  # by a stop string
    ids: list[list[int]] = [[] for _ in rows]

    def run() -> Iterator[None]:
        for new in decode(
            cfg,
            cast_params(cfg, params),
            rows,
            dataclasses.replace(sampling, stop_ids=ends),
            vocab=min(cfg.vocab_size, tok.vocab_size),
            chunk=chunk or (STOP_CHUNK if stop else None),
            finished=finished,
            throughput=throughput,
        ):
            for i, row in enumerate(new.tolist()):
                ids[i] += [token for token in row if token >= 0 and token not in ends]
                if stop and not finished[i]:
                    text = tok.decode(ids[i], continuation=True)
                    finished[i] = first_stop(text, stop) is not None
            yield

    return ids, run()


def _parts(
    tok: Tokenizer, ids: list[list[int]], steps: Iterator[None], stop: Sequence[str]
) -> Iterator[str]:
    """The parts of the first reply, as they are decoded."""

    def first() -> Iterator[int]:
        seen = 0
        for _ in steps:
            yield from ids[0][seen:]
            seen = len(ids[0])

    return (part for part in until_stop(tok.stream(first()), stop) if part)


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
        params: as from `init_params`.
        tok: the tokenizer.
        prompts: one string, or a list of strings (one user turn each), message lists or id lists.
        sampling: how replies are drawn and where they end; None: the defaults.
        on_text: called with each new part of the first prompt's reply as it is decoded.
        throughput: adds up tokens and seconds.
        **settings: fields of SamplingParams that replace those of `sampling`.
    """
    sampling = dataclasses.replace(sampling or SamplingParams(), **settings)
    chunk = None if on_text is None else STREAM_CHUNK
    ids, steps = _start(cfg, params, tok, prompts, sampling, chunk, throughput)
    if on_text is not None:
        for part in _parts(tok, ids, steps, sampling.stop):
            on_text(part)
    for _ in steps:
        pass  # the other replies may be longer
    texts = [tok.decode(reply, continuation=True) for reply in ids]
    return [text[: first_stop(text, sampling.stop)] for text in texts]


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
    ids, steps = _start(cfg, params, tok, [prompt], sampling, STREAM_CHUNK, None)
    return _parts(tok, ids, steps, sampling.stop)
