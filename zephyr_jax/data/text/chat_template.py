"""Chat templates: Zephyr's text, and the engine that renders any template as transformers does.

Templates come with models and are the code of strangers, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

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
# Blanks at both ends, no system turn and an unanswered question: where templates differ.
_SAMPLE = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "\n Which one? "},
    {"role": "assistant", "content": " This.\n"},
    {"role": "user", "content": "Why?"},
]
_SAMPLES = ((_SAMPLE, True), (_SAMPLE[:3], False), (_SAMPLE[1:], True), (_SAMPLE[1:3], False))


def require(module: str) -> Any:
    """A package of the extra `tokenizers`, imported.

    Raises:
        ModuleNotFoundError: if it is not installed, saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a tokenizer.json with its chat template needs the package {module.split('.')[0]}; "
            "install both with: pip install tokenizers jinja2"
        ) from error


class ChatTemplate:
    """A Jinja template of messages.

    Args:
        source: its text.
        tokens: what it may call by name, such as `bos_token` and `eos_token`.

    Raises:
        ModuleNotFoundError: if jinja2 is not installed.
        ValueError: if it is no Jinja template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._errors = require("jinja2").TemplateError
        try:
            self._template = _environment().from_string(source)
        except self._errors as error:
            line = getattr(error, "lineno", "?")
            raise ValueError(f"the chat template is no Jinja: line {line}: {error}") from error
        self._tokens = dict(tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """The text of the messages.

        Raises:
            ValueError: if the template refuses them, with its own words.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # whatever the code of a stranger may raise
            said = " ".join(str(error).split())
            raise ValueError(f"the chat template cannot render these messages: {said}") from error


def renders_as_zephyr(source: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether a template gives what CHAT_TEMPLATE gives, a leading `bos_token` aside.

    Args:
        source: the template.
        theirs: the tokens that it may call by name.
        ours: the tokens of CHAT_TEMPLATE.

    Raises:
        ModuleNotFoundError: if that takes rendering and jinja2 is not installed.
    """
    if source == CHAT_TEMPLATE:
        return True
    zephyr = ChatTemplate(CHAT_TEMPLATE, ours)
    try:
        other = ChatTemplate(source, theirs)
        return all(
            zephyr.render(*sample).removeprefix(ours["bos_token"])
            == other.render(*sample).removeprefix(theirs["bos_token"])
            for sample in _SAMPLES
        )
    except ValueError:
        return False


@functools.cache
def _environment() -> Any:
    """Jinja with the settings, names and tags that templates of the hub rely on."""
    jinja2, ext = require("jinja2"), require("jinja2.ext")

    class Generation(ext.Extension):
        """`{% generation %}`, which marks an answer for others, is a block like any."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = require("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
