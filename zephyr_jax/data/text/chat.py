"""Chats: the one place that turns messages into text, ids and masks.

Zephyr's template renders a message as `<|role|>`, a newline, its content, `</s>` and a newline; a
generation prompt is `<|assistant|>` and a newline. In ids only `<s>` and `</s>` are tokens of their
own. What lies between two of them is encoded as one stretch with one dummy prefix, header and
content together, so that an answer has the same ids in training and in inference.

A `JsonTokenizer` brings its model's own template. Its text is encoded at once, special tokens of
the template as tokens, and an answer is what follows the text of its generation prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.text.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE
from zephyr_jax.data.text.json_tokenizer import BLOT, JsonTokenizer
from zephyr_jax.data.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, Any]]


class PairIds(NamedTuple):
    """Token ids of a preference pair; `prompt + chosen` and `prompt + rejected` are its two chats.

    The prompt ends with the generation prompt, each answer with its `</s>` (or what follows it);
    with `score_header` the generation prompt begins both answers instead.
    """

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
) -> tuple[list[int], list[int]]:
    """The ids of a chat, and a mask that is 1 on each assistant's content and its `</s>`.

    Headers, the newline after `</s>` and what `append_eos` adds are 0 in the mask. With a template
    of the tokenizer's own the mask is 1 from the end of the generation prompt to the closing eos; a
    token that begins in the prompt is 0. If such a template renders an earlier answer otherwise
    once more follows, a finished chat is refused and the mask of a prompt is 0.

    Args:
        tok: the tokenizer.
        messages: dicts with `role` and `content`; a system message only as the first.
        add_generation_prompt: end with the header of an assistant's turn.
        bos: begin with one `<s>`; a template of the tokenizer's own decides for itself.
        parse_special: literal `</s>`, `<s>`, `<unk>` in the content become tokens.
        append_eos: a second `</s>` after the last newline of a finished chat (not after a
            generation prompt), as TRL appends; Zephyr's template only.
        empty_system: an empty system message before a chat that has none; Zephyr's template only.

    Example (Mistral, one user message "Hi", then "Yo", bos):
        `[1, 523, 28766, 1838, 28766, 28767, 13, 23809, 2, 28705, 13, ..., 2, 28705, 13]`.

    Raises:
        ModuleNotFoundError: if the template needs jinja2 and it is not installed.
        ValueError: if the messages are not a chat, naming the message and the rule, or the
            tokenizer's own template refuses or alters them.
    """
    if isinstance(tok, JsonTokenizer):
        _only_zephyrs(append_eos, empty_system)
        return _own_chat(tok, _with_system(messages, False), add_generation_prompt, parse_special)
    ids = [tok.bos_id] if bos and tok.bos_id is not None else []
    mask = [0] * len(ids)
    lead = ""
    for message in _with_system(messages, empty_system):
        header = f"{lead}<|{message['role']}|>\n"
        # Nothing merges across a newline: the header's ids are a prefix of the stretch's.
        n_header = len(tok.encode(header))
        stretch = [*tok.encode(header + message["content"], parse_special), tok.eos_id]
        answered = int(message["role"] == "assistant")
        ids += stretch
        mask += [0] * n_header + [answered] * (len(stretch) - n_header)
        lead = "\n"
    tail = tok.encode("\n<|assistant|>\n" if add_generation_prompt else "\n")
    if append_eos and not add_generation_prompt:
        tail.append(tok.eos_id)
    return ids + tail, mask + [0] * len(tail)


def render_text(messages: Messages, add_generation_prompt: bool = False) -> str:
    """The text of a chat: what Zephyr's template gives, without `<s>`.

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
    parse_special: bool,
    append_eos: bool,
    empty_system: bool,
    score_header: bool = False,
) -> PairIds:
    """The ids of a prompt and its two answers, each tokenized together with its header.

    An answer is its content and `</s>`; with `append_eos` also the newline and the second `</s>`
    (Mistral: `2, 28705, 13, 2`). With `score_header` the header `<|assistant|>` and its newline
    stand at the front of both answers instead of the prompt's end, the ids of the whole unchanged
    (Mistral: `28789, 28766, 489, 11143, 28766, 28767, 13`; the prompt ends `2, 28705, 13`);
    Zephyr's template only. The other arguments are those of `render_chat`.

    Raises:
        ModuleNotFoundError: as `render_chat`.
        ValueError: as `render_chat`.
    """
    for name, content in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(content, str):
            raise ValueError(f"the {name} answer is of type {type(content).__name__}, not str")
    if isinstance(tok, JsonTokenizer):
        _only_zephyrs(append_eos, empty_system, score_header)
        prompt_messages = _with_system(prompt_messages, False)
        return _own_pair(tok, prompt_messages, (chosen, rejected), parse_special)
    prompt, _ = render_chat(
        tok,
        prompt_messages,
        add_generation_prompt=True,
        bos=bos,
        parse_special=parse_special,
        empty_system=empty_system,
    )
    header = "\n<|assistant|>\n"
    n_header = len(tok.encode(header))
    end = [tok.eos_id, *tok.encode("\n"), tok.eos_id] if append_eos else [tok.eos_id]
    answers = []
    for content in (chosen, rejected):
        answers.append(tok.encode(header + content, parse_special)[n_header:] + end)
    if score_header:
        # Nothing merges across the newline before it: the header's own ids follow those of that.
        n_own = n_header - len(tok.encode("\n"))
        prompt, own = prompt[:-n_own], prompt[-n_own:]
        answers = [own + answer for answer in answers]
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


def _only_zephyrs(append_eos: bool, empty_system: bool, score_header: bool = False) -> None:
    asked = {
        "append_eos": append_eos,
        "empty_system": empty_system,
        "score_header": score_header,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ValueError(
                f"{name} belongs to Zephyr's template, and this tokenizer has the template of its "
                f"own model; set chat.{name} to False"
            )


class _Rendering(NamedTuple):
    """A chat in the template of its tokenizer; `blotted` hides what users wrote of specials."""

    text: str
    blotted: str
    messages: Messages  # that render to `blotted`


def _own_chat(
    tok: JsonTokenizer, messages: Messages, prompted: bool, legacy: bool
) -> tuple[list[int], list[int]]:
    chat = _rendering(tok, messages, prompted, legacy)
    ids, starts = tok.encode_rendered(chat.text, chat.blotted)
    target = bytearray(len(chat.text) + 1)
    try:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = _answer_span(tok, chat, i)
                target[start:end] = b"\1" * (end - start)
    except ValueError:
        if not prompted:
            raise
        target = bytearray(len(target))  # nobody trains on a prompt
    return ids, [target[start] for start in starts]


def _own_pair(
    tok: JsonTokenizer, messages: Messages, contents: Sequence[str], legacy: bool
) -> PairIds:
    prompt, _ = _own_chat(tok, messages, True, legacy)
    answers = []
    for content in contents:
        whole = [*messages, {"role": "assistant", "content": content}]
        chat = _rendering(tok, whole, False, legacy)
        start, end = _answer_span(tok, chat, len(messages))
        ids, _ = tok.encode_rendered(chat.text[:end], chat.blotted[:end])
        answer = ids[len(prompt) :]
        if ids[: len(prompt)] != prompt:  # a token would begin in the prompt and end in the answer
            text, blotted = chat.text[start:end], chat.blotted[start:end]
            answer, _ = tok.encode_rendered(text, blotted, continuation=True)
        answers.append(answer)
    return PairIds(prompt, *answers)


def _rendering(tok: JsonTokenizer, messages: Messages, prompted: bool, legacy: bool) -> _Rendering:
    """The text of a chat, and which special tokens in it are the template's own."""
    text = tok.render(messages, prompted)
    blotted, shown = text, list(messages)
    for i, message in enumerate(messages):
        content = message["content"]
        if legacy or (hidden := tok.blotted(content)) == content:
            continue
        shown[i] = {**message, "content": hidden}
        before, blotted = blotted, tok.render(shown, prompted)
        if len(before) != len(blotted) or not all(
            b in (a, BLOT) for a, b in zip(before, blotted, strict=True)
        ):
            raise ValueError(
                f"message {i} spells a special token and the chat template alters its text, so "
                "that the two cannot be told apart; replace the token, or set parse_special"
            )
    return _Rendering(text, blotted, shown)


def _answer_span(tok: JsonTokenizer, chat: _Rendering, i: int) -> tuple[int, int]:
    """Where answer `i` begins in the text, behind its generation prompt, and its eos ends."""
    prompt, eos = tok.render(chat.messages[:i], True), tok.tokens["eos_token"]
    turn = tok.render(chat.messages[: i + 1])
    found = turn.rfind(eos, len(prompt))
    if turn.startswith(prompt) and found < 0:
        raise ValueError(
            f"the chat template does not end message {i} with the eos_token {eos!r}; name the "
            "token that ends a turn as eos_token in tokenizer_config.json"
        )
    end = found + len(eos)
    if not turn.startswith(prompt) or not chat.blotted.startswith(turn[:end]):
        raise ValueError(
            f"the chat template renders what precedes the end of message {i} otherwise where more "
            "follows, so that its answer cannot be found; use a template that only appends"
        )
    return len(prompt), end
