"""OpenAI's interface in front of an engine: requests in, JSON and server-sent events out."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from zephyr_jax.inference.server.engine import Delta, Engine
from zephyr_jax.inference.server.requests import GenerationRequest, Refusal, read

MAX_BODY = 4 << 20  # bytes


def make_app(engine: Engine, token: str = "", cors: Sequence[str] = ()) -> Any:
    """The ASGI application.

    Args:
        engine: the model and the queue of requests.
        token: the API key that clients must send; "": none.
        cors: allowed CORS origins.
    """
    model = {"id": engine.served.name, "object": "model", "created": int(time.time())}
    model |= {"owned_by": "zephyr_jax", "max_model_len": engine.served.cfg.max_position_embeddings}

    async def health(_: Request) -> Response:
        return _json({"status": "ok", "waiting": engine.waiting})

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model["id"]:
            raise Refusal(404, f"the only model is {model['id']!r}", "model", "model_not_found")
        return _json(model)

    async def complete(request: Request) -> Response:
        return await _complete(request, engine, chat="chat" in request.url.path)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    handlers: Any = {Refusal: _refused, HTTPException: _refused, Exception: _refused}
    handlers[ClientDisconnect] = lambda *_: Response(status_code=499)
    app: Any = _guarded(Starlette(routes=routes, exception_handlers=handlers), token)
    if cors:
        app = CORSMiddleware(app, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


def _guarded(app: Any, token: str) -> Any:
    """The application behind an API key; /health is open."""
    expected = f"Bearer {token}".encode()

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if token and scope["type"] == "http" and scope["path"] != "/health":
            header = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(header, expected):
                refusal = Refusal(401, "send Authorization: Bearer TOKEN", code="invalid_api_key")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await _refused(Request(scope), refusal)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guard


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        refusal = Refusal(error.status_code, message)
        refusal.headers |= error.headers or {}
    elif isinstance(error, Refusal):
        refusal = error
    else:
        refusal = Refusal(500, "the server failed; see its log")
    message = " ".join(refusal.error["message"].split())
    logging.info("%s %s: %d %.200s", request.method, request.url.path, refusal.status, message)
    return _json({"error": refusal.error}, refusal.status, refusal.headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_bytes(content), status, headers, "application/json")


def _bytes(content: Any) -> bytes:
    # An error may show half of a surrogate pair that a request had.
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


async def _body(request: Request) -> Any:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise Refusal(413, f"the body is above {MAX_BODY} bytes; send less")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error


async def _complete(request: Request, engine: Engine, chat: bool) -> Response:
    generation = await run_in_threadpool(read, await _body(request), chat, engine.served)
    envelope = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": engine.served.name,
    }
    deltas = engine.deltas(generation)
    watcher = asyncio.create_task(_cancel_on_disconnect(request, asyncio.current_task()))
    try:
        # The first step comes before the status is sent, which a refusal changes.
        steps = _chained(await anext(deltas), deltas)
        if not generation.stream:
            return _json(await _whole(generation, steps, envelope))
    except asyncio.CancelledError:
        await deltas.aclose()
        if not watcher.done():  # the server stops
            raise
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
    return _EventStream(_events(generation, steps, envelope), deltas)


async def _cancel_on_disconnect(request: Request, task: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def _whole(
    request: GenerationRequest, steps: AsyncIterator[list[Delta]], envelope: dict[str, Any]
) -> dict[str, Any]:
    """The response of a request that does not stream."""
    texts, ends = [""] * len(request.rows), [""] * len(request.rows)
    n_tokens = 0
    async for step in steps:
        for delta in step:
            texts[delta.row] += delta.text
            ends[delta.row] = delta.finish or ""
            n_tokens += delta.tokens
    choices = []
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        content: dict[str, Any] = {"text": text}
        if request.chat:
            content = {"message": {"role": "assistant", "content": text}}
        choices.append({"index": i, **content, "logprobs": None, "finish_reason": end})
    return {**envelope, "choices": choices, "usage": _usage(request, n_tokens)}


async def _chained(first: list[Delta], deltas: Any) -> AsyncIterator[list[Delta]]:
    yield first
    async for step in deltas:
        yield step


def _usage(request: GenerationRequest, n_tokens: int) -> dict[str, int]:
    usage = {"prompt_tokens": request.prompt_tokens, "completion_tokens": n_tokens}
    return {**usage, "total_tokens": request.prompt_tokens + n_tokens}


class _EventStream(StreamingResponse):
    """Server-sent events; a client that leaves ends the reply."""

    def __init__(self, events: AsyncIterator[bytes], deltas: Any):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self._deltas = deltas

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._deltas.aclose()


async def _events(
    request: GenerationRequest, steps: AsyncIterator[list[Delta]], envelope: dict[str, Any]
) -> AsyncIterator[bytes]:
    if request.chat:
        envelope["object"] += ".chunk"
    if request.include_usage:
        envelope["usage"] = None

    def event(choices: list[Any], **more: Any) -> bytes:
        return b"data: " + _bytes({**envelope, "choices": choices, **more}) + b"\n\n"

    def choice(row: int, finish: str | None, **content: Any) -> dict[str, Any]:
        if request.chat:
            content = {"delta": content}
        return {"index": row, **content, "logprobs": None, "finish_reason": finish}

    name = "content" if request.chat else "text"
    n_tokens = 0
    try:
        if request.chat:
            for row in range(len(request.rows)):
                yield event([choice(row, None, role="assistant", content="")])
        async for step in steps:
            for delta in step:
                n_tokens += delta.tokens
                if delta.text or delta.finish:
                    yield event([choice(delta.row, delta.finish, **{name: delta.text})])
        if request.include_usage:
            yield event([], usage=_usage(request, n_tokens))
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:  # the status has been sent already
        yield b"data: " + _bytes({"error": refusal.error}) + b"\n\n"
