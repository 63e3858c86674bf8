"""The replies to a request while they are decoded: text, log-probs, and what a grammar allows."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask

from zephyr_jax.data.text.json_tokenizer import JsonTokenizer
from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from zephyr_jax.data.tokenizer_files import tokenizer_object
from zephyr_jax.inference.decoding import decode, prompt_logps, rounded
from zephyr_jax.inference.generate import Reply
from zephyr_jax.inference.sampling import SamplingParams, TokenLogps

ROWS_AT_ONCE = 16  # replies that are decoded as one batch
# A blank, or a line end and indentation: an unsure model would write blanks until it is cut off.
_JSON: Any = {"whitespace_pattern": r" ?|\n[ \t]{0,20}"}


class ServedModel(NamedTuple):
    """A model and how it is served."""

    cfg: Any
    params: Any  # in cfg.dtype, as from `cast_params`
    tok: Any
    name: str
    adds_bos: bool  # whether a text without a template begins with BOS
    sampling: SamplingParams  # the settings of a request that names none; stop_ids are set


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


class _Vocabulary:
    """The bytes of a SentencePiece model's entries, as llguidance takes them."""

    def __init__(self, tok: SentencePieceTokenizer):
        self.eos_token_id, self.bos_token_id = tok.eos_id, tok.bos_id
        self.special_token_ids = list(tok.specials.values())
        self.tokens = [
            bytes([int(piece[3:5], 16)])
            if len(piece) == 6 and piece.startswith("<0x")
            else piece.replace("▁", " ").encode()
            for piece in tok.vocabulary.tokens
        ]
        self._encode = tok.encode

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text that follows other text, here a newline, which merges with nothing."""
        newline = self._encode("\n")
        return self._encode("\n" + text.decode("utf-8", "replace"))[len(newline) :]


def vocabulary(served: ServedModel) -> llguidance.LLTokenizer:
    """The tokens as bytes, and which of them may end a complete text."""
    ends = served.sampling.stop_ids or ()
    return _vocabulary(served.tok, tuple(i for i in ends if 0 <= i < served.tok.vocab_size))


@functools.lru_cache(maxsize=2)
def _vocabulary(tok: Tokenizer, ends: tuple[int, ...]) -> llguidance.LLTokenizer:
    if isinstance(tok, JsonTokenizer):
        source: Any = json.dumps(tokenizer_object(tok.files, tok.source))
    else:
        assert isinstance(tok, SentencePieceTokenizer)
        source = llguidance.TokenizerWrapper(_Vocabulary(tok))
    return llguidance.LLTokenizer(source, tok.vocab_size, list(ends))


def grammar(kind: str, value: Any) -> str:
    """The grammar of a JSON schema (`json`), a `regex`, one of several texts (`choice`), or Lark.

    A ValueError says why it is not one.
    """
    matcher = llguidance.LLMatcher
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        kind, value = "grammar", f"start: {texts}"
    if kind == "json":
        rules = matcher.grammar_from_json_schema(value, defaults=_JSON)
    elif kind == "regex":
        rules = matcher.grammar_from_regex(value)
    else:
        rules = matcher.grammar_from_lark(value)
    if wrong := matcher.validate_grammar(rules):
        raise ValueError(" ".join(wrong.split()))
    return rules


class _Grammars:
    """The tokens that a grammar allows next, for every row of a batch."""

    def __init__(self, served: ServedModel, rules: str, n: int):
        tokens = vocabulary(served)
        self._matchers = [llguidance.LLMatcher(tokens, rules, log_level=0) for _ in range(n)]
        self._bits = np.full((n, -(-tokens.vocab_size // 32)), -1, np.int32)
        self.allowed = self._bits.view(np.uint32)
        for row in range(n):
            self._fill(row)

    def add(self, row: int, token: int) -> None:
        """Goes on behind a token of a reply that has not ended."""
        self._matchers[row].consume_token(token)
        self._fill(row)

    def _fill(self, row: int) -> None:
        matcher = self._matchers[row]
        fill_next_token_bitmask(matcher, self._bits, row)
        if matcher.is_error():
            raise RuntimeError(f"llguidance: {matcher.get_error()}")


class ScoredToken(NamedTuple):
    """A token of a reply or an echoed prompt, and its log-prob."""

    token: int
    logp: float | None  # the first token of a prompt has none
    top: list[tuple[int, float]]  # the likeliest tokens in its place
    offset: int  # characters of the choice's text before it


class Delta(NamedTuple):
    """What one more token adds to one reply: text, and "stop" or "length" if the reply ends."""

    row: int
    text: str
    finish: str | None
    tokens: int  # 1, or 0 at an end without a token of its own, and of an echoed prompt
    scored: tuple[ScoredToken, ...] = ()  # where log-probs are wanted


def _scored(logps: TokenLogps, at: Any, token: int, n_top: int, offset: int) -> ScoredToken:
    ids, values = logps.top_ids[at][:n_top].tolist(), logps.top[at][:n_top].tolist()
    return ScoredToken(token, float(logps.token[at]), list(zip(ids, values, strict=True)), offset)


def replies(served: ServedModel, request: GenerationRequest) -> Generator[list[Delta], None, None]:
    """For each token that is decoded, what it adds to the replies that go on.

    The texts are those of `zephyr_jax.generate` with the same settings. Rows count the replies to
    the first prompt, then those to the next; ROWS_AT_ONCE of them are decoded at a time.
    """
    starts = range(0, len(request.rows), ROWS_AT_ONCE)
    if request.echo:
        for start in starts:
            yield _echoed(served, request, start)
    if request.only_echo:
        yield [Delta(row, "", "length", 0) for row in range(len(request.rows))]
    else:
        for start in starts:
            yield from _decoded(served, request, start)


def _echoed(served: ServedModel, request: GenerationRequest, start: int) -> list[Delta]:
    """The prompts of a batch as the first part of their replies, with log-probs where wanted."""
    rows = request.rows[start : start + ROWS_AT_ONCE]
    scored: list[list[ScoredToken]] = [[] for _ in rows]
    if request.logprobs is not None:
        vocab = min(served.cfg.vocab_size, served.tok.vocab_size)
        batch = prompt_logps(served.cfg, served.params, rows, vocab)
        for out, ids, logps in zip(scored, rows, batch, strict=True):
            parts = served.tok.stream(ids, continuation=False)
            ends = np.cumsum([len(next(parts)) for _ in ids]).tolist()
            out.append(ScoredToken(ids[0], None, [], 0))
            for i, (token, end) in enumerate(zip(ids[1:], ends, strict=False)):
                out.append(_scored(logps, i, token, request.logprobs, end))
    texts = request.echo[start : start + ROWS_AT_ONCE]
    return [
        Delta(row, text, None, 0, tuple(tokens))
        for row, (text, tokens) in enumerate(zip(texts, scored, strict=True), start)
    ]


def _decoded(served: ServedModel, request: GenerationRequest, start: int) -> Iterator[list[Delta]]:
    """The replies to one batch of rows, the first of which has the number `start`."""
    sampling, limit = request.sampling, request.sampling.max_new_tokens
    rows = request.rows[start : start + ROWS_AT_ONCE]
    replies = [Reply(served.tok, sampling) for _ in rows]
    n = 1 << (len(rows) - 1).bit_length()  # few sizes, as each is compiled
    finished = np.arange(n) >= len(rows)
    # One program for all requests up to the server's own limit.
    longest = rounded(max(limit, served.sampling.max_new_tokens), 64)
    grammars = _Grammars(served, request.grammar, len(rows)) if request.grammar else None
    chunks = decode(
        served.cfg,
        served.params,
        rows + rows[:1] * (n - len(rows)),
        dataclasses.replace(sampling, max_new_tokens=longest, first_row=start),
        vocab=min(served.cfg.vocab_size, served.tok.vocab_size),
        chunk=1,
        finished=finished,
        allowed=None if grammars is None else grammars.allowed,
        logps=request.logprobs is not None,
    )
    for step, (chunk, logps) in enumerate(chunks, 1):
        deltas = []
        for i, (reply, token) in enumerate(zip(replies, chunk[:, 0].tolist(), strict=False)):
            if reply.finish is not None:
                continue
            offset, scored = reply.length, ()
            text = reply.add(token) if token >= 0 else ""
            if reply.finish is None and (token < 0 or step == limit):
                text += reply.end("length")
            if logps is not None and token >= 0:
                offset += len(request.echo[start + i]) if request.echo else 0
                scored = (_scored(logps, (i, 0), token, request.logprobs or 0, offset),)
            if grammars is not None and reply.finish is None:
                grammars.add(i, token)
            deltas.append(Delta(start + i, text, reply.finish, int(token >= 0), scored))
        yield deltas
        finished[: len(rows)] = [reply.finish is not None for reply in replies]
        if finished.all():
            return
    ended = [(i, reply) for i, reply in enumerate(replies, start) if reply.finish is None]
    yield [Delta(i, reply.end("length"), reply.finish, 0) for i, reply in ended]


def chat_logprobs(served: ServedModel, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """The field `logprobs` of a chat's choice."""

    def entry(token: int, logp: float | None) -> dict[str, Any]:
        text, data = _text(served, token)
        return {"token": text, "logprob": logp, "bytes": list(data)}

    content = [
        entry(s.token, s.logp) | {"top_logprobs": [entry(*top) for top in s.top]} for s in scored
    ]
    return {"content": content, "refusal": None}


def text_logprobs(served: ServedModel, scored: Sequence[ScoredToken]) -> dict[str, Any]:
    """The field `logprobs` of a text's choice; the likeliest tokens and the drawn one by text."""
    texts = [_text(served, s.token)[0] for s in scored]
    tops: list[Any] = []
    for s, text in zip(scored, texts, strict=True):
        likeliest = {_text(served, token)[0]: logp for token, logp in reversed(s.top)}
        tops.append(None if s.logp is None else {text: s.logp} | likeliest)
    return {
        "tokens": texts,
        "token_logprobs": [s.logp for s in scored],
        "top_logprobs": tops,
        "text_offset": [s.offset for s in scored],
    }


def _text(served: ServedModel, token: int) -> tuple[str, bytes]:
    """A token's text and bytes; for parts of a character the text is as OpenAI has it."""
    data = vocabulary(served).decode_bytes([token])
    try:
        return data.decode(), data
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
