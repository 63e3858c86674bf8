"""The replies to a request while they are decoded: text, log-probs, and what a grammar allows."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
from absl import logging
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.tokenizer_files import tokenizer_json, trial
from zephyr_jax.inference.decoding import CHUNK, decode, prompt_logps, rounded
from zephyr_jax.inference.generate import Reply
from zephyr_jax.inference.sampling import SamplingParams, TokenLogps

MAX_GRAMMAR = 100_000  # characters of a request's grammar
_TRIAL = """
import sys, llguidance
matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), sys.stdin.read(), log_level=0)
matcher.compute_bitmask()
"""
ROWS_AT_ONCE = 16  # replies that are decoded as one batch


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model and how it is served."""

    cfg: Any
    params: Any  # in cfg.dtype, as from `cast_params`
    tok: Any
    name: str
    sampling: SamplingParams  # the settings of a request that names none; stop_ids are set

    @property
    def vocab(self) -> int:
        """Ids below it are drawn: those with a text and a row of the head."""
        return min(self.cfg.vocab_size, self.tok.vocab_size)

    @functools.cached_property
    def tokens(self) -> llguidance.LLTokenizer:
        """The tokens as bytes, and which of them may end a complete text."""
        tok, ends = self.tok, self.sampling.stop_ids or ()
        if isinstance(tok, JsonTokenizer):
            content = tok.files.tokenizer_object()
        else:
            content = tokenizer_json(tok.vocabulary, begin=None)
        ends = [i for i in ends if 0 <= i < tok.vocab_size]
        return llguidance.LLTokenizer(json.dumps(content), tok.vocab_size, ends)

    @functools.cached_property
    def longest(self) -> int:
        """The characters of the longest token."""
        texts = (self.tok.decode([i]) for i in range(self.tok.vocab_size))
        return max(len(text) for text in (*texts, *self.tok.specials))

    def text(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes; for parts of a character the text is as OpenAI has it."""
        data = self.tokens.decode_bytes([token])
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


class GenerationRequest(NamedTuple):
    """A request, validated and tokenized."""

    chat: bool
    rows: list[list[int]]  # the ids of every prompt, once for each of its n replies
    prompt_tokens: int  # every prompt counted once
    sampling: SamplingParams
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None  # likeliest tokens that come with each; None: no log-probs
    echo: tuple[str, ...] = ()  # the text that each of the rows' replies repeats first
    only_echo: bool = False  # max_tokens=0
    grammar: str | None = None  # llguidance's, that every reply is made of


def grammar(served: ServedModel, kind: str, value: Any) -> str:
    """The rules of a schema, a regex, texts or Lark's; a ValueError says what is wrong with it."""
    matcher = llguidance.LLMatcher
    if len(json.dumps(value)) > MAX_GRAMMAR:
        raise ValueError(f"it has more than {MAX_GRAMMAR} characters")
    if kind in ("json", "json_object"):
        # An unsure model would write blanks until it is cut: one, or a line end and indentation.
        blanks: Any = {"whitespace_pattern": r" ?|\n[ \t]{0,20}"}
        schema = {"type": "object"} if kind == "json_object" else value
        rules = matcher.grammar_from_json_schema(schema, defaults=blanks)
    elif kind == "regex":
        rules = matcher.grammar_from_regex(value)
    elif kind == "choice":
        if not isinstance(value, list) or not value:
            raise ValueError("choice must be a list of texts")
        texts = (json.dumps(text, ensure_ascii=False) for text in value)
        rules = matcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    elif kind == "grammar":
        rules = matcher.grammar_from_lark(value)
    else:
        raise ValueError(f"{kind} is not json, json_object, regex, choice or grammar")
    if wrong := trial(_TRIAL, rules) or matcher.validate_grammar(rules):
        raise ValueError(" ".join(wrong.split()))
    _Grammars(served, rules, 1)  # some allow no text at all
    return rules


class _Grammars:
    """The tokens that a grammar `allowed` next, a bit for each, for every row of a batch."""

    def __init__(self, served: ServedModel, rules: str, n: int):
        self._matchers = [llguidance.LLMatcher(served.tokens, rules, log_level=0) for _ in range(n)]
        self._bits = allocate_token_bitmask(n, served.tokens.vocab_size)
        self.allowed = self._bits.view(np.uint32)
        for row in range(n):
            self.add(row)

    def add(self, row: int, *tokens: int) -> None:
        """Goes on behind tokens of a reply that has not ended."""
        matcher = self._matchers[row]
        matcher.consume_tokens(list(tokens))
        fill_next_token_bitmask(matcher, self._bits, row)
        if matcher.is_error():
            raise ValueError(f"llguidance gives it up: {matcher.get_error().splitlines()[0]}")


class Delta(NamedTuple):
    """What one more token adds to one reply: text, and "stop" or "length" if the reply ends."""

    row: int
    text: str
    finish: str | None
    tokens: int  # 1, or 0 at an end without a token of its own, and of an echoed prompt
    logprobs: Sequence[Any] = ()  # an entry for each token, where log-probs are wanted


def replies(served: ServedModel, request: GenerationRequest) -> Generator[list[Delta], None, None]:
    """For each token what it adds; rows are the first prompt's replies, then the next one's."""
    starts = range(0, len(request.rows), ROWS_AT_ONCE)
    if request.echo:
        for start in starts:
            yield _echoed(served, request, start)
    if request.only_echo:
        yield [Delta(row, "", "length", 0) for row in range(len(request.rows))]
    else:
        for start in starts:
            yield from _decoded(served, request, start)


def warm_up(served: ServedModel) -> None:
    """Draws two tokens behind prompts of each size up to CHUNK, so that these are compiled."""
    most = min(CHUNK, served.cfg.max_position_embeddings - 2)
    sampling = dataclasses.replace(served.sampling, max_new_tokens=2, stop_ids=())
    for size in sorted({rounded(n, 64) for n in range(64, most + 1, 64)}):
        for _ in replies(served, GenerationRequest(False, [[0] * min(size, most)], size, sampling)):
            pass
        logging.info("ready for prompts of up to %d tokens", size)


def _echoed(served: ServedModel, request: GenerationRequest, start: int) -> list[Delta]:
    """The prompts of a batch as the first part of their replies, with log-probs where wanted."""
    rows = request.rows[start : start + ROWS_AT_ONCE]
    entries: list[list[Any]] = [[] for _ in rows]
    if request.logprobs is not None:
        batch = prompt_logps(served.cfg, served.params, rows, served.vocab)
        for out, ids, logps in zip(entries, rows, batch, strict=True):
            parts = served.tok.stream(ids, continuation=False)
            ends = np.cumsum([len(next(parts)) for _ in ids]).tolist()
            out.append((served.text(ids[0])[0], None, None, 0))  # nothing stands before it
            for i, (token, end) in enumerate(zip(ids[1:], ends, strict=False)):
                out.append(_entry(served, request, token, TokenLogps(*(x[i] for x in logps)), end))
    texts = request.echo[start : start + ROWS_AT_ONCE]
    return [
        Delta(row, text, None, 0, tokens)
        for row, (text, tokens) in enumerate(zip(texts, entries, strict=True), start)
    ]


def _decoded(served: ServedModel, request: GenerationRequest, start: int) -> Iterator[list[Delta]]:
    """The replies to one batch of rows, the first of which has the number `start`."""
    rows = request.rows[start : start + ROWS_AT_ONCE]
    replies = [Reply(served.tok, request.sampling) for _ in rows]
    finished = np.zeros(len(rows), bool)
    grammars = _Grammars(served, request.grammar, len(rows)) if request.grammar else None
    more: dict[str, Any] = {"vocab": served.vocab, "chunk": 1, "finished": finished}
    more |= {"numbers": range(start, start + len(rows)), "room": served.sampling.max_new_tokens}
    more |= {"allowed": grammars and grammars.allowed, "logps": request.logprobs is not None}
    for chunk, logps in decode(served.cfg, served.params, rows, request.sampling, **more):
        deltas = []
        for i, (reply, token) in enumerate(zip(replies, chunk[:, 0].tolist(), strict=True)):
            if reply.finish is not None or token < 0:  # which has no position left
                continue
            before = reply.length + (len(request.echo[start + i]) if request.echo else 0)
            text, entries = reply.add(token), ()
            if logps is not None:
                own = TokenLogps(*(x[i, 0] for x in logps))
                entries = (_entry(served, request, token, own, before),)
            if grammars is not None and reply.finish is None:
                grammars.add(i, token)
            deltas.append(Delta(start + i, text, reply.finish, 1, entries))
        yield deltas
        finished[:] = [reply.finish is not None for reply in replies]
    ended = [(i, reply) for i, reply in enumerate(replies, start) if reply.finish is None]
    yield [Delta(i, reply.end("length"), reply.finish, 0) for i, reply in ended]


def _entry(
    served: ServedModel, request: GenerationRequest, token: int, logps: TokenLogps, offset: int
) -> Any:
    """A token with its log-probs and the characters before it, in OpenAI's form."""
    ids, values = (x[: request.logprobs].tolist() for x in (logps.top_ids, logps.top))
    tokens = [(token, float(logps.token)), *zip(ids, values, strict=True)]
    named = [(*served.text(i), logp) for i, logp in tokens]
    if request.chat:
        first, *top = [
            {"token": text, "logprob": logp, "bytes": list(data)} for text, data, logp in named
        ]
        return first | {"top_logprobs": top}
    text, _, logp = named[0]
    likeliest = {text: logp for text, _, logp in reversed(named[1:])}
    return text, logp, {text: logp} | likeliest, offset
