"""One device, one reply at a time: the queue of requests and the thread that answers them."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.inference.decoding import decode, rounded
from zephyr_jax.inference.generate import first_stop, until_stop
from zephyr_jax.inference.server.requests import GenerationRequest, Refusal, ServedModel


class Delta(NamedTuple):
    """What one more token adds to one reply: text, and "stop" or "length" if the reply ends."""

    row: int
    text: str
    finish: str | None
    tokens: int  # 1, or 0 at an end without a token of its own


class _Reply:
    """One reply while it is decoded: ids in, text that can no longer change out."""

    def __init__(self, served: ServedModel, request: GenerationRequest, row: int):
        self.finish: str | None = None
        self._sampling, self._row, self._text = request.sampling, row, ""
        self._ids: collections.deque[int] = collections.deque()
        ids = iter(lambda: self._ids.popleft() if self._ids else None, None)
        self._parts = until_stop(self._recorded(served.tok.stream(ids)), request.sampling.stop)

    def _recorded(self, parts: Iterator[str]) -> Iterator[str]:
        for part in parts:
            self._text += part
            yield part

    def add(self, token: int, last: bool) -> Delta:
        """The text that a token makes certain; -1: the model's positions have ended."""
        if token < 0:
            return self.end("length", tokens=0)
        if token in (self._sampling.stop_ids or ()):
            return self.end("stop", tokens=1)
        self._ids.append(token)
        text = next(self._parts)  # takes exactly this id
        if first_stop(self._text, self._sampling.stop) is not None:
            self.finish = "stop"
        elif last:
            return self.end("length", tokens=1, text=text)
        return Delta(self._row, text, self.finish, 1)

    def end(self, finish: str, tokens: int, text: str = "") -> Delta:
        """Ends the reply with the text that was held back."""
        self.finish = finish
        return Delta(self._row, text + "".join(self._parts), finish, tokens)


def replies(served: ServedModel, request: GenerationRequest) -> Generator[list[Delta], None, None]:
    """For each token that is decoded, what it adds to the replies that go on.

    The texts are those of `zephyr_jax.generate` with the same settings. Rows count the replies to
    the first prompt, then those to the next.
    """
    rows = [_Reply(served, request, i) for i in range(len(request.rows))]
    n = 1 << (len(rows) - 1).bit_length()  # few sizes, as each is compiled
    finished = np.arange(n) >= len(rows)
    # One program for all requests up to the server's own limit.
    limit = request.sampling.max_new_tokens
    longest = rounded(max(limit, served.sampling.max_new_tokens), 64)
    chunks = decode(
        served.cfg,
        served.params,
        request.rows + request.rows[:1] * (n - len(rows)),
        dataclasses.replace(request.sampling, max_new_tokens=longest),
        vocab=min(served.cfg.vocab_size, served.tok.vocab_size),
        chunk=1,
        finished=finished,
    )
    for step, chunk in enumerate(chunks, 1):
        tokens = zip(rows, chunk[: len(rows), 0].tolist(), strict=True)
        yield [row.add(token, step == limit) for row, token in tokens if row.finish is None]
        finished[: len(rows)] = [row.finish is not None for row in rows]
        if finished.all():
            return
    yield [row.end("length", tokens=0) for row in rows if row.finish is None]


class Engine:
    """The queue of requests, and the thread with the device that answers one after another.

    Attributes:
        served: the model.
        steps: tokens decoded so far, over all requests.
        waiting: the number of requests in the queue.
    """

    def __init__(
        self, served: ServedModel, max_waiting: int, enter_mesh: Callable[[], object] | None = None
    ):
        """The queue of a model; `enter_mesh` runs once in the device's thread."""
        self.served, self.steps, self.waiting = served, 0, 0
        self._max_waiting, self._last_seconds = max_waiting, 1.0
        self._device = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "device", initializer=enter_mesh)

    async def deltas(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        """What each token adds, as it is decoded; closing the generator gives the request up.

        Raises:
            Refusal: if the queue is full, or decoding fails.
        """
        if self._device.locked() and self.waiting >= self._max_waiting:
            refusal = Refusal(429, f"{self.waiting} requests are waiting; try again later")
            refusal.error["code"] = "queue_full"
            refusal.headers["Retry-After"] = str(max(1, min(60, round(self._last_seconds))))
            raise refusal
        arrived = time.monotonic()
        self.waiting += 1
        try:
            await self._device.acquire()
        finally:
            self.waiting -= 1
        start, n_tokens, ends = time.monotonic(), 0, []
        steps = replies(self.served, request)
        loop = asyncio.get_running_loop()
        try:
            while deltas := await loop.run_in_executor(self._thread, next, steps, None):
                self.steps += 1
                n_tokens += sum(delta.tokens for delta in deltas)
                ends += [delta.finish for delta in deltas if delta.finish]
                yield deltas
        except Exception as error:  # the next request may well succeed
            logging.exception("a request failed")
            raise Refusal(500, "the server failed; see its log") from error
        finally:
            self._thread.submit(steps.close)  # after the token that is being decoded
            self._device.release()
            self._last_seconds = took = time.monotonic() - start
            logging.info(
                "%s: %d prompt and %d new tokens in %.2f s (%.1f tok/s) after %.2f s in the queue; "
                "%s",
                *("chat" if request.chat else "text", request.prompt_tokens, n_tokens, took),
                *(n_tokens / max(took, 1e-9), start - arrived),
                ", ".join(ends) if len(ends) == len(request.rows) else "abandoned",
            )

    def close(self) -> None:
        """Ends the thread after the current token."""
        self._thread.shutdown(wait=False, cancel_futures=True)
