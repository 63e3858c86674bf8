"""OpenAI's interface: a queue in front of one device, JSON and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from zephyr_jax.inference.replies import Delta, GenerationRequest, ServedModel, replies, warm_up
from zephyr_jax.inference.requests import Refusal, read

MAX_BODY, MAX_BODIES = 4 << 20, 64 << 20  # bytes of one body, and of all that are being read
SMALL_BODY = 64 << 10  # bytes of a body that is read in any case
# That a client may take to send its headers, or a body, or to read a part of its response
SLOW_SECONDS = 10.0
STUCK_SECONDS = 300.0  # without a token, for /health; a first one may have to be compiled
_FAILED = "the server failed; see its log"
_LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


class Engine:
    """The queue of requests, and the thread with the device that answers one after another."""

    def __init__(self, served: ServedModel, max_waiting: int, enter_mesh: Callable | None = None):
        """`enter_mesh` runs once in the device's thread."""
        self.served = served
        self.steps = 0  # tokens decoded so far, over all requests
        self.waiting, self.max_waiting = 0, max_waiting  # requests in the queue
        self._last_seconds = 1.0
        self._since = math.inf  # when the device began with its present token
        self._device = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "device", initializer=enter_mesh)

    def warm_up(self) -> None:
        """Compiles what ordinary requests need, as `replies.warm_up` does."""
        self._thread.submit(warm_up, self.served).result()

    @property
    def seconds(self) -> float:
        """How long the device has been at its present token; 0: at none."""
        return max(0.0, time.monotonic() - self._since)

    def _next(self, steps: Iterator[list[Delta]]) -> list[Delta] | None:
        self._since = time.monotonic()
        try:
            return next(steps, None)
        finally:
            self._since = math.inf

    async def deltas(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        """What each token adds, as it is decoded; closing the generator gives the request up."""
        if self._device.locked() and self.waiting >= self.max_waiting:
            message = f"{self.waiting} requests are waiting; try again later"
            headers = {"Retry-After": str(max(1, min(60, round(self._last_seconds))))}
            raise Refusal(message, None, "queue_full", 429, headers)
        self.waiting += 1
        try:
            await self._device.acquire()
        finally:
            self.waiting -= 1
        start, n_tokens = time.monotonic(), 0
        steps = replies(self.served, request)
        loop = asyncio.get_running_loop()
        try:
            while True:
                deltas = await loop.run_in_executor(self._thread, self._next, steps)
                if deltas is None:
                    break
                self.steps += 1
                n_tokens += sum(delta.tokens for delta in deltas)
                yield deltas
        except Exception as error:  # the next request may well succeed
            logging.exception("a request failed")
            raise Refusal(_FAILED, status=500) from error
        finally:
            self._thread.submit(steps.close)  # after the token that is being decoded
            self._device.release()
            self._last_seconds = took = time.monotonic() - start
            counts = "chat" if request.chat else "text", request.prompt_tokens, n_tokens
            message = "%s: %d prompt and %d new tokens in %.2f s (%.1f tok/s), %d waiting"
            logging.info(message, *counts, took, n_tokens / max(took, 1e-9), self.waiting)


def make_app(engine: Engine, token: str = "", cors: Sequence[str] = (), local: bool = False) -> Any:
    """The ASGI application behind `token`, if any; with `local` for origins in `cors` alone."""
    model = {"id": engine.served.name, "object": "model", "created": int(time.time())}
    model |= {"owned_by": "zephyr_jax", "max_model_len": engine.served.cfg.max_position_embeddings}
    bodies = _Bodies(engine.served)

    async def health(_: Request) -> Response:
        age = engine.seconds
        status, code = ("stuck", 503) if age > STUCK_SECONDS else ("ok", 200)
        more = {"waiting": engine.waiting, "seconds_without_token": round(age, 1)}
        return _json({"status": status, **more}, code)

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model["id"]:
            raise Refusal(f"the only model is {model['id']!r}", "model", "model_not_found", 404)
        return _json(model)

    async def complete(request: Request) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(f"Content-Type is {kind:.60}; send application/json", status=415)
        wanted = await bodies.read(request)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        kind = "text/event-stream" if wanted.stream else "application/json"
        return _Reply(_parts(engine, wanted), 200, headers, kind)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers: Any = {Refusal: _refused, HTTPException: _refused, Exception: _refused}
    handlers[ClientDisconnect] = lambda *_: Response(status_code=499)
    app: Any = Starlette(routes=routes, exception_handlers=handlers)
    app = _guarded(app, token, cors if local else None)
    if cors:
        app = CORSMiddleware(app, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


class _Bodies:
    """Bodies to requests, four at a time, so that one does not wait for the grammars of others."""

    def __init__(self, served: ServedModel):
        self._served, self._bytes, self._threads = served, 0, ThreadPoolExecutor(4)

    async def read(self, request: Request) -> GenerationRequest:
        data, chat = bytearray(), "chat" in request.url.path
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    self._bytes += len(chunk)
                    if len(data) > MAX_BODY:
                        raise Refusal(f"the body is above {MAX_BODY} bytes", status=413)
                    if len(data) > SMALL_BODY and self._bytes > MAX_BODIES:
                        message = "many long bodies are being read; try again later"
                        raise Refusal(message, None, "queue_full", 429, {"Retry-After": "10"})
            return await loop.run_in_executor(
                self._threads, lambda: read(json.loads(data), chat, self._served)
            )
        except TimeoutError as error:
            message = f"the body took more than {SLOW_SECONDS:.0f} seconds"
            raise Refusal(message, status=408) from error
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body cannot be read: {error}") from error
        finally:
            self._bytes -= len(data)


class Connection(H11Protocol):
    """A connection that is closed where the headers of a request take more than SLOW_SECONDS."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Something was sent."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._closing is None:
            self._closing = self.loop.call_later(SLOW_SECONDS, self.transport.abort)
        elif not idle and self._closing is not None:
            self._closing.cancel()
            self._closing = None


def _guarded(app: Any, token: str, origins: Sequence[str] | None) -> Any:
    """The application behind an API key (/health is open), and only for `origins` if not None."""
    expected = f"Bearer {token}".encode()

    def refusal(path: str, headers: Headers) -> Refusal | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origins is not None and not _LOCAL.fullmatch(host):
            return Refusal(f"Host is {host:.60}; use localhost or 127.0.0.1", status=403)
        if origins is not None and origin is not None and not {origin, "*"} & {*origins}:
            return Refusal(f"web pages of {origin:.60} are refused; see --cors", status=403)
        key = headers.get("authorization", "").encode()
        if token and path != "/health" and not hmac.compare_digest(key, expected):
            more = {"WWW-Authenticate": "Bearer"}
            return Refusal("send Authorization: Bearer TOKEN", None, "invalid_api_key", 401, more)
        return None

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        refused = refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        answer = app if refused is None else _refused(Request(scope), refused)
        await answer(scope, receive, send)

    return guard


def _refused(request: Request, error: Exception) -> Response:
    where = f"{request.method} {request.url.path}"
    if isinstance(error, HTTPException):
        error = Refusal(f"{where}: {error.detail}", status=error.status_code, headers=error.headers)
    refusal = error if isinstance(error, Refusal) else Refusal(_FAILED, status=500)
    logging.info("%s: %d %.200s", where, refusal.status, " ".join(refusal.message.split()))
    return _json({"error": refusal.error}, refusal.status, refusal.headers)


def _json(content: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


class _Reply(StreamingResponse):
    """Its status is sent with its first part; a client that leaves or does not read closes it."""

    body_iterator: Any  # the generator of the parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()

    async def stream_response(self, send: Any) -> None:
        held = []  # the message with the status, until the first part is there

        async def send_in_time(message: Any) -> None:
            held.append(message)
            while held and message["type"] == "http.response.body":
                async with asyncio.timeout(SLOW_SECONDS):
                    await send(held.pop(0))

        with contextlib.suppress(TimeoutError):
            await super().stream_response(send_in_time)


async def _parts(engine: Engine, request: GenerationRequest) -> AsyncGenerator[str, None]:
    chat, stream = request.chat, request.stream
    kind = "chat.completion" if chat else "text_completion"
    envelope: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": f"{kind}.chunk" if chat and stream else kind,
        "created": int(time.time()),
        "model": engine.served.name,
    }
    rows: list[list[Delta]] = [[] for _ in request.rows]

    def choice(deltas: list[Delta], begins: bool) -> dict[str, Any]:
        text, row = "".join(delta.text for delta in deltas), deltas[-1].row
        content: dict[str, Any] = {"text": text}
        if chat:
            role = {"role": "assistant"} if begins else {}
            content = {"delta" if stream else "message": {**role, "content": text}}
        entries, logprobs = [entry for delta in deltas for entry in delta.logprobs], None
        if entries and chat:
            logprobs = {"content": entries, "refusal": None}
        elif entries:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = dict(zip(names, zip(*entries, strict=True), strict=True))
        return {"index": row, **content, "logprobs": logprobs, "finish_reason": deltas[-1].finish}

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    no_usage = {"usage": None} if request.include_usage else {}
    try:
        async with contextlib.aclosing(engine.deltas(request)) as steps:
            async for delta in (delta async for step in steps for delta in step):
                begins = not rows[delta.row]
                rows[delta.row].append(delta)
                if stream and (begins or delta.text or delta.finish or delta.logprobs):
                    yield event({**envelope, "choices": [choice([delta], begins)], **no_usage})
    except Refusal as refusal:
        if not stream or not any(rows):
            raise
        yield event({"error": refusal.error})
        return
    n, n_prompt = sum(d.tokens for row in rows for d in row), request.prompt_tokens
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
    if not stream:
        choices = [choice(row, True) for row in rows]
        yield json.dumps({**envelope, "choices": choices, "usage": usage})
        return
    if request.include_usage:
        yield event({**envelope, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"
