"""Servers with OpenAI's interface: how they are asked, how fast, at what cost, and what fails."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.feedback.config import EndpointConfig

GIVE_UP = 8  # requests in a row that fail: the endpoint is down
_LONGEST_WAIT = 600.0  # seconds that a Retry-After may ask for


class CapReached(Exception):
    """No further request may be sent: `--max_requests` or `--max_cost` is reached."""


@dataclasses.dataclass
class Spending:
    """What was asked for in this call, and the most that may be; costs are in dollars."""

    max_requests: int = 0  # 0: no limit
    max_cost: float = 0.0  # 0: no limit
    requests: int = 0
    retries: int = 0
    failed: int = 0  # requests without a reply after all retries
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    def begin(self) -> None:
        """Counts a request before it is sent; CapReached if it may not be."""
        if self.max_requests and self.requests >= self.max_requests:
            raise CapReached(f"--max_requests={self.max_requests} is reached")
        if self.max_cost and self.cost >= self.max_cost:
            raise CapReached(f"--max_cost={self.max_cost:g} is reached")
        self.requests += 1

    def __str__(self) -> str:
        return f"{self.requests:,} requests, ${self.cost:.2f}"


class Reply(NamedTuple):
    """The text of a reply; its `finish` is the server's reason, "refused" where it declined."""

    text: str
    finish: str


class Endpoint:
    """One server. Its errors never contain the key, and never more than a line of its words."""

    def __init__(self, name: str, config: EndpointConfig, spending: Spending):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'endpoints need the openai client: pip install "zephyr_jax[feedback]"'
            ) from error
        self.name, self.config, self.spending = name, config, spending
        self._errors = openai
        self._key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not self._key:
            raise ValueError(
                f"endpoint {name} needs a key: set the environment variable {config.key_variable}"
            )
        self._client = openai.AsyncOpenAI(
            base_url=config.url,
            api_key=self._key or "none",
            timeout=config.timeout,
            max_retries=config.retries,
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._sent: collections.deque[float] = collections.deque()
        self._failures_in_a_row = 0
        self._json_schema = config.json_schema

    async def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        *,
        schema: Any = None,
        **settings: Any,
    ) -> Reply | None:
        """The reply to a chat, None if there is none after all retries (counted as failed).

        `schema` is the JSON schema of the reply; a server that refuses one is asked without.

        Raises:
            ValueError: if the key or the model is refused, or the endpoint is down.
            CapReached: if no further request may be sent.
        """
        body: dict[str, Any] = {"model": model, "messages": list(messages), **settings}
        async with self._slots:
            while True:
                asked = dict(body)
                if schema is not None and self._json_schema:
                    form = {"name": "ratings", "schema": schema, "strict": True}
                    asked["response_format"] = {"type": "json_schema", "json_schema": form}
                await self._pace()
                self.spending.begin()
                try:
                    raw = await self._client.chat.completions.with_raw_response.create(**asked)
                    self.spending.retries += raw.retries_taken
                    reply = self._read(model, raw.parse())
                except self._errors.APIError as error:
                    if "response_format" in asked and _status(error) in (400, 404, 422):
                        self._json_schema = False
                        continue
                    if await self._asks_to_wait(error):
                        continue
                    return self._failed(model, error)
                except ValueError as error:  # of the JSON reader, or of `_read`
                    return self._failed(model, error)
                self._failures_in_a_row = 0
                return reply

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _pace(self) -> None:
        """Waits until a request fits into the limit of the last minute."""
        limit = self.config.requests_per_minute
        while limit:
            now = time.monotonic()
            while self._sent and now - self._sent[0] >= 60:
                self._sent.popleft()
            if len(self._sent) < limit:
                self._sent.append(now)
                return
            await asyncio.sleep(60 - (now - self._sent[0]))

    def _read(self, model: str, completion: Any) -> Reply:
        """The reply of a response's body, whose cost is added; a ValueError if it holds none."""
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError(f"a reply without choices: {self._scrubbed(completion)}")
        usage = getattr(completion, "usage", None)
        if usage is not None:
            price = self.config.prices.get(model, (0.0, 0.0))
            used = (usage.prompt_tokens or 0, usage.completion_tokens or 0)
            self.spending.tokens_in += used[0]
            self.spending.tokens_out += used[1]
            self.spending.cost += sum(n * p for n, p in zip(used, price, strict=True)) / 1e6
        first = choices[0]
        if getattr(first.message, "refusal", None) or first.finish_reason == "content_filter":
            return Reply(first.message.content or first.message.refusal or "", "refused")
        return Reply(first.message.content or "", first.finish_reason or "stop")

    async def _asks_to_wait(self, error: Any) -> bool:
        """Waits as a Retry-After says that is longer than the client's own retries wait."""
        headers = getattr(getattr(error, "response", None), "headers", {})
        try:
            seconds = float(headers.get("retry-after", "nan"))
        except ValueError:
            return False
        if not 60 < seconds <= _LONGEST_WAIT:
            return False
        await asyncio.sleep(seconds)
        return True

    def _failed(self, model: str, error: Exception) -> Reply | None:
        """What follows from an error: a refusal, a failed request, or a ValueError that stops."""
        status, words = _status(error), self._scrubbed(error)
        if status in (401, 403):
            variable = self.config.key_variable or "(none is configured as key_variable)"
            raise ValueError(
                f"endpoint {self.name} refuses the key of {variable} (HTTP {status})"
            ) from None
        if status == 404:
            where = f"endpoint {self.name} ({self.config.url})"
            raise ValueError(f"{where} has no model {model!r} (HTTP 404): {words}") from None
        if status in (400, 413, 422):
            return Reply("", "refused")
        self.spending.failed += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= GIVE_UP:
            raise ValueError(
                f"endpoint {self.name} ({self.config.url}) failed {GIVE_UP} requests in a row, the "
                f"last by {words}; what was answered is kept: run the command again to go on"
            ) from None
        return None

    def _scrubbed(self, error: object) -> str:
        """One line of an error's words, without the key."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return (text.replace(self._key, "***") if self._key else text)[:160]


def _status(error: object) -> int | None:
    return getattr(error, "status_code", None)


@contextlib.asynccontextmanager
async def open_endpoints(
    configs: Mapping[str, EndpointConfig], spending: Spending
) -> AsyncIterator[dict[str, Endpoint]]:
    """The endpoints by their names, closed when the block ends."""
    endpoints = {name: Endpoint(name, config, spending) for name, config in configs.items()}
    try:
        yield endpoints
    finally:
        for endpoint in endpoints.values():
            await endpoint.close()
