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

from zephyr_jax.inference.server.engine import Engine, Piece, Work
from zephyr_jax.inference.server.requests import Refusal, read

MAX_BODY = 4 << 20  # bytes


def make_app(engine: Engine, token: str = "", cors: Sequence[str] = ()) -> Any:
    """The ASGI application.

    Args:
        engine: whose `run` is going on in a thread.
        token: what clients must send; "": nothing.
        cors: origins whose pages may ask.
    """

    async def health(_: Request) -> Response:
        return _json({"status": "ok", "waiting": engine.waiting})

    model = {"id": engine.served.name, "object": "model", "created": int(time.time())}
    model |= {"owned_by": "zephyr_jax", "max_model_len": engine.served.cfg.max_position_embeddings}

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != model["id"]:
            raise Refusal(404, f"there is only {model['id']!r}", "model", "model_not_found")
        return _json(model)

    async def chat(request: Request) -> Response:
        return await _complete(request, engine, True)

    async def text(request: Request) -> Response:
        return await _complete(request, engine, False)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
    ]
    handlers: Any = {Refusal: _refused, HTTPException: _refused, Exception: _refused}
    handlers[ClientDisconnect] = lambda *_: Response(status_code=499)
    app: Any = _guarded(Starlette(routes=routes, exception_handlers=handlers), token)
    if cors:
        app = CORSMiddleware(app, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


def _guarded(app: Any, token: str) -> Any:
    """The application behind a token; /health is open."""
    wanted = f"Bearer {token}".encode()

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if token and scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, wanted):
                refusal = Refusal(401, "send Authorization: Bearer TOKEN", code="invalid_api_key")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await _refused(Request(scope), refusal)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guard


def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        said = f"{request.method} {request.url.path}: {error.detail}"
        refusal = Refusal(error.status_code, said)
        refusal.headers |= error.headers or {}
    elif isinstance(error, Refusal):
        refusal = error
    else:
        refusal = Refusal(500, "the server failed; its log says how")
    said = " ".join(refusal.error["message"].split())
    logging.info("%s %s: %d %.200s", request.method, request.url.path, refusal.status, said)
    return _json({"error": refusal.error}, refusal.status, refusal.headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_bytes(content), status, headers, "application/json")


def _bytes(content: Any) -> bytes:
    # A request may have brought half of a surrogate pair, which an error then shows.
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


async def _body(request: Request) -> Any:
    told, data = request.headers.get("content-length", "0"), bytearray()
    too_large = Refusal(413, f"the body is above {MAX_BODY} bytes; send less")
    if told.isdecimal() and int(told) > MAX_BODY:
        raise too_large
    async for portion in request.stream():
        data += portion
        if len(data) > MAX_BODY:
            raise too_large
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error


async def _complete(request: Request, engine: Engine, chat: bool) -> Response:
    work = Work(await run_in_threadpool(read, await _body(request), chat, engine.served))
    if seconds := engine.submit(work):
        refusal = Refusal(429, f"{engine.waiting} requests wait already; try again later")
        refusal.error["code"] = "queue_full"
        refusal.headers["Retry-After"] = str(seconds)
        raise refusal
    watcher = asyncio.create_task(_watch(request, engine, work))
    envelope = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": engine.served.name,
    }
    if work.asked.stream:
        events = _events(engine, work, watcher, envelope)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, 200, headers, "text/event-stream")
    texts, ends = [""] * len(work.asked.rows), [""] * len(work.asked.rows)
    try:
        async for pieces in work.portions():
            for piece in pieces:
                texts[piece.row] += piece.text
                ends[piece.row] = piece.finish or ""
    finally:
        watcher.cancel()
        engine.leave(work)
    if not all(ends):
        raise Refusal(503, "the server stops")  # or the client has left and reads nothing
    choices = []
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": i, **said, "logprobs": None, "finish_reason": end})
    return _json({**envelope, "choices": choices, "usage": _usage(work)})


async def _watch(request: Request, engine: Engine, work: Work) -> None:
    """Gives the request up when its client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    engine.leave(work)


def _usage(work: Work) -> dict[str, int]:
    prompt, new = work.asked.prompt_tokens, work.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _events(
    engine: Engine, work: Work, watcher: asyncio.Task[None], envelope: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The server-sent events of a reply."""
    asked = work.asked
    if asked.chat:
        envelope["object"] += ".chunk"
    if asked.include_usage:
        envelope["usage"] = None

    def event(choices: list[Any], **more: Any) -> bytes:
        return b"data: " + _bytes({**envelope, "choices": choices, **more}) + b"\n\n"

    def choice(piece: Piece, **delta: Any) -> dict[str, Any]:
        said = {"delta": delta} if asked.chat else {"text": piece.text}
        return {"index": piece.row, **said, "logprobs": None, "finish_reason": piece.finish}

    try:
        for i in range(len(asked.rows) if asked.chat else 0):
            yield event([choice(Piece(i, "", None, 0), role="assistant", content="")])
        async for pieces in work.portions():
            for piece in pieces:
                if asked.chat and piece.text:
                    delta = choice(piece._replace(finish=None), content=piece.text)
                    yield event([delta])
                if piece.finish or (piece.text and not asked.chat):
                    yield event([choice(piece)])
        if asked.include_usage:
            yield event([], usage=_usage(work))
        yield b"data: [DONE]\n\n"
    except Refusal as refusal:  # the status has been sent already
        yield b"data: " + _bytes({"error": refusal.error}) + b"\n\n"
    finally:
        watcher.cancel()
        engine.leave(work)
