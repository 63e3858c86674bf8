"""Requests in OpenAI's form, validated by pydantic and tokenized."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zephyr_jax.data.text.chat import render_chat
from zephyr_jax.inference.generate import adds_bos, check_ids, unfinished_ids
from zephyr_jax.inference.replies import GenerationRequest, ServedModel, grammar
from zephyr_jax.inference.sampling import TOP_LOGPS, SamplingParams

MAX_ROWS = 128  # replies to one request
MAX_ITEMS = 1000  # messages, parts of a message, stop ids
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}

# Fields that are not served and change no reply of this server, whatever they say.
_HARMLESS = """
    model user store metadata service_tier safety_identifier prompt_cache_key prediction
    prompt_cache_retention request_id priority cache_salt cache_prompt id_slot include_reasoning
    parallel_tool_calls spaces_between_special_tokens mirostat_tau mirostat_eta dynatemp_exponent
    xtc_threshold dry_base dry_allowed_length dry_penalty_last_n repeat_last_n
"""
# Those whose values other than null ask for what this server does anyway; of the rest of the fields
# that are not served these are null, false, 0 and what is empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tool_choice", "function_call", "reasoning_effort"), ("none", "auto")),
    **dict.fromkeys(("length_penalty", "typical_p", "typ_p", "tfs_z", "repeat_penalty"), (1,)),
    **dict.fromkeys(("do_sample", "skip_special_tokens", "detokenize"), (True,)),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "web_search_options"), ()),
    "modalities": (["text"],),
    "best_of": (1,),
    "mode": ("instruct", "chat"),
    "top_n_sigma": (-1,),
}
# A message's fields that no template of a text model reads.
_MESSAGE_EXTRAS = ("name", "type", "id", "refusal", "annotations", "reasoning_content", "prefix")


@dataclasses.dataclass(eq=False)
class Refusal(Exception):
    """A request that gets an error in OpenAI's form."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    headers: Mapping[str, str] | None = None

    @property
    def error(self) -> dict[str, str | None]:
        """The error as OpenAI has it."""
        entries = {"message": self.message[:1000], "param": self.param, "code": self.code}
        return entries | {"type": _TYPES.get(self.status, "invalid_request_error")}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(max_length=100)]
    content: str | Annotated[list[_Part], Field(max_length=MAX_ITEMS)] | None = None

    def for_template(self) -> dict[str, Any]:
        """Role and content as the chat template takes them."""
        for name, value in (self.model_extra or {}).items():
            if value and name not in _MESSAGE_EXTRAS:
                raise Refusal(f"a message's {name} is not supported; leave it out", "messages")
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        elif content is None and self.role == "assistant":
            content = ""
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def _json_schema(response_format: dict[str, Any] | None) -> Any:
    """The JSON schema that a response_format asks for; None: any text."""
    match form := response_format or {"type": "text"}:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return form.get("schema") or {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict() | bool() as schema}}:
            return schema
    rule = "should be 'text', 'json_object' or 'json_schema', which needs json_schema.schema"
    raise Refusal(f"response_format.type {rule}", "response_format")


_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
_Length = Annotated[int, Field(ge=-1, lt=2**31)] | None
_Penalty = Annotated[float, Field(ge=-2, le=2)] | None
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Bias = Annotated[
    dict[Annotated[_Id, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]] | None,
    BeforeValidator(lambda bias: bias or None),
]
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Count = Annotated[int, Field(ge=0, le=TOP_LOGPS)] | None
_StopString = Annotated[str, Field(min_length=1, max_length=1000)]
_Stop = Annotated[
    Annotated[list[_StopString], Field(max_length=16)],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]


class _Body(BaseModel):
    """The fields that both endpoints read; null is the default."""

    model_config = ConfigDict(strict=True)

    max_tokens: _Length = None
    max_completion_tokens: _Length = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(k, 0))] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: _Bias = None
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    seed: int | None = None
    stop: _Stop | None = None
    stop_token_ids: Annotated[list[_Id], Field(max_length=MAX_ITEMS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, bool | None] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    def sampling(self, served: ServedModel, limit: int) -> SamplingParams:
        """How replies of up to `limit` tokens are drawn; -1, and what is left out: by the flags."""
        if unknown := [i for i in self.logit_bias or () if i >= served.vocab]:
            message = f"logit_bias has {unknown[0]}, which is no token id below {served.vocab}"
            raise Refusal(message, "logit_bias")
        ends = () if self.ignore_eos else served.sampling.stop_ids or ()
        seed = uuid.uuid4().int if self.seed in (None, -1) else self.seed
        settings = self.model_dump(include=_SAMPLING, exclude_none=True) | {
            "min_new_tokens": self.min_tokens or 0,
            "stop_ids": (*ends, *(self.stop_token_ids or ())),
            "stop": self.stop or (),
            "seed": seed % 2**32,
        }
        if limit != -1:
            settings["max_new_tokens"] = max(limit, 1)
        try:
            return dataclasses.replace(served.sampling, **settings)
        except ValueError as error:  # of two fields together
            raise Refusal(str(error), "min_tokens") from error

    def grammar(self, served: ServedModel) -> str | None:
        """What replies must be made of, in llguidance's form."""
        wanted = [("structured_outputs", *one) for one in (self.structured_outputs or {}).items()]
        wanted.append(("response_format", "json", _json_schema(self.response_format)))
        off = (None,), ("json_object", False)
        wanted = [entry for entry in wanted if entry[2:] not in off and entry[1:] not in off]
        if not wanted:
            return None
        (name, kind, value), *more = wanted
        others = [entry[0] for entry in more]
        others += [other for other in ("ignore_eos", "min_tokens") if getattr(self, other)]
        if others:
            raise Refusal(f"{name} and {others[0]} exclude each other; send one of them", name)
        try:
            return grammar(served, kind, value)
        except (TypeError, ValueError) as error:
            raise Refusal(f"{name} is not valid: {error}", name) from error


class _ChatBody(_Body):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_ITEMS)]
    logprobs: bool | None = None
    top_logprobs: _Count = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens come with each; None: no log-probs."""
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs needs logprobs=true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def ids(self, messages: list[dict[str, Any]], served: ServedModel) -> list[int]:
        """The prompt's; by default a last message of the assistant's is continued."""
        new_turn, unfinished = self.add_generation_prompt, self.continue_final_message
        if new_turn and unfinished:
            name = "continue_final_message"
            raise Refusal(f"{name} and add_generation_prompt exclude each other", name)
        if unfinished is None and new_turn is None:
            unfinished = messages[-1]["role"] == "assistant"
        if unfinished:
            return unfinished_ids(served.tok, messages)
        return render_chat(served.tok, messages, new_turn is not False)[0]


class _TextBody(_Body):
    prompt: Annotated[
        str | _Ids | Annotated[list[str | _Ids], Field(max_length=MAX_ROWS)], Field(min_length=1)
    ]
    logprobs: Annotated[_Count, BeforeValidator(lambda n: None if n is False else n)] = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    def n_logprobs(self) -> int | None:
        return self.logprobs

    def ids(self, prompt: str | list[int], served: ServedModel) -> list[int]:
        """The ids of a prompt; special tokens that a client rendered into a text are tokens."""
        if not isinstance(prompt, str):
            if self.echo:
                served.tok.decode(prompt)  # refuses ids without a text
            return prompt
        ids, bos = served.tok.encode(prompt, parse_special=True), served.tok.bos_id
        begins = adds_bos(served.tok) and self.add_special_tokens is not False
        return [bos, *ids] if begins and ids[:1] != [bos] else ids


def read(body: Any, chat: bool, served: ServedModel) -> GenerationRequest:
    """A request's JSON, validated and tokenized; a Refusal names the field and the rule."""
    fields = _validated(_ChatBody if chat else _TextBody, body, served)
    n, echo = fields.n or 1, ()
    if chat:
        texts = [[message.for_template() for message in fields.messages]]
    else:
        several = isinstance(fields.prompt, list) and not isinstance(fields.prompt[0], int)
        texts = fields.prompt if several else [fields.prompt]
    if len(texts) * n > MAX_ROWS:
        message = f"{len(texts)} prompts times n={n} is above {MAX_ROWS} replies; send fewer"
        raise Refusal(message, "n")
    prompts = [_ids(served, fields, text, "messages" if chat else "prompt") for text in texts]
    if not chat and fields.echo:
        decode = served.tok.decode
        echo = tuple(t if isinstance(t, str) else decode(t) for t in texts for _ in range(n))
    limits = fields.max_completion_tokens, fields.max_tokens, -1 if chat else 16  # OpenAI's
    limit = next(limit for limit in limits if limit is not None)
    if limit == 0 and not echo:
        raise Refusal("max_tokens=0 must be at least 1 (0 goes with echo)", "max_tokens")
    return GenerationRequest(
        chat=chat,
        rows=[ids for ids in prompts for _ in range(n)],
        prompt_tokens=sum(map(len, prompts)),
        sampling=fields.sampling(served, limit),
        stream=bool(fields.stream),
        include_usage=bool((fields.stream_options or {}).get("include_usage")),
        logprobs=fields.n_logprobs(),
        echo=echo,
        only_echo=limit == 0,
        grammar=fields.grammar(served),
    )


def _validated(kind: type[_Body], body: Any, served: ServedModel) -> Any:
    """The fields of a request, none of which is ignored unless it asks for nothing."""
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object")
    if body.get("model") not in (None, served.name):
        message = f"{json.dumps(body['model']):.60} does not exist; the only model is {served.name}"
        raise Refusal(message, "model", "model_not_found", 404)
    for name, value in body.items():
        nothing = value in _NEUTRAL[name] if name in _NEUTRAL else not value
        if not (nothing or value is None or name in {*kind.model_fields, *_HARMLESS.split()}):
            message = f"{name:.60}={json.dumps(value):.60} is not supported here; leave it out"
            raise Refusal(message, name[:60], "unsupported_parameter")
    try:
        return kind.model_validate(body)
    except ValidationError as errors:
        # Of the alternatives of a union the one that got furthest.
        error = max(errors.errors(include_url=False), key=lambda error: len(error["loc"]))
        name = str(error["loc"][0])
        message = f"{name}={json.dumps(body.get(name)):.60} is not valid: {error['msg']}"
        raise Refusal(message, name) from errors


def _ids(served: ServedModel, fields: Any, prompt: Any, name: str) -> list[int]:
    positions, code, ids = served.cfg.max_position_embeddings, "context_length_exceeded", []
    size = len(prompt) if name == "prompt" else sum(len(m["content"] or "") for m in prompt)
    if size > positions * served.longest:  # before the tokenizer is kept busy
        message = f"a length of {size} is more than max_position_embeddings={positions} tokens"
        raise Refusal(f"{name} has {message}; shorten it", name, code)
    try:
        ids = fields.ids(prompt, served)
        check_ids(served.cfg, ids, name)
    except ValueError as error:
        raise Refusal(str(error), name, code if len(ids) > positions else None) from error
    return ids
