"""Replies as text: prompts to ids, ids to text as they come, and what ends a reply."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.inference.decoding import Speed, cast_params, decode
from zephyr_jax.inference.sampling import Sampling
from zephyr_jax.types import Params

Prompt = str | Sequence[dict[str, str]] | Sequence[int]  # a user's turn, messages, or token ids

SHOWN_AT_ONCE = 4  # tokens between two looks at the reply, where somebody reads along
LOOKED_AT_ONCE = 16  # the same where only a stop string may occur: more, to stop the device less


def prompt_ids(tok: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: a string is one user turn, messages get the generation header.

    Raises:
        ValueError: if it is neither of them nor a list of ids, or the messages are no chat.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    members: Any = _members(prompt)
    if members and isinstance(members[0], dict):
        return render_chat(tok, members, add_generation_prompt=True)[0]
    try:
        return [operator.index(i) for i in members]  # not int(), which would take 1.7 for 1
    except TypeError as error:
        raise ValueError(
            f"a prompt is {_shown(prompt)}; give a string (one user turn), a list of messages "
            "(each with role and content) or a list of token ids"
        ) from error


def _members(given: Any) -> list[Any] | None:
    """What a list, an array or their like holds; None of a text, a mapping or a single value."""
    if isinstance(given, (str, bytes, bytearray, Mapping)):
        return None
    try:
        return list(given)
    except TypeError:
        return None


def _shown(given: Any) -> str:
    return " ".join(f"{given!r:.60}".split())


class _Replies:
    """The ids of every reply so far, and which replies a stop string has ended."""

    def __init__(self, tok: Tokenizer, n: int, stop_ids: set[int], stop: Sequence[str]):
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.finished = np.zeros(n, bool)
        self._tok, self._stop_ids, self._stop = tok, stop_ids, stop

    def add(self, new: np.ndarray) -> None:
        """Takes one portion, `B N`."""
        for i, (ids, row) in enumerate(zip(self.ids, new.tolist(), strict=True)):
            ids += [token for token in row if token >= 0 and token not in self._stop_ids]
            if self._stop and not self.finished[i]:
                self.finished[i] = first_stop(self._text(i), self._stop) is not None

    def texts(self) -> list[str]:
        """The replies, each cut off at its first stop string."""
        texts = [self._text(i) for i in range(len(self.ids))]
        return [text[: first_stop(text, self._stop)] for text in texts]

    def _text(self, i: int) -> str:
        return self._tok.decode(self.ids[i], continuation=True)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins; None where there is none."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(found)[1] if found else None


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to its first stop string.

    What could be the beginning of one is held back until it is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        at = first_stop(held, stop)
        if at is not None:
            yield held[:at]
            return
        lengths = (n for s in stop for n in range(1, len(s)) if held.endswith(s[:n]))
        safe = len(held) - max(lengths, default=0)
        yield held[:safe]
        held = held[safe:]
    yield held


class _Job:
    """One call of `generate` or `stream`, checked; the arguments are theirs."""

    def __init__(
        self,
        cfg: MistralConfig,
        params: Params,
        tok: Tokenizer,
        prompts: str | Sequence[Prompt],
        watched: bool,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        first_row: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        speed: Speed | None = None,
    ):
        sampling = Sampling(temperature, top_k, top_p, min_p)
        _check(sampling, max_new_tokens, seed, first_row)
        rows = _rows(tok, prompts)
        for i, row in enumerate(rows):
            check_ids(cfg, row, f"prompt {i}")
        stop = _stop_strings(stop)
        stops = {tok.eos_id, cfg.eos_token_id} if stop_ids is None else _stop_ids(stop_ids)
        self._tok, self._stop = tok, stop
        self._replies = _Replies(tok, len(rows), stops, stop)
        self._portions = decode(
            cfg,
            cast_params(cfg, params),
            rows,
            limit=max_new_tokens,
            sampling=sampling,
            stop_ids=tuple(sorted(stops)),
            seed=seed,
            first_row=first_row,
            vocab=min(cfg.vocab_size, tok.vocab_size),
            portion=SHOWN_AT_ONCE if watched else LOOKED_AT_ONCE if stop else None,
            finished=self._replies.finished,
            speed=speed,
        )

    def pieces(self) -> Iterator[str]:
        """The first prompt's reply, as it is made."""
        pieces = until_stop(self._tok.stream(self._first()), self._stop)
        return (piece for piece in pieces if piece)

    def texts(self) -> list[str]:
        """All replies, once they are made."""
        for new in self._portions:
            self._replies.add(new)
        return self._replies.texts()

    def _first(self) -> Iterator[int]:
        for new in self._portions:
            seen = len(self._replies.ids[0])
            self._replies.add(new)
            yield from self._replies.ids[0][seen:]


def generate(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    first_row: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    speed: Speed | None = None,
) -> list[str]:
    """One reply per prompt, without the stop token or stop string.

    The filters apply in the order temperature, top_k, top_p, min_p, as in transformers (llama.cpp
    divides by the temperature last).

    Args:
        cfg: the architecture.
        params: its parameters.
        tok: its tokenizer.
        prompts: one string, or a list of strings (one user turn each), message lists or id lists.
        max_new_tokens: the longest reply, in tokens; it also ends where the model's positions do.
        temperature: 0 is greedy.
        top_k: draw from this many likeliest tokens; 0: from all.
        top_p: draw from the fewest likeliest tokens whose probability reaches this.
        min_p: draw from tokens at least this many times as likely as the likeliest; 0: from all.
        seed: with a prompt's number it gives that prompt's random numbers, whatever the others.
        first_row: the number of the first prompt, for a list that is worked through in parts.
        stop_ids: tokens that end a reply; None: the tokenizer's and the model's end of text.
        stop: strings that end a reply; it is cut off where the one begins that is complete first.
        on_text: called with each new piece of the first prompt's reply as it is made.
        speed: adds up tokens and seconds.

    Raises:
        ValueError: if there is no prompt, or a prompt or a setting is out of range.
    """
    job = _Job(
        cfg,
        params,
        tok,
        prompts,
        on_text is not None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        first_row=first_row,
        stop_ids=stop_ids,
        stop=stop,
        speed=speed,
    )
    if on_text is not None:
        for piece in job.pieces():
            on_text(piece)
    return job.texts()


def stream(
    cfg: MistralConfig, params: Params, tok: Tokenizer, prompt: Prompt, **settings: Any
) -> Iterator[str]:
    """The reply to one prompt, piece by piece as it is made; the pieces join to `generate`'s.

    Args:
        cfg: the architecture.
        params: its parameters.
        tok: its tokenizer.
        prompt: a string (one user turn), messages, or token ids.
        **settings: those of `generate`.

    Raises:
        ValueError: as `generate`.
    """
    return _Job(cfg, params, tok, [prompt], True, **settings).pieces()


def _check(sampling: Sampling, max_new_tokens: int, seed: int, first_row: int) -> None:
    whole = {"top_k": sampling.top_k, "max_new_tokens": max_new_tokens}
    for name, value in (whole | {"seed": seed, "first_row": first_row}).items():
        if not isinstance(value, SupportsIndex):
            raise ValueError(f"{name}={_shown(value)} must be a whole number")
    for name in ("temperature", "top_p", "min_p"):
        value = getattr(sampling, name)
        if not isinstance(value, (SupportsFloat, SupportsIndex)):
            raise ValueError(f"{name}={_shown(value)} must be a number")
    rules = [
        ("temperature", sampling.temperature, sampling.temperature >= 0, "at least 0 (0: greedy)"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "at least 0 (0: all tokens)"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1 (1: all tokens)"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 (all tokens) to 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("seed", seed, 0 <= seed < 2**32, "from 0 to 2**32 - 1"),
    ]
    for name, value, fits, rule in rules:
        if not fits:
            raise ValueError(f"{name}={value} must be {rule}")


def _rows(tok: Tokenizer, prompts: Any) -> list[list[int]]:
    """The ids of every prompt."""
    members = [prompts] if isinstance(prompts, str) else _members(prompts)
    if members is None:
        raise ValueError(
            f"prompts is {_shown(prompts)}; give a string, or a list of strings, message lists or "
            "token id lists"
        )
    if not members:
        raise ValueError("there is no prompt; give at least one")
    if any(isinstance(prompt, dict) for prompt in members):
        raise ValueError("prompts is one list of messages; give a list of such lists")
    return [prompt_ids(tok, prompt) for prompt in members]


def _stop_strings(stop: Any) -> tuple[str, ...]:
    members = [stop] if isinstance(stop, str) else _members(stop)
    if members is None or not all(isinstance(text, str) for text in members):
        raise ValueError(f"stop={_shown(stop)} must be a string or a list of strings")
    if "" in members:
        raise ValueError("stop has an empty string, which every reply contains; leave it out")
    return tuple(members)


def _stop_ids(stop_ids: Any) -> set[int]:
    members = _members(stop_ids)
    if members is None or not all(isinstance(token, SupportsIndex) for token in members):
        raise ValueError(f"stop_ids={_shown(stop_ids)} must be a list of token ids")
    return {int(token) for token in members}


def check_ids(cfg: MistralConfig, ids: Sequence[int], name: str) -> None:
    """Makes sure that a model can reply to token ids.

    Args:
        cfg: the architecture.
        ids: of one prompt.
        name: what error messages call the prompt.

    Raises:
        ValueError: if there are none, too many, or one that the model has not.
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
