"""Chats: messages to text, ids and masks, in Zephyr's format or a model's own template.

Zephyr's template renders a message as `<|role|>`, a newline, its content, `</s>` and a newline; a
generation prompt is `<|assistant|>` and a newline. Only `<s>` and `</s>` are tokens of their own.
The text between two of them is encoded at once, header and content together, so that an answer has
the same ids in training and in inference. Other templates are untrusted code, so they run in
Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox

from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import trial

Messages = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant")
TOOL_ROLES = ("tool", "assistant with tool_calls")  # in templates of a model's own
# Every tag strips the whitespace around it, so the engine's own trim settings change nothing; no
# `generation` tags, which plain jinja2 rejects. An unknown role is an error in every engine.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
    {{- raise_exception('role ' + message['role'] + ' is not system, user or assistant') -}}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


class PairIds(NamedTuple):
    """Token ids of a preference pair; `prompt + chosen` and `prompt + rejected` are its chats."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def render_chat(
    tok: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = False,
    bos: bool = True,
    parse_special: bool = False,
    append_eos: bool = False,
    empty_system: bool = False,
    loss_on_all: bool = False,
) -> tuple[list[int], list[int]]:
    """The ids of a chat, and a mask that is 1 on each assistant's content and its `</s>`.

    With `loss_on_all` the rest is 1, too; a message whose `train` is False is 0 in either case.
    With `parse_special` literal special tokens in the content become tokens.

    For Zephyr's format only: `bos` begins the ids with one `<s>`, `append_eos` ends a finished chat
    with a second `</s>`, as TRL does, and `empty_system` begins one that has no system message with
    an empty one. A template of the model's own may have turns of tools. Its mask is 1 from the end
    of the generation prompt to the closing eos. If it renders an earlier target otherwise once more
    follows, a finished chat is refused and the mask of a prompt is 0.
    """
    if tok.chat_format is not None:
        messages = check_messages(messages, (*ROLES, *TOOL_ROLES))
        _check_unset(append_eos, empty_system)
        return tok.chat_format.chat(messages, add_generation_prompt, parse_special, loss_on_all)
    messages = check_messages(messages)
    if empty_system and messages[0]["role"] != "system":
        messages = [{**messages[0], "role": "system", "content": ""}, *messages]
    ids, mask, newline, header_target = [], [], "", 0
    begin = [tok.bos_id] if bos and tok.bos_id is not None else []
    for message in messages:
        header = f"{newline}<|{message['role']}|>\n"
        # Nothing merges across a newline: the header's ids are a prefix of the turn's.
        n_header = len(begin) + len(tok.encode(header))
        turn = [*begin, *tok.encode(header + message["content"], parse_special), tok.eos_id]
        trained = message.get("train", True)
        header_target = int(loss_on_all and trained)
        target = int(trained and (loss_on_all or message["role"] == "assistant"))
        ids += turn
        mask += [header_target] * n_header + [target] * (len(turn) - n_header)
        begin, newline = [], "\n"
    tail = tok.encode("\n<|assistant|>\n" if add_generation_prompt else "\n")
    if append_eos and not add_generation_prompt:
        tail.append(tok.eos_id)
    return ids + tail, mask + [header_target] * len(tail)


def render_pair(
    tok: Tokenizer,
    messages: Messages,
    chosen: str,
    rejected: str,
    *,
    score_header: bool = False,
    **options: bool,
) -> PairIds:
    """The ids of a prompt and its two answers, each tokenized together with its header.

    An answer is its content and `</s>`; with `append_eos` also the newline and the second `</s>`.
    With `score_header` (Zephyr's format only) the header `<|assistant|>` and its newline move from
    the prompt's end to the front of both answers. `options` are the rest of `render_chat`'s.
    """
    contents = chosen, rejected
    prompt, _ = render_chat(tok, messages, True, **options)
    parse_special = options.get("parse_special", False)
    if tok.chat_format is not None:
        _check_unset(score_header)
        template = tok.chat_format
        answers = [template.answer(messages, prompt, text, parse_special) for text in contents]
        return PairIds(prompt, *answers)
    header = "\n<|assistant|>\n"
    n_header = len(tok.encode(header))
    end = [tok.eos_id, *tok.encode("\n"), tok.eos_id] if options.get("append_eos") else [tok.eos_id]
    answers = [tok.encode(header + content, parse_special)[n_header:] + end for content in contents]
    if score_header:
        # Nothing merges across the newline before it, so the header's ids follow the newline's.
        n_own = n_header - len(tok.encode("\n"))
        prompt, own = prompt[:-n_own], prompt[-n_own:]
        answers = [own + answer for answer in answers]
    return PairIds(prompt, *answers)


def _check_unset(*options: bool) -> None:
    """Raises a ValueError if options are set that a template of a model's own does not have."""
    if any(options):
        raise ValueError(
            "append_eos, empty_system and score_header belong to Zephyr's template, and this "
            "tokenizer has the template of its own model; set them to False"
        )


def render_text(messages: Messages, add_generation_prompt: bool = False) -> str:
    """The text of a chat: what Zephyr's template gives, without `<s>`."""
    turns = [f"<|{m['role']}|>\n{m['content']}</s>\n" for m in check_messages(messages)]
    return "".join(turns) + "<|assistant|>\n" * add_generation_prompt


def check_messages(messages: Messages, roles: Sequence[str] = ROLES) -> Messages:
    """The messages; raises a ValueError that names the message and the rule if they are no chat."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of at least one dict: {messages!r:.80}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {i} must be a dict with role and content: {message!r:.80}")
        role = TOOL_ROLES[1] if message.get("tool_calls") else message["role"]
        if role not in roles:
            raise ValueError(f"message {i} has role {role!r}; use one of {', '.join(roles)}")
        if message["role"] == "system" and i:
            raise ValueError(f"message {i} is a system message; only message 0 may be one")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"message {i} has content of type {kind}; it must be one str")
    return messages


def compile_template(source: str, tokens: Mapping[str, str]) -> Callable[..., str]:
    """A function that renders messages; a template may call `tokens` by name, as `bos_token`."""
    if source != CHAT_TEMPLATE and (wrong := trial(_TRIAL, json.dumps([source, {**tokens}]))):
        raise ValueError(f"the chat template cannot be used: {wrong}")
    # `{% generation %}` marks an answer for other trainers: a block of its own, as `with` is.
    source = re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", source)
    try:
        template = _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise ValueError(f"the chat template is not Jinja: line {line}: {error}") from error

    def render(messages: Messages, add_generation_prompt: bool = False) -> str:
        messages = [dict(message) for message in messages]
        names = {"messages": messages, "tools": None, "documents": None, **tokens}
        try:
            return template.render(names, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # untrusted code may raise anything
            reason = " ".join((str(error) or repr(error)).split())
            raise ValueError(f"the chat template cannot render these messages: {reason}") from error

    return render


# Blanks at both ends, no system turn and an unanswered question: where templates differ.
_ROLES = ("system", "user", "assistant", "user")
_TEXTS = (" Be brief.\n", "\n Which one? ", " This.\n", "Why?")
_SAMPLE = [{"role": role, "content": x} for role, x in zip(_ROLES, _TEXTS, strict=True)]
_LONG = [{**message, "content": message["content"] * 200} for message in _SAMPLE[1:3] * 50]
SAMPLES = ((_SAMPLE, True), (_SAMPLE[:3], False), (_SAMPLE[1:], True), (_LONG, False))
_TRIAL = """
import json, os, sys
from zephyr_jax.data.text import chat
arguments = json.load(sys.stdin)
chat.trial = lambda *_: ""
for sample in chat.SAMPLES:
    try:
        chat.compile_template(*arguments)(*sample)
    except ValueError as error:
        "MemoryError" in str(error) and os.abort()
"""


def renders_as_zephyr(source: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether a template gives what ours gives, but for `bos_token`; each with its own tokens."""
    zephyr = compile_template(CHAT_TEMPLATE, ours)
    try:
        other = compile_template(source, theirs)
        return all(
            zephyr(*sample).removeprefix(ours["bos_token"])
            == other(*sample).removeprefix(theirs["bos_token"])
            for sample in SAMPLES
        )
    except ValueError:
        return False


@functools.cache
def _environment() -> Any:
    """Jinja with the settings and names that templates of the hub rely on."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own `tojson` escapes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
