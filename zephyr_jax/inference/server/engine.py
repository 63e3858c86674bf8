"""One device, one reply at a time: the queue of requests and the thread that answers them."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from zephyr_jax.inference.decoding import decode, rounded
from zephyr_jax.inference.generate import first_stop, until_stop
from zephyr_jax.inference.server.requests import Asked, Refusal, Served


class Piece(NamedTuple):
    """What one more token of one row adds: text, and "stop" or "length" where the reply ends."""

    row: int
    text: str
    finish: str | None
    drawn: int  # tokens: 1, or 0 at an end without a token of its own


class _Row:
    """One reply while it is made: ids in, certain text out."""

    def __init__(self, served: Served, asked: Asked, number: int):
        self.finish: str | None = None
        self._asked, self._number, self._seen = asked, number, ""
        self._fed: collections.deque[int] = collections.deque()
        ids = iter(lambda: self._fed.popleft() if self._fed else None, None)
        self._pieces = until_stop(self._watched(served.tok.stream(ids)), asked.stop)

    def _watched(self, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            self._seen += piece
            yield piece

    def take(self, token: int, last: bool) -> Piece:
        """The text that a token makes certain; -1: the model's positions have ended."""
        if token < 0 or token in self._asked.ends:
            return self.end("length" if token < 0 else "stop", drawn=int(token >= 0))
        self._fed.append(token)
        text = next(self._pieces)  # of exactly this id
        if first_stop(self._seen, self._asked.stop) is not None:
            self.finish = "stop"
        elif last:
            end = self.end("length", drawn=1)
            return end._replace(text=text + end.text)
        return Piece(self._number, text, self.finish, 1)

    def end(self, finish: str, drawn: int = 0) -> Piece:
        """What was held back until the reply's end was known."""
        self.finish = finish
        return Piece(self._number, "".join(self._pieces), finish, drawn)


def replies(served: Served, asked: Asked) -> Iterator[list[Piece]]:
    """One portion for each token that is decoded, with what it adds to the rows' replies.

    The texts are those of `zephyr_jax.generate` with the same settings. Row numbers count the
    answers to the first prompt, then those to the next.
    """
    rows = [_Row(served, asked, i) for i in range(len(asked.rows))]
    n = 1 << (len(rows) - 1).bit_length()  # few sizes, as each is compiled
    finished = np.arange(n) >= len(rows)
    longest = max(asked.max_tokens, served.max_new_tokens)  # one program for all that are shorter
    portions = decode(
        served.cfg,
        served.weights,
        asked.rows + asked.rows[:1] * (n - len(rows)),
        dataclasses.replace(
            asked.sampling,
            max_new_tokens=rounded(longest, 64),
            stop_ids=asked.ends,
            seed=asked.seed,
        ),
        vocab=min(served.cfg.vocab_size, served.tok.vocab_size),
        chunk=1,
        finished=finished,
    )
    for made, new in enumerate(portions, 1):
        last = made == asked.max_tokens
        new = new[: len(rows), 0].tolist()
        going = [(row, token) for row, token in zip(rows, new, strict=True) if row.finish is None]
        yield [row.take(token, last) for row, token in going]
        finished[: len(rows)] = [row.finish is not None for row in rows]
        if finished.all():
            return
    yield [row.end("length") for row in rows if row.finish is None]


class Work:
    """A request between the event loop that took it and the thread that answers it."""

    def __init__(self, asked: Asked):
        self.asked, self.new_tokens, self.left = asked, 0, False
        self.came = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Piece] | Refusal | None] = asyncio.Queue()

    def tell(self, event: list[Piece] | Refusal | None) -> None:
        """Hands pieces, or what went wrong, to the loop, from any thread; None: that was all."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody is there any more
            self.left = True

    async def portions(self) -> AsyncIterator[list[Piece]]:
        """What the thread hands over, as it comes."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Refusal):
                raise event
            yield event


class Engine:
    """The requests that wait, and the thread with the device that answers one after another.

    Attributes:
        served: the model.
        made: portions decoded so far, each one token of every row of a request.
    """

    def __init__(self, served: Served, max_waiting: int):
        self.served, self.made = served, 0
        self._max_waiting, self._took = max_waiting, 1.0
        self._busy, self._open = False, True
        self._waiting: collections.deque[Work] = collections.deque()
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, work: Work) -> int:
        """Puts a request in the queue: 0; if that is full, the seconds to wait and try again."""
        with self._changed:
            if self._busy + len(self._waiting) > self._max_waiting:
                return max(1, min(60, round(self._took)))
            self._waiting.append(work)
            self._changed.notify()
        return 0

    def leave(self, work: Work) -> None:
        """Gives a request up whose client has left: out of the queue, or after this token."""
        with self._changed:
            work.left = True
            if work in self._waiting:
                self._waiting.remove(work)
                work.tell(None)
                logging.info("a client left the queue")

    def run(self) -> None:
        """Answers until `close`."""
        while True:
            with self._changed:
                self._busy = False
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    for work in self._waiting:
                        work.tell(None)
                    return
                self._busy, work = True, self._waiting.popleft()
            self._answer(work)

    def close(self) -> None:
        """Ends `run` after the token that is being made."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def _answer(self, work: Work) -> None:
        start, ends = time.monotonic(), []
        try:
            for pieces in replies(self.served, work.asked):
                self.made += 1
                work.new_tokens += sum(piece.drawn for piece in pieces)
                ends += [piece.finish for piece in pieces if piece.finish]
                work.tell(pieces)
                if work.left or not self._open:
                    break
        except Exception:  # the next request may well be answered
            logging.exception("a request failed")
            work.tell(Refusal(500, "the server failed; its log says how"))
        work.tell(None)
        self._took = time.monotonic() - start
        logging.info(
            "%s: %d prompt and %d new tokens in %.2f s (%.1f tok/s) after %.2f s in the queue; %s",
            "chat" if work.asked.chat else "text",
            *(work.asked.prompt_tokens, work.new_tokens, self._took),
            *(work.new_tokens / max(self._took, 1e-9), start - work.came),
            ", ".join(ends) if len(ends) == len(work.asked.rows) else "given up",
        )
