"""Requests in OpenAI's form: read, checked and tokenized, or refused with a reason."""

from __future__ import annotations

import dataclasses
import importlib
import json
import uuid
from typing import Any, NamedTuple

from zephyr_jax.data.text.json_tokenizer import JSON_NAME, JsonTokenizer
from zephyr_jax.inference.generate import check_ids, prompt_ids

MAX_ROWS = 16  # replies to one request
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}

# field -> its type, least and greatest; a missing field and null are the default
_NUMBERS = {
    "temperature": (float, 0, 1000),
    "top_p": (float, 1e-6, 1),
    "top_k": (int, -1, 2**31 - 1),
    "min_p": (float, 0, 1),
    "max_tokens": (int, 1, 2**31 - 1),
    "max_completion_tokens": (int, 1, 2**31 - 1),
    "n": (int, 1, MAX_ROWS),
    "seed": (int, -(2**63), 2**64 - 1),
}
# What would change a reply and is not done here: the values of each field that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


class Served(NamedTuple):
    """A model and how it is served."""

    cfg: Any
    weights: Any  # in cfg.dtype, as from `cast_params`
    tok: Any
    name: str
    adds_bos: bool  # whether a text without a template begins with BOS
    max_new_tokens: int
    sampling: Any  # where a request says nothing

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        return tuple(sorted({self.tok.eos_id, self.cfg.eos_token_id}))


class Asked(NamedTuple):
    """A request, read and checked."""

    chat: bool
    rows: list[list[int]]  # every prompt's ids, as often as it is to be answered
    prompt_tokens: int  # every prompt counted once
    max_tokens: int
    sampling: Any
    ends: tuple[int, ...]
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool = False
    include_usage: bool = False


def adds_bos(tok: Any) -> bool:
    """Whether a text begins with BOS where its tokenizer's files have their way."""
    if not isinstance(tok, JsonTokenizer) or tok.bos_id is None:
        return tok.bos_id is not None
    library: Any = importlib.import_module("tokenizers")
    whole = library.Tokenizer.from_str(tok.files[JSON_NAME].decode())
    return whole.encode("a").ids[:1] == [tok.bos_id]


class Refusal(Exception):
    """A request that gets an error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {}
        self.error = {
            "message": message,
            "type": _TYPES.get(status, "invalid_request_error"),
            "param": param,
            "code": code or None,
        }


def read(body: Any, chat: bool, served: Served) -> Asked:
    """A request's JSON, checked and tokenized.

    Raises:
        Refusal: naming the field and the rule.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    if body.get("model") not in (None, served.name):
        said = f"the model {str(body['model'])[:80]!r} is not here; there is {served.name!r}"
        raise Refusal(404, said, "model", "model_not_found")
    for name, nothing in _REFUSED.items():
        value = body.get(name)
        same = [x == value and isinstance(x, bool) == isinstance(value, bool) for x in nothing]
        if value is not None and not any(same):
            said = f"{name}={_shown(value)} is not served here; leave it out"
            raise Refusal(400, said, name, "unsupported_parameter")
    given = {name: _number(body, name) for name in _NUMBERS}
    flags = {name: body.get(name) or False for name in ("stream", "stream_options")}
    if not isinstance(flags["stream"], bool):
        raise Refusal(400, f"stream={_shown(flags['stream'])} must be true or false", "stream")
    options = flags["stream_options"] or {}
    if not isinstance(options, dict):
        raise Refusal(400, "stream_options must be an object", "stream_options")
    prompts = _chat_ids(body, served) if chat else _text_ids(body, served)
    n = 1 if given["n"] is None else given["n"]
    if len(prompts) * n > MAX_ROWS:
        said = f"{len(prompts)} prompts times n={n} is above {MAX_ROWS} replies; send fewer at once"
        raise Refusal(400, said, "n")
    names = ("temperature", "top_k", "top_p", "min_p")
    drawing = {k: given[k] for k in names if given[k] is not None}
    if drawing.get("top_k") == -1:
        drawing["top_k"] = 0
    longest = given["max_completion_tokens"] or given["max_tokens"]
    seed = uuid.uuid4().int if given["seed"] is None else given["seed"]
    return Asked(
        chat=chat,
        rows=[ids for ids in prompts for _ in range(n)],
        prompt_tokens=sum(map(len, prompts)),
        max_tokens=longest or (served.max_new_tokens if chat else 16),  # 16 is OpenAI's default
        sampling=dataclasses.replace(served.sampling, **drawing),
        ends=served.ends,
        stop=_stop(body.get("stop")),
        seed=seed % 2**32,
        stream=flags["stream"],
        include_usage=bool(options.get("include_usage")),
    )


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"


def _number(body: dict[str, Any], name: str) -> Any:
    value, (kind, least, greatest) = body.get(name), _NUMBERS[name]
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole or (kind is float and isinstance(value, float))
    if not fits or not least <= value <= greatest:
        what = "a whole number" if kind is int else "a number"
        said = f"{name}={_shown(value)} must be {what} from {least} to {greatest}"
        raise Refusal(400, said, name)
    return kind(value)


def _stop(value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        said = f"stop={_shown(value)} must be a string or a list of strings, none of them empty"
        raise Refusal(400, said, "stop")
    return tuple(stop)


def _chat_ids(body: dict[str, Any], served: Served) -> list[list[int]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list with at least one message", "messages")
    try:
        ids = prompt_ids(served.tok, [_message(message) for message in messages])
    except ValueError as error:
        raise Refusal(400, str(error), "messages") from error
    return [_fitting(ids, served, "messages")]


def _message(message: Any) -> Any:
    """Role and content as the chat template takes them; what is none of that as it came."""
    if not isinstance(message, dict):
        raise ValueError(f"a message must be an object with role and content, not {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        for part in content:
            fits = isinstance(part, dict) and part.get("type") == "text"
            if not fits or not isinstance(part.get("text"), str):
                raise ValueError(f"content holds {part!r:.60}; only parts of type text are read")
        content = "\n".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_ids(body: dict[str, Any], served: Served) -> list[list[int]]:
    prompt = body.get("prompt")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts:
        said = "prompt must be a string, a list of token ids, or a list of either"
        raise Refusal(400, said, "prompt")
    every = []
    for text in prompts:
        if isinstance(text, str):
            try:  # a text that somebody rendered has its special tokens spelled out
                ids = served.tok.encode(text, parse_special=True)
            except ValueError as error:
                raise Refusal(400, str(error), "prompt") from error
            if served.adds_bos and ids[:1] != [served.tok.bos_id]:
                ids = [served.tok.bos_id, *ids]
        elif isinstance(text, list) and _is_ids(text):
            ids = text
        else:
            raise Refusal(400, f"prompt holds {_shown(text)}, no text and no token ids", "prompt")
        every.append(_fitting(ids, served, "prompt"))
    return every


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _fitting(ids: list[int], served: Served, name: str) -> list[int]:
    try:
        check_ids(served.cfg, ids, name)
    except ValueError as error:
        long = len(ids) > served.cfg.max_position_embeddings
        raise Refusal(400, str(error), name, "context_length_exceeded" * long) from error
    return ids
