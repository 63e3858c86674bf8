"""The Zephyr chat template: the one place that turns messages into text, ids and masks.

A message is rendered as `<|role|>`, a newline, its content, `</s>` and a newline; a generation
prompt is `<|assistant|>` and a newline. In ids only `<s>` and `</s>` are tokens of their own. What
lies between two of them is encoded as one stretch with one dummy prefix, header and content
together, so that an answer has the same ids in training and in inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, Any]]

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
    """Token ids of a preference pair; `prompt + chosen` and `prompt + rejected` are its two chats.

    The prompt ends with the generation prompt, each answer with its `</s>` (or what follows it).
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def render_chat(
    tok: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = False,
    bos: bool = True,
    legacy_specials: bool = False,
    append_eos: bool = False,
    empty_system: bool = False,
) -> tuple[list[int], list[int]]:
    """The ids of a chat, and a mask that is 1 on each assistant's content and its `</s>`.

    Headers, the newline after `</s>` and what `append_eos` adds are 0 in the mask.

    Args:
        tok: the tokenizer.
        messages: dicts with `role` and `content`; a system message only as the first.
        add_generation_prompt: end with the header of an assistant's turn.
        bos: begin with one `<s>`.
        legacy_specials: literal `</s>`, `<s>`, `<unk>` in the content become tokens.
        append_eos: a second `</s>` after the last newline of a finished chat (not after a
            generation prompt), as TRL appends.
        empty_system: an empty system message before a chat that has none.

    Example (Mistral, one user message "Hi", then "Yo", bos):
        `[1, 523, 28766, 1838, 28766, 28767, 13, 23809, 2, 28705, 13, ..., 2, 28705, 13]`.

    Raises:
        ValueError: if the messages are not a chat, naming the message and the rule.
    """
    ids, mask = [tok.bos_id] * bos, [0] * bos
    lead = ""
    for message in _with_system(messages, empty_system):
        header = f"{lead}<|{message['role']}|>\n"
        # Nothing merges across a newline: the header's ids are a prefix of the stretch's.
        n_header = len(tok.encode(header))
        stretch = [*tok.encode(header + message["content"], legacy_specials), tok.eos_id]
        answered = int(message["role"] == "assistant")
        ids += stretch
        mask += [0] * n_header + [answered] * (len(stretch) - n_header)
        lead = "\n"
    tail = tok.encode("\n<|assistant|>\n" if add_generation_prompt else "\n")
    if append_eos and not add_generation_prompt:
        tail.append(tok.eos_id)
    return ids + tail, mask + [0] * len(tail)


def render_text(messages: Messages, add_generation_prompt: bool = False) -> str:
    """The text of a chat: what the template gives, without `<s>`.

    Raises:
        ValueError: as `render_chat`.
    """
    turns = [f"<|{m['role']}|>\n{m['content']}</s>\n" for m in _with_system(messages, False)]
    return "".join(turns) + "<|assistant|>\n" * add_generation_prompt


def render_pair(
    tok: Tokenizer,
    prompt_messages: Messages,
    chosen: str,
    rejected: str,
    *,
    bos: bool,
    legacy_specials: bool,
    append_eos: bool,
    empty_system: bool,
) -> PairIds:
    """The ids of a prompt and its two answers, each tokenised together with its header.

    An answer is its content and `</s>`; with `append_eos` also the newline and the second `</s>`
    (Mistral: `2, 28705, 13, 2`). The arguments are those of `render_chat`.

    Raises:
        ValueError: as `render_chat`.
    """
    prompt, _ = render_chat(
        tok,
        prompt_messages,
        add_generation_prompt=True,
        bos=bos,
        legacy_specials=legacy_specials,
        empty_system=empty_system,
    )
    header = "\n<|assistant|>\n"
    n_header = len(tok.encode(header))
    end = [tok.eos_id, *tok.encode("\n"), tok.eos_id] if append_eos else [tok.eos_id]
    answers = []
    for name, content in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(content, str):
            raise ValueError(f"the {name} answer is of type {type(content).__name__}, not str")
        answers.append(tok.encode(header + content, legacy_specials)[n_header:] + end)
    return PairIds(prompt, *answers)


def _with_system(messages: Messages, empty_system: bool) -> Messages:
    """The checked messages, an empty system message put first where one is asked for."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages are of type {type(messages).__name__}; give a list of dicts")
    if not messages:
        raise ValueError("messages are empty; a chat has at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {i} must be a dict with role and content: {message!r:.80}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {i} has role {message['role']!r}; use one of {', '.join(ROLES)}"
            )
        if message["role"] == "system" and i:
            raise ValueError(f"message {i} is a system message; only message 0 may be one")
        if not isinstance(message["content"], str):
            raise ValueError(
                f"message {i} has content of type {type(message['content']).__name__}; it must be "
                "one str"
            )
    if empty_system and messages[0]["role"] != "system":
        return [{"role": "system", "content": ""}, *messages]
    return messages
