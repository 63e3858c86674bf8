"""A chat in the terminal (turns, and commands that begin with a slash), and files of conversations.

A line of such a file is JSON with a prompt or messages.
"""

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

_show = functools.partial(print, end="", flush=True)


def _stop_strings(text: str) -> tuple[str, ...]:
    """The value of /set stop: nothing, a text, or one that is quoted as in JSON."""
    stop = json.loads(text) if text.startswith('"') else text
    return (stop,) if stop else ()


_SETTINGS: dict[str, Any] = {"max_new_tokens": int, "temperature": float, "top_k": int}
_SETTINGS |= {"top_p": float, "min_p": float, "seed": int, "stop": _stop_strings}


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
    """A conversation with a model: `turns` of user and assistant; `system` "" is no message.

    A command is a method that begins with `do_`, and its docstring what /help says of it.
    """

    def __init__(
        self,
        cfg: MistralConfig,
        params: Params,
        tok: Tokenizer,
        sampling: SamplingParams,
        system: str = "",
    ):
        self.sampling, self.system = sampling, system
        self.turns: list[dict[str, str]] = []
        self._model, self._tok = (cfg, params, tok), tok
        self._positions = cfg.max_position_embeddings
        self._saved: set[Path] = set()  # files that /save may replace

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
        """Runs a command or has a turn answered; an error is shown."""
        try:
            if turn.startswith("/") and not turn.startswith("//"):
                name, _, argument = turn.partition(" ")
                command = getattr(self, f"do_{name[1:]}", None)
                if command is None:
                    raise ValueError(f"there is no {name}; /help lists more, //text sends /text")
                command(argument.strip())
            elif turn:
                content = turn.removeprefix("/")
                self._answer([*self.turns, {"role": "user", "content": content}])
        except (ValueError, OSError) as error:
            _show(f"({' '.join(str(error).split())})\n")
        except KeyboardInterrupt:
            _show("\n(stopped)\n")

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + turns

    def _length(self, turns: list[dict[str, str]]) -> int:
        """Tokens of a prompt with these turns."""
        return len(generation.prompt_ids(self._tok, self._messages(turns))) if turns else 0

    def _show_size(self, least: int = 0) -> None:
        """Shows how many positions are taken, if at least so many are."""
        n = self._length(self.turns)
        if n >= least:
            rest = "; /undo or /reset makes room" if least else ""
            _show(f"({len(self.turns)} turns, {n} of {self._positions} positions{rest})\n")

    def _answer(self, turns: list[dict[str, str]]) -> None:
        """Has the last of `turns` answered; they become the chat's unless they are too long.

        A last one of the assistant's is continued.
        """
        n = self._length(turns)
        if n > self._positions:
            raise ValueError(
                f"the conversation would have {n} tokens, the model has {self._positions} "
                "positions: this turn was not sent, and nothing was dropped; /undo makes room, "
                "/reset starts a new conversation"
            )
        parts: list[str] = []
        _show("model: ")
        try:
            for part in generation.stream(*self._model, self._messages(turns), self.sampling):
                parts.append(part)
                _show(part)
        except KeyboardInterrupt:
            _show("\n(stopped)")
        _show("\n" if parts else "\n(no text came; the conversation is unchanged)\n")
        if not parts:
            return
        if turns[-1]["role"] == "assistant":
            *turns, unfinished = turns
            parts.insert(0, unfinished["content"])
        self.turns = [*turns, {"role": "assistant", "content": "".join(parts)}]
        self._show_size(least=self._positions * 7 // 8)

    def do_help(self, _: str) -> None:
        """Lists the commands."""
        for name, command in vars(Chat).items():
            if name.startswith("do_"):
                _show(f"/{name[3:]:11} {command.__doc__}\n")
        _show("/quit        Ends the chat, as Ctrl-D does, and Ctrl-C outside a reply.\n")
        _show('""" begins and ends a turn of several lines; // begins one with a slash.\n')

    def do_regenerate(self, _: str) -> None:
        """Repeats the last reply with another seed."""
        if not self.turns:
            raise ValueError("there is no reply yet")
        turns = self.turns
        if turns[-1]["role"] == "assistant":
            if not self.sampling.temperature:
                raise ValueError("at temperature 0 the reply would be the same; /set temperature")
            turns = turns[:-1]
            seed = (self.sampling.seed + 1) % 2**32
            self.sampling = dataclasses.replace(self.sampling, seed=seed)
        self._answer(turns)

    def do_continue(self, _: str) -> None:
        """Goes on with the last reply where it ends."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            raise ValueError("there is no reply to continue")
        self._answer(self.turns)

    def do_undo(self, _: str) -> None:
        """Removes the last turn and its reply."""
        while self.turns and self.turns.pop()["role"] != "user":
            pass
        self._show_size()

    def do_reset(self, _: str) -> None:
        """Starts a new conversation; the system message stays."""
        self.turns = []
        self._show_size()

    do_clear = do_reset

    def do_system(self, text: str) -> None:
        """Shows the system message, or sets it to a TEXT; - removes it."""
        if text:
            self.system = "" if text == "-" else text
        _show(f"(system message: {self.system})\n" if self.system else "(no system message)\n")

    def do_save(self, name: str) -> None:
        """Writes the conversation into a FILE as a line of .jsonl, with "messages"."""
        if not name or not self.turns:
            raise ValueError("/save needs a FILE.jsonl, and a conversation to write")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise ValueError(f"{path} exists; name another file, or remove it first")
        line = json.dumps({"messages": self._messages(self.turns)}, ensure_ascii=False)
        write_atomic(path, f"{line}\n")
        self._saved.add(path)
        _show(f"(saved in {path})\n")

    def do_load(self, name: str) -> None:
        """Continues the conversation of such a FILE."""
        lines = read_lines(Path(name).expanduser(), [])
        if len(lines) > 1:
            raise ValueError(f"{name} has {len(lines)} conversations; /load takes a file with one")
        turns = [{key: m[key] for key in ("role", "content")} for m in lines[0].messages]
        generation.prompt_ids(self._tok, turns)  # refuses what the model's own template refuses
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        self.turns = turns
        self._show_size()

    def do_set(self, argument: str) -> None:
        """Shows the sampling, or changes it: /set temperature 0.2, /set stop ###."""
        name, _, text = argument.partition(" ")
        if name and name not in _SETTINGS:
            raise ValueError(f"there is no setting {name}; there are {', '.join(_SETTINGS)}")
        if name:
            try:
                value = _SETTINGS[name](text.strip())
            except ValueError as error:
                raise ValueError(f"/set {name} does not take {text!r}: {error}") from error
            self.sampling = dataclasses.replace(self.sampling, **{name: value})
        _show("".join(f"{x} = {getattr(self.sampling, x)}\n" for x in _SETTINGS))


class Line(NamedTuple):
    """A line of a file of conversations: FILE:NUMBER, its JSON object, and its conversation."""

    place: str
    row: dict[str, Any]
    messages: list[dict[str, str]]


def read_lines(path: Path, system: list[dict[str, str]]) -> list[Line]:
    """The lines that are not blank, each with a chat that can be rendered, after `system`.

    A ValueError names a line that is not a conversation.
    """
    lines = []
    for number, row in numbered_rows(path):
        place = f"{path}:{number}"
        if isinstance(row, str) or not (row.get("messages") or "prompt" in row):
            why = row if isinstance(row, str) else ", ".join(list(row)[:8]) or "nothing"
            raise ValueError(f"{place} is not a line with prompt or messages (it has {why})")
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
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
