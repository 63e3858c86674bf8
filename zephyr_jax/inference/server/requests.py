"""Requests in OpenAI's form, validated by pydantic and tokenized, and the replies to them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import uuid
from collections.abc import Generator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zephyr_jax.data.text.json_tokenizer import JSON_NAME, JsonTokenizer
from zephyr_jax.inference.decoding import decode, rounded
from zephyr_jax.inference.generate import Reply, check_ids, prompt_ids
from zephyr_jax.inference.sampling import SamplingParams

MAX_ROWS = 16  # replies to one request
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}

# Fields that would change a reply and are not supported -> the value that asks for nothing.
_UNSUPPORTED: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "echo": False,
    "suffix": "",
    "best_of": 1,
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
}


class ServedModel(NamedTuple):
    """A model and how it is served."""

    cfg: Any
    params: Any  # in cfg.dtype, as from `cast_params`
    tok: Any
    name: str
    adds_bos: bool  # whether a text without a template begins with BOS
    sampling: SamplingParams  # the settings of a request that names none; stop_ids are set


def adds_bos(tok: Any) -> bool:
    """Whether a text begins with BOS by the tokenizer's own files."""
    if not isinstance(tok, JsonTokenizer) or tok.bos_id is None:
        return tok.bos_id is not None
    library: Any = importlib.import_module("tokenizers")
    original = library.Tokenizer.from_str(tok.files[JSON_NAME].decode())
    return original.encode("a").ids[:1] == [tok.bos_id]


class GenerationRequest(NamedTuple):
    """A request, validated and tokenized."""

    chat: bool
    rows: list[list[int]]  # the ids of every prompt, once for each of its n replies
    prompt_tokens: int  # every prompt counted once
    sampling: SamplingParams
    stream: bool = False
    include_usage: bool = False


class Refusal(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _TYPES.get(status, "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code or None}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: str
    content: str | list[_Part]

    def for_template(self) -> dict[str, str]:
        """Role and content as the chat template takes them."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


_Stop = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]


class _Body(BaseModel):
    """The fields that both endpoints read; unknown ones are ignored, null is the default."""

    model_config = ConfigDict(strict=True)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    seed: int | None = None
    stop: _Stop | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def sampling(self, defaults: SamplingParams, chat: bool) -> SamplingParams:
        """How replies are drawn; what the request leaves out is as the server's flags say."""
        settings = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p")}
        settings["top_k"] = 0 if self.top_k == -1 else self.top_k
        settings["max_new_tokens"] = self.max_completion_tokens or self.max_tokens
        if settings["max_new_tokens"] is None and not chat:
            settings["max_new_tokens"] = 16  # OpenAI's default
        settings = {name: value for name, value in settings.items() if value is not None}
        seed = uuid.uuid4().int if self.seed is None else self.seed
        return dataclasses.replace(defaults, seed=seed % 2**32, stop=self.stop or (), **settings)


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _TextBody(_Body):
    prompt: Annotated[str | list[int] | list[str | list[int]], Field(min_length=1)]


def read(body: Any, chat: bool, served: ServedModel) -> GenerationRequest:
    """A request's JSON, validated and tokenized; a Refusal names the field and the rule."""
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    if body.get("model") not in (None, served.name):
        message = f"the model {_short(body['model'])} does not exist; the only one is {served.name}"
        raise Refusal(404, message, "model", "model_not_found")
    for name, nothing in _UNSUPPORTED.items():
        value = body.get(name)
        same = value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        if value is not None and not same:
            message = f"{name}={_short(value)} is not supported by this server; leave it out"
            raise Refusal(400, message, name, "unsupported_parameter")
    if chat:
        fields = _validated(_ChatBody, body)
        prompts = [_ids([message.for_template() for message in fields.messages], served)]
    else:
        fields = _validated(_TextBody, body)
        several = isinstance(fields.prompt, list) and not isinstance(fields.prompt[0], int)
        prompts = [_ids(text, served) for text in (fields.prompt if several else [fields.prompt])]
    n = fields.n or 1
    if len(prompts) * n > MAX_ROWS:
        message = f"{len(prompts)} prompts times n={n} is above {MAX_ROWS} replies; send fewer"
        raise Refusal(400, message, "n")
    return GenerationRequest(
        chat=chat,
        rows=[ids for ids in prompts for _ in range(n)],
        prompt_tokens=sum(map(len, prompts)),
        sampling=fields.sampling(served.sampling, chat),
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
    )


def _short(value: Any) -> str:
    return f"{json.dumps(value):.60}"


def _validated(kind: type[_Body], body: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as errors:
        # Of the alternatives of a union the one that got furthest.
        error = max(errors.errors(include_url=False), key=lambda error: len(error["loc"]))
        name = str(error["loc"][0])
        message = f"{name}={_short(body.get(name))} is not valid: {error['msg']}"
        raise Refusal(400, message, name) from errors


def _ids(prompt: Any, served: ServedModel) -> list[int]:
    """The ids of messages, of a text or of a list of ids, which the model has positions for."""
    ids, name, tok = prompt, "prompt", served.tok
    try:
        if isinstance(prompt, str):  # special tokens that a client rendered into it are tokens
            ids = tok.encode(prompt, parse_special=True)
            if served.adds_bos and ids[:1] != [tok.bos_id]:
                ids = [tok.bos_id, *ids]
        elif prompt and isinstance(prompt[0], dict):
            name = "messages"
            ids = prompt_ids(tok, prompt)
        check_ids(served.cfg, ids, name)
    except ValueError as error:
        too_long = isinstance(ids, list) and len(ids) > served.cfg.max_position_embeddings
        code = "context_length_exceeded" if too_long else ""
        raise Refusal(400, str(error), name, code) from error
    return ids


class Delta(NamedTuple):
    """What one more token adds to one reply: text, and "stop" or "length" if the reply ends."""

    row: int
    text: str
    finish: str | None
    tokens: int  # 1, or 0 at an end without a token of its own


def replies(served: ServedModel, request: GenerationRequest) -> Generator[list[Delta], None, None]:
    """For each token that is decoded, what it adds to the replies that go on.

    The texts are those of `zephyr_jax.generate` with the same settings. Rows count the replies to
    the first prompt, then those to the next.
    """
    replies = [Reply(served.tok, request.sampling) for _ in request.rows]
    n = 1 << (len(replies) - 1).bit_length()  # few sizes, as each is compiled
    finished = np.arange(n) >= len(replies)
    # One program for all requests up to the server's own limit.
    limit = request.sampling.max_new_tokens
    longest = rounded(max(limit, served.sampling.max_new_tokens), 64)
    chunks = decode(
        served.cfg,
        served.params,
        request.rows + request.rows[:1] * (n - len(replies)),
        dataclasses.replace(request.sampling, max_new_tokens=longest),
        vocab=min(served.cfg.vocab_size, served.tok.vocab_size),
        chunk=1,
        finished=finished,
    )
    for step, chunk in enumerate(chunks, 1):
        deltas = []
        for row, (reply, token) in enumerate(zip(replies, chunk[:, 0].tolist(), strict=False)):
            if reply.finish is None:
                text = reply.add(token) if token >= 0 else ""
                if reply.finish is None and (token < 0 or step == limit):
                    text += reply.end("length")
                deltas.append(Delta(row, text, reply.finish, int(token >= 0)))
        yield deltas
        finished[: len(replies)] = [reply.finish is not None for reply in replies]
        if finished.all():
            return
    ended = [(row, reply) for row, reply in enumerate(replies) if reply.finish is None]
    yield [Delta(row, reply.end("length"), reply.finish, 0) for row, reply in ended]
