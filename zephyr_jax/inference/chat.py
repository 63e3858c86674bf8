"""A chat in the terminal, and files of conversations, whose lines are JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.text.chat import render_text
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.inference import generate as generation
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import write_atomic
from zephyr_jax.types import Params

_Model = tuple[MistralConfig, Params, Tokenizer]
_Messages = list[dict[str, str]]
_show = functools.partial(print, end="", flush=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_SETTINGS: dict[str, Any] = {"max_new_tokens": int, "temperature": float, "top_k": int}
_SETTINGS |= {"top_p": float, "min_p": float, "seed": int}
_SETTINGS["stop"] = lambda x: tuple(filter(None, [json.loads(x) if x[:1] == '"' else x]))


def _typed() -> str:
    """One turn: a line, or the lines between triple quotes, which are never a command."""
    text = input("you: ").strip()
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + input("... ")
    text = text.rstrip()[:-3].strip("\n")
    return f"/{text}" if text.startswith("/") else text


class Chat:
    """A conversation with a model; commands are methods `do_...`, whose docstrings /help shows."""

    def __init__(self, model: _Model, sampling: SamplingParams, messages: _Messages):
        self.messages, self.sampling, self._model = messages, sampling, model

    def talk(self) -> None:
        """Talks on stdin and stdout until the input ends, /quit, or Ctrl-C while typing."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  input() then has a history and editing

            _show("/help lists the commands\n")
        try:
            while (turn := _typed()) != "/quit":
                self._take(turn)
        except (EOFError, KeyboardInterrupt):
            _show("\n")

    def _take(self, turn: str) -> None:
        try:
            if turn.startswith("/") and not turn.startswith("//"):
                name, _, argument = turn.partition(" ")
                command = getattr(self, f"do_{name[1:]}", None)
                if command is None:
                    raise ValueError(f"there is no {name}; /help lists more, //text sends /text")
                command(argument.strip())
            elif turn:
                self._answer([*self.messages, _message("user", turn.removeprefix("/"))])
        except (ValueError, OSError) as error:
            _show(f"({' '.join(str(error).split())})\n")
        except KeyboardInterrupt:
            _show("\n(stopped)\n")

    @property
    def _last(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""

    def _answer(self, messages: _Messages) -> None:
        """Has the last message answered or continued; if text comes, they become the chat's."""
        parts: list[str] = []
        stream = generation.stream(*self._model, messages, self.sampling)
        _show("model: ")
        try:
            for part in stream:
                parts.append(part)
                _show(part)
        except KeyboardInterrupt:
            _show("\n(stopped)")
        _show("\n" if parts else "\n(no text came; the conversation is unchanged)\n")
        if not parts:
            return
        if messages[-1]["role"] == "assistant":
            parts.insert(0, messages[-1]["content"])
            messages = messages[:-1]
        self.messages = [*messages, _message("assistant", "".join(parts))]
        self._show_size(least=7 / 8)

    def _show_size(self, least: float = 0.0) -> None:
        cfg, _, tok = self._model
        n, positions = 0, cfg.max_position_embeddings
        if self._last in ("user", "assistant"):
            n = len(generation.prompt_ids(tok, self.messages))
        if n >= least * positions:
            _show(f"({n} of {positions} positions are taken; /undo or /reset frees some)\n")

    def do_help(self, _: str) -> None:
        """Lists the commands."""
        for name, command in vars(Chat).items():
            if name.startswith("do_"):
                _show(f"/{name[3:]:11} {command.__doc__}\n")
        _show("/quit        Ends the chat, as Ctrl-D does, and Ctrl-C outside a reply.\n")
        _show('""" begins and ends a turn of several lines; // begins one with a slash.\n')

    def do_regenerate(self, _: str) -> None:
        """Repeats the last reply with another seed."""
        messages = self.messages
        if self._last == "assistant":
            if not self.sampling.temperature:
                raise ValueError("at temperature 0 the reply would be the same; /set temperature")
            messages = messages[:-1]
            seed = (self.sampling.seed + 1) % 2**32
            self.sampling = dataclasses.replace(self.sampling, seed=seed)
        elif self._last != "user":
            raise ValueError("there is no reply yet")
        self._answer(messages)

    def do_continue(self, _: str) -> None:
        """Goes on with the last reply where it ends."""
        if self._last != "assistant":
            raise ValueError("there is no reply to continue")
        self._answer(self.messages)

    def do_undo(self, _: str) -> None:
        """Removes the last turn and its reply."""
        while self._last == "assistant":
            self.messages.pop()
        if self._last == "user":
            self.messages.pop()
        self._show_size()

    def do_reset(self, _: str) -> None:
        """Starts a new conversation; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._show_size()

    def do_system(self, text: str) -> None:
        """Shows the system message, or sets it to a TEXT; - removes it."""
        if text:
            turns = [m for m in self.messages if m["role"] != "system"]
            self.messages = turns if text == "-" else [_message("system", text), *turns]
        system = "".join(m["content"] for m in self.messages if m["role"] == "system")
        _show(f"(system message: {system})\n" if system else "(no system message)\n")

    def do_save(self, name: str) -> None:
        """Writes the conversation into a FILE as a line of .jsonl, with "messages"."""
        if not name or not self._last:
            raise ValueError("/save needs a FILE.jsonl, and a conversation to write")
        path = Path(name).expanduser().absolute()
        if path.exists():
            raise ValueError(f"{path} exists; name another file, or remove it first")
        write_atomic(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        _show(f"(saved in {path})\n")

    def do_load(self, name: str) -> None:
        """Continues the conversation of such a FILE."""
        lines = read_lines(Path(name).expanduser(), [])
        if len(lines) > 1:
            raise ValueError(f"{name} has {len(lines)} conversations; /load takes a file with one")
        messages = lines[0].messages
        generation.prompt_ids(self._model[2], messages)  # refuses what the template refuses
        self.messages = messages
        self._show_size()

    def do_set(self, argument: str) -> None:
        """Shows the sampling, or changes it: /set temperature 0.2, /set stop ###."""
        name, _, text = argument.partition(" ")
        if name and name not in _SETTINGS:
            raise ValueError(f"there is no setting {name}; there are {', '.join(_SETTINGS)}")
        if name:
            value = _SETTINGS[name](text.strip())
            self.sampling = dataclasses.replace(self.sampling, **{name: value})
        _show("".join(f"{x} = {getattr(self.sampling, x)}\n" for x in _SETTINGS))


class Line(NamedTuple):
    """A line of a file of conversations: FILE:NUMBER, its JSON object, and its conversation."""

    place: str
    row: dict[str, Any]
    messages: list[dict[str, str]]


def read_lines(path: Path, system: list[dict[str, str]]) -> list[Line]:
    """Lines that are not blank, each with its chat after `system`; a ValueError names another."""
    lines = []
    for number, row in numbered_rows(path):
        place = f"{path}:{number}"
        if isinstance(row, str) or not (row.get("messages") or "prompt" in row):
            why = row if isinstance(row, str) else ", ".join(list(row)[:8]) or "nothing"
            raise ValueError(f"{place} is not a line with prompt or messages (it has {why})")
        messages = row.get("messages") or [_message("user", row["prompt"])]
        try:
            json.dumps(row, ensure_ascii=False).encode()  # as it will be written
            messages = system + messages if isinstance(messages, list) else messages
            render_text(messages)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        lines.append(Line(place, row, messages))
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    return lines
