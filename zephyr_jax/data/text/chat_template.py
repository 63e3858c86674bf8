"""A model's own chat template, rendered as transformers does, and its chats as ids and masks.

Templates come with models and are untrusted code, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.sandbox

from zephyr_jax.data.text.chat import CHAT_TEMPLATE, Messages

if TYPE_CHECKING:
    from zephyr_jax.data.text.json_tokenizer import JsonTokenizer

MASK = "\U00100000"  # for private use: no template treats it as a blank, a quote or a line end
# Blanks at both ends, no system turn and an unanswered question: where templates differ.
_SAMPLE = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "\n Which one? "},
    {"role": "assistant", "content": " This.\n"},
    {"role": "user", "content": "Why?"},
]
_SAMPLES = ((_SAMPLE, True), (_SAMPLE[:3], False), (_SAMPLE[1:], True), (_SAMPLE[1:3], False))


def compile_template(source: str, tokens: Mapping[str, str]) -> Callable[..., str]:
    """A function of messages and whether to add a generation prompt, which renders them.

    The template may call `tokens` by name, such as `bos_token`. A ValueError says that it is not
    Jinja, or in its own words why it refuses the messages.
    """
    # `{% generation %}` marks an answer for other trainers: a block of its own, as `with` is.
    source = re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", source)
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise ValueError(f"the chat template is not Jinja: line {line}: {error}") from error

    def render(messages: Messages, add_generation_prompt: bool = False) -> str:
        messages = [dict(message) for message in messages]
        names = {"messages": messages, "tools": None, "documents": None, **tokens}
        try:
            return template.render(names, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # untrusted code may raise anything
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template cannot render these messages: {reason}") from error

    return render


def renders_as_zephyr(source: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether a template gives what ours gives, but for `bos_token`; each with its own tokens."""
    if source == CHAT_TEMPLATE:
        return True
    zephyr = compile_template(CHAT_TEMPLATE, ours)
    try:
        other = compile_template(source, theirs)
        return all(
            zephyr(*sample).removeprefix(ours["bos_token"])
            == other(*sample).removeprefix(theirs["bos_token"])
            for sample in _SAMPLES
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


class TemplateFormat:
    """Chats in the template of a tokenizer's own model, encoded at once.

    An answer is what follows the text of its generation prompt, up to its eos.
    """

    def __init__(self, tok: JsonTokenizer) -> None:
        self._tok = tok

    @functools.cached_property
    def render(self) -> Callable[..., str]:
        """Messages -> the text of the chat, BOS included where the template writes one."""
        tok = self._tok
        if not tok.chat_template:
            raise ValueError(
                f"{tok.source} comes without a chat template; put that of the model's chat "
                "version, or zephyr_jax.data.text.chat.CHAT_TEMPLATE, next to it as "
                "chat_template.jinja"
            )
        return compile_template(tok.chat_template, tok.tokens)

    def chat(
        self, messages: Messages, prompted: bool, parse_special: bool, loss_on_all: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of a chat and the mask of its targets, as `render_chat` of `data.text.chat`.

        With `loss_on_all` what stands between two answers is a target if all its messages are.
        """
        text, messages, masked = self.masked(messages, prompted, parse_special)
        ids, starts = self._tok.encode_rendered(text, masked)
        trained = [message.get("train", True) for message in messages]
        if loss_on_all and all(trained):
            return ids, [1] * len(ids)
        wanted = [loss_on_all or mark for mark in trained]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and wanted[i]]
        try:
            spans = [self._span(messages, masked, i) for i in answers]
        except ValueError:
            if not prompted:
                raise
            answers = spans = []  # a prompt is not trained on
        target, at, first = [0] * (len(text) + 1), 0, 0
        for i, (start, end) in zip(answers, spans, strict=True):
            target[at:start] = [int(loss_on_all and all(trained[first:i]))] * (start - at)
            target[start:end] = [int(trained[i])] * (end - start)
            at, first = end, i + 1
        target[at:] = [int(loss_on_all and trained[-1])] * (len(target) - at)
        return ids, [target[start] for start in starts]

    def answer(
        self, messages: Messages, prompt: list[int], content: str, parse_special: bool
    ) -> list[int]:
        """The ids of an answer to messages whose ids with a generation prompt are `prompt`."""
        whole = [*messages, {"role": "assistant", "content": content}]
        text, whole, masked = self.masked(whole, False, parse_special)
        start, end = self._span(whole, masked, len(messages))
        ids, _ = self._tok.encode_rendered(text[:end], masked[:end])
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        # A token would span the end of the prompt.
        return self._tok.encode_rendered(text[start:end], masked[start:end], True)[0]

    def masked(
        self, messages: Messages, prompted: bool, parse_special: bool
    ) -> tuple[str, Messages, str]:
        """The text of a chat; messages and text with MASK in place of specials that users wrote."""
        text, pattern = self.render(messages, prompted), self._tok.special_pattern
        self._check_tools(messages, text, prompted)
        calls = json.dumps([m.get("tool_calls") for m in messages], ensure_ascii=False)
        if not parse_special and pattern.search(calls):
            raise ValueError(
                "a call of a tool spells a special token; set parse_special, or drop it"
            )
        spelled = [i for i, m in enumerate(messages) if pattern.search(m["content"])]
        if parse_special or not spelled:
            return text, messages, text
        messages = [
            {**m, "content": pattern.sub(lambda match: MASK * len(match[0]), m["content"])}
            for m in messages
        ]
        masked = self.render(messages, prompted)
        if len(masked) != len(text) or any(
            a not in (b, MASK) for a, b in zip(masked, text, strict=True)
        ):
            raise ValueError(
                f"message {spelled[0]} spells a special token and the chat template alters its "
                "text, so that the two cannot be told apart; replace the token, or set "
                "parse_special"
            )
        return text, messages, masked

    def _check_tools(self, messages: Messages, text: str, prompted: bool) -> None:
        """Raises a ValueError if the template leaves out what a tool is asked or answers."""
        for i, message in enumerate(messages):
            other = {**message, "content": message["content"] + "?"}
            if calls := message.get("tool_calls"):
                call = {**calls[0], "function": {**calls[0]["function"], "name": "?"}}
                other = {**message, "tool_calls": [call, *calls[1:]]}
            elif message["role"] != "tool":
                continue
            if self.render([*messages[:i], other, *messages[i + 1 :]], prompted) == text:
                raise ValueError(
                    f"the chat template leaves out what message {i} ({message['role']}) has of a "
                    "tool; use one that shows it, or prepare without turns of tools"
                )

    def _span(self, messages: Messages, text: str, i: int) -> tuple[int, int]:
        """Where answer `i` begins in the text, behind its generation prompt, and its eos ends."""
        prompt, eos = self.render(messages[:i], True), self._tok.tokens["eos_token"]
        turn = self.render(messages[: i + 1])
        end = turn.rfind(eos, len(prompt))
        if turn.startswith(prompt) and end < 0:
            raise ValueError(
                f"the chat template does not end message {i} with the eos_token {eos!r}; name the "
                "token that ends a turn as eos_token in tokenizer_config.json"
            )
        end += len(eos)
        if not turn.startswith(prompt) or not text.startswith(turn[:end]):
            raise ValueError(
                f"the chat template renders what precedes the end of message {i} otherwise where "
                "more follows, so that its answer is not defined; use a template that only appends"
            )
        return len(prompt), end
