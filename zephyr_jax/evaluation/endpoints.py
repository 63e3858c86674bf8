"""Chats with models behind OpenAI's interface; each reply is kept by a key."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from absl import logging
from tqdm import tqdm

from zephyr_jax.config import positive, require
from zephyr_jax.data.raw.binarize import finite

Messages = list[dict[str, str]]
CHARACTERS = 4  # of a token, in estimates
_NO_ANSWER = 590  # the status that is given to a reply of 200 without an answer
_REFUSED = (400, 404, 422, 501)  # the statuses by which a server refuses a field
_GIVE_UP = 8  # requests for one model that fail in a row
_EXTRAS = {"response_format", "logprobs", "top_logprobs"}  # of a request; some servers refuse them
_AGAIN = "That could not be read. Reply once more, in exactly the form that was asked for."


class CapReached(BaseException):
    """No further request may be sent; no Exception, which the client would retry."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A server with OpenAI's interface, and how hard it may be driven."""

    url: str  # such as http://localhost:8000/v1
    key_variable: str = ""  # the environment variable that holds the API key; "": none is sent
    concurrency: int = 8  # requests in flight
    requests_per_minute: int = 0  # 0: no limit
    timeout: float = 120.0  # seconds to wait for one reply
    retries: int = 5  # of one request, by the openai client, which honors Retry-After
    # Fields of a request that the server refuses, such as "seed"; judges need no "response_format"
    omit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive(self, "concurrency", "timeout")
        if not re.fullmatch(r"https?://[^@?\s]+", self.url):
            raise ValueError("url must be http(s)://HOST/..., without a key in it")
        if not re.fullmatch("[A-Z_][A-Z0-9_]*|", self.key_variable):
            raise ValueError("key_variable must be a variable's name in capitals, not a key")
        for name in ("requests_per_minute", "retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    def key(self) -> str:
        """The API key, "" where there is none; a ValueError if its variable is not set."""
        key = os.environ.get(self.key_variable, "")
        if self.key_variable and not key:
            raise ValueError(f"{self.url} needs the environment variable {self.key_variable}")
        return key


@dataclasses.dataclass
class Spending:
    """What a command asked of endpoints, and the most that it may; costs are in dollars."""

    max_requests: int = 0  # 0: no limit
    max_cost: float = 0.0  # 0: no limit
    requests: int = 0  # sent, retries among them
    cost: float = 0.0
    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def begin(self) -> None:
        """Counts a request that is to be sent; CapReached if it may not be."""
        for name in ("requests", "cost"):
            most = getattr(self, f"max_{name}")
            if most and not getattr(self, name) < most:
                raise CapReached(f"--max_{name}={most:g} is reached")
        self.requests += 1

    def __str__(self) -> str:
        spent = f"{self.requests:,} requests, ${self.cost:.2f}"
        return spent + (f", {self.failed.total()} failed" if self.failed else "")


class Reply(NamedTuple):
    """A reply, as the cache has it; tokens are those of all attempts."""

    text: str
    finish: str  # the server's reason, "refused" where it declined, "too_long" for the prompt
    tokens: Sequence[int] = (0, 0)  # in and out
    attempts: int = 1  # until it was readable
    logprobs: Mapping[str, float] = {}  # of the likeliest first tokens, where they are wanted


class Request(NamedTuple):
    """A chat whose reply is wanted."""

    key: str  # of the cache: `content_key` of all that decides the reply
    chat: Callable[[bool], Messages]  # the messages, for a reply by the schema or in words
    settings: Mapping[str, Any] = {}  # of the body: model, temperature, max_tokens, seed, ...
    price: Sequence[float] = ()  # dollars for a million tokens in and a million out; (): none
    schema: Any = None  # the JSON schema of the reply, for endpoints that take one
    readable: Callable[[str], Any] = lambda _: True  # a reply that is not is asked for again


def content_key(*content: Any) -> str:
    """The key of a request: a SHA-256, in hex, of the JSON of what decides the reply."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cost(tokens: Sequence[float], price: Sequence[float]) -> float:
    """The dollars for tokens in and out at the price of a million of each; () is free."""
    return sum(n * dollars for n, dollars in zip(tokens, price, strict=False)) / 1e6


class Cache:
    """A SQLite file of replies by their keys; one is on disk when its assignment returns."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, sqlite3.connect(path, isolation_level=None, timeout=30)
        self._run("PRAGMA journal_mode=WAL")
        self._run("CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, json TEXT)")
        self.close = self._file.close

    def get(self, key: str) -> Reply | None:
        """The reply under a key; None if there is none, or a damaged one, of which a line tells."""
        (held,) = self._run("SELECT json FROM reply WHERE key = ?", (key,)) or ("",)
        text = held if held.startswith('["') else held[16:]  # older ones have no digest
        if held and held not in (text, _sealed(text)):
            logging.warning("%s: a reply is damaged, and asked for again", self._path)
            return None
        return Reply(*json.loads(text)) if held else None

    def __setitem__(self, key: str, reply: Reply) -> None:
        text = _sealed(json.dumps(reply))
        self._run("INSERT OR REPLACE INTO reply VALUES (?, ?)", (key, text))

    def _run(self, *statement: Any) -> Any:
        try:
            return self._file.execute(*statement).fetchone()
        except sqlite3.DatabaseError as error:
            way = "if it is damaged, or no cache, remove it, and replies are asked for again"
            raise ValueError(f"{self._path}: {error}; {way}") from error


def _sealed(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode()) + text


class _Endpoint:
    """One server. Its errors are a line each, which never contains the key."""

    def __init__(self, name: str, config: EndpointConfig, spending: Spending):
        if importlib.util.find_spec("openai") is None:
            raise ModuleNotFoundError('endpoints need openai: pip install "zephyr_jax[feedback]"')
        self._openai: Any = importlib.import_module("openai")
        self.name, self.config, self.spending = name, config, spending
        self._key = config.key()
        hooks = {"request": [self._before], "response": [self._after]}
        self.client = self._openai.AsyncOpenAI(
            base_url=config.url,
            api_key=self._key or "none",
            timeout=config.timeout,
            max_retries=config.retries,
            http_client=self._openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )
        self._turn = 0.0  # when the next request may be sent, where a rate limits them
        self._failures = collections.Counter[str]()  # in a row, by model
        self.answered: set[str] = set()  # models
        self._omit = {*config.omit}  # fields of a request

    async def reply(self, request: Request, attempts: int) -> Reply | None:
        """The first readable reply of so many, or the last one; None if a request failed."""
        again, tokens, attempt = [], np.zeros(2, int), 1
        while reply := await self._ask(request, again):
            tokens += reply.tokens
            final = attempt == attempts or reply.finish == "refused"
            if final or request.readable(reply.text):
                return reply._replace(tokens=tokens.tolist(), attempts=attempt)
            again += asked_again(reply.text)
            attempt += 1
        return None

    async def _ask(self, request: Request, again: Messages) -> Reply | None:
        """A reply, None if none comes; a server that refuses schema or log-probs goes without."""
        model, fields, bare = request.settings["model"], {**request.settings}, self._omit | _EXTRAS
        if request.schema:
            form = {"name": "reply", "schema": request.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        for omit in (self._omit, bare):
            body = {name: value for name, value in fields.items() if name not in omit}
            body["messages"] = [*request.chat("response_format" in body), *again]
            try:
                completion = await self.client.chat.completions.create(**body)
            except self._openai.APIError as error:
                if body.keys() & _EXTRAS and getattr(error, "status_code", 0) in _REFUSED:
                    continue
                return self._failed(model, error)
            if omit is bare and self._omit != bare:
                logging.info("endpoint %s takes no JSON schema or log-probs", self.name)
                self._omit = bare
            self.answered.add(model)
            del self._failures[model]
            return self._read(completion, body, request.price)
        return None

    async def _before(self, _: Any) -> None:
        """Waits for the turn of a request or retry and counts it; CapReached if it may not be."""
        if rate := self.config.requests_per_minute:
            now = time.monotonic()
            turn = max(self._turn, now)
            self._turn = turn + 60 / rate
            await asyncio.sleep(turn - now)
        self.spending.begin()

    async def _after(self, response: Any) -> None:
        """Turns a reply that holds no answer into a server's error, which the client retries."""
        if response.is_success:
            await response.aread()
            try:
                text = response.json()["choices"][0]["message"].get("content")
                answers = isinstance(text, str | None)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                answers = False
            response.status_code = 200 if answers else _NO_ANSWER

    def _read(self, completion: Any, body: Any, price: Sequence[float]) -> Reply:
        """The reply in a response's body, whose cost is added; without usage by its characters."""
        usage, choice = completion.usage, completion.choices[0]
        counts = [getattr(usage, f"{side}_tokens", 0) for side in ("prompt", "completion")]
        used = [max(0, int(finite(count) or 0)) for count in counts]
        if not any(used):
            used = [len(str(x)) // CHARACTERS for x in (body["messages"], choice.message.content)]
        self.spending.cost += cost(used, price)
        finish = getattr(choice, "finish_reason", None) or "stop"
        if finish == "content_filter" or choice.message.refusal:
            finish = "refused"
        text = (choice.message.content or "").encode(errors="replace").decode()
        return Reply(text, finish, used, 1, _likeliest(choice.logprobs))

    def _failed(self, model: str, error: Any) -> Reply | None:
        """What follows from an error: a refusal, None, or a ValueError that ends the command."""
        status = getattr(error, "status_code", None)
        if status in (400, 403, 413, 422) and model in self.answered:
            return Reply("", "refused")  # it is this chat that is not taken
        reason = f"HTTP {status}" if status else type(error.__cause__).__name__
        reason = reason.replace(f"HTTP {_NO_ANSWER}", "no answer in the reply")
        self.spending.failed[reason] += 1
        self._failures[model] += 1
        fatal = {"ConnectError": "cannot be reached", "HTTP 404": f"has no model {model!r}"}
        key = f"refuses the key of {self.config.key_variable or 'no key_variable'}"
        fatal |= {"HTTP 401": key, "HTTP 403": key}
        if reason not in fatal and self._failures[model] < _GIVE_UP:
            return None
        problem = fatal.get(reason, f"failed {_GIVE_UP} requests for {model} in a row")
        words = f"{error} {error.__cause__ or ''}".replace(f"Error code: {_NO_ANSWER}", reason)
        words = " ".join(words.split()).replace(self._key or "\n", "***")[:200]
        raise ValueError(
            f"endpoint {self.name} ({self.config.url}) {problem}: {words}; what was answered is "
            "kept, run the command again to go on"
        )


def _likeliest(logprobs: Any) -> dict[str, float]:
    """The log-probs of the likeliest first tokens in a response; what is none is left out."""
    content = getattr(logprobs, "content", None)
    first = content[0] if isinstance(content, list) and content else None
    tops = getattr(first, "top_logprobs", None)
    listed = tops if isinstance(tops, list) else ()
    pairs = [(getattr(x, "token", None), finite(getattr(x, "logprob", None))) for x in listed]
    return {token: min(p, 0.0) for token, p in pairs if isinstance(token, str) and p is not None}


def asked_again(reply: str) -> Messages:
    """The turns that ask once more after a reply that cannot be read."""
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": _AGAIN}]


def ask_endpoints(
    endpoints: Mapping[str, EndpointConfig],
    requests: Mapping[str, Sequence[Request]],
    cache: Cache | dict[str, Reply],
    spending: Spending,
    *,
    attempts: int = 1,
    name: str = "ask",
) -> None:
    """Asks each endpoint its requests, by its name, unless the cache has them; replies go there.

    A request that fails after all retries is counted in `spending`. A ValueError if an endpoint is
    down or refuses the key or the model, CapReached at a limit.
    """
    errors: list[BaseException] = []

    async def work(endpoint: _Endpoint, pending: Iterator[Request]) -> None:
        while not errors and (request := next(pending, None)):
            try:
                if reply := await endpoint.reply(request, attempts):
                    cache[request.key] = reply
            except (Exception, CapReached) as error:  # raised when the others have ended
                errors.append(error)
            bar.set_postfix_str(str(spending), refresh=False)
            bar.update()

    async def ask_all() -> None:
        opened = [_Endpoint(k, endpoints[k], spending) for k, own in missing.items() if own]
        workers = []
        for endpoint in opened:
            own = missing[endpoint.name]
            known = {x.settings["model"] for x in requests[endpoint.name] if x.key not in own}
            endpoint.answered |= known  # a model with replies in the cache is there
            pending = iter(own.values())
            workers += [work(endpoint, pending) for _ in range(endpoint.config.concurrency)]
        await asyncio.gather(*workers)
        await asyncio.gather(*(endpoint.client.close() for endpoint in opened))

    missing = {k: {x.key: x for x in own if not cache.get(x.key)} for k, own in requests.items()}
    n, total = sum(map(len, missing.values())), sum(map(len, requests.values()))
    if n:
        with tqdm(total=total, initial=total - n, desc=name, unit="reply") as bar:
            asyncio.run(ask_all())
    for error in errors:
        raise error
