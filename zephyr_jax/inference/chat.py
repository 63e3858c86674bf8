"""A chat in the terminal (turns, and commands that begin with a slash), and files of conversations.

A line of such a file is JSON with a prompt or messages.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
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

HELP = '''/help              this list
/regenerate        repeat the last reply with another seed
/continue          go on with the last reply where it ends
/undo              remove the last turn and its reply
/reset  (/clear)   start a new conversation; the system message stays
/system [TEXT]     show or set the system message; /system - removes it
/save FILE         write the conversation as a line of .jsonl, with "messages"
/load FILE         continue the conversation of such a file
/set [NAME VALUE]  show or set the sampling: /set temperature 0.2, /set stop "\\n"
/quit              end, as Ctrl-D and, while you type, Ctrl-C do; Ctrl-C stops a reply
""" begins and ends a turn of several lines.
A turn that begins with a slash is written with two.
'''
_SETTINGS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float}
_SETTINGS |= {"min_p": float, "seed": int, "stop": str}


_show = functools.partial(print, end="", flush=True)


def _turns() -> Iterator[str]:
    """What is typed, turn by turn, without the empty ones."""
    try:
        while True:
            if (turn := _typed()).strip():
                yield turn
    except (EOFError, KeyboardInterrupt):
        _show("\n")


def _typed() -> str:
    """One turn: a line, or the lines between triple quotes."""
    text = input("you: ").strip()
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + input("... ")
    text = text.rstrip()[:-3].strip("\n")
    return f"/{text}" if text.startswith("/") else text  # a block is never a command


class Chat:
    """A conversation with a model: `turns` of user and assistant; `system` "" is no message."""

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
        self._saved: set[Path] = set()

    def talk(self) -> None:
        """Talks on stdin and stdout until the input ends, /quit, or Ctrl-C while typing."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  input() then has a history and editing

            _show("/help lists the commands\n")
        for turn in _turns():
            name, _, argument = turn.partition(" ")
            if name == "/quit":
                return
            try:
                if turn.startswith("/") and not turn.startswith("//"):
                    self._command(name, argument.strip())
                else:
                    content = turn[1:] if turn.startswith("//") else turn
                    self._answer([*self.turns, {"role": "user", "content": content}])
            except (ValueError, OSError) as error:
                _show(f"({' '.join(str(error).split())})\n")
            except KeyboardInterrupt:
                _show("\n(stopped)\n")

    def _command(self, name: str, argument: str) -> None:
        if name == "/help":
            _show(HELP)
        elif name == "/regenerate":
            self._regenerate()
        elif name == "/continue":
            if not self.turns or self.turns[-1]["role"] != "assistant":
                raise ValueError("there is no reply to continue")
            self._answer(self.turns)
        elif name == "/undo":
            self._undo()
        elif name in ("/reset", "/clear"):
            self.turns = []
            _show("(a new conversation)\n")
        elif name == "/system":
            if argument:
                self.system = "" if argument == "-" else argument
            _show(f"(system message: {self.system})\n" if self.system else "(no system message)\n")
        elif name == "/save":
            self._save(argument)
        elif name == "/load":
            self._load(argument)
        elif name == "/set":
            self._set(argument)
        else:
            raise ValueError(f"there is no {name}; /help lists the commands, //text sends /text")

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + turns

    def _length(self, turns: list[dict[str, str]]) -> int:
        """Tokens of a prompt with these turns."""
        return len(generation.prompt_ids(self._tok, self._messages(turns))) if turns else 0

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
            if not parts:
                _show("\n(stopped) before the first word; the conversation is unchanged\n")
                return
            _show("\n(stopped)")
        _show("\n")
        if turns[-1]["role"] == "assistant":
            *turns, unfinished = turns
            parts.insert(0, unfinished["content"])
        self.turns = [*turns, {"role": "assistant", "content": "".join(parts)}]
        left = self._positions - self._length(self.turns)
        if left < self._positions // 8:
            _show(f"({max(left, 0)} of {self._positions} positions are left; /undo or /reset)\n")

    def _regenerate(self) -> None:
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

    def _undo(self) -> None:
        if not self.turns:
            raise ValueError("there is nothing to undo")
        removed = self.turns.pop()
        if removed["role"] == "assistant" and self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()
        self._show_size()

    def _show_size(self) -> None:
        n = self._length(self.turns)
        _show(f"({len(self.turns)} turns, {n} of {self._positions} positions)\n")

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            raise ValueError("there is nothing to save yet" if name else "/save needs a FILE.jsonl")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise ValueError(f"{path} exists; name another file, or remove it first")
        line = json.dumps({"messages": self._messages(self.turns)}, ensure_ascii=False)
        write_atomic(path, f"{line}\n")
        self._saved.add(path)
        _show(f"(saved in {path})\n")

    def _load(self, name: str) -> None:
        if not name:
            raise ValueError("/load needs a FILE.jsonl")
        lines = read_lines(Path(name).expanduser(), [])
        if len(lines) > 1:
            raise ValueError(f"{name} has {len(lines)} conversations; /load takes a file with one")
        turns = [{key: m[key] for key in ("role", "content")} for m in lines[0].messages]
        generation.prompt_ids(self._tok, turns)  # refuses what the model's own template refuses
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        self.turns = turns
        self._show_size()
        if turns and turns[-1]["role"] == "user":
            _show("(the last turn has no reply; /regenerate has it answered)\n")
        elif turns:
            _show("(the last turn is the model's; /continue goes on with it)\n")

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        if not name:
            _show("".join(f"{name} = {getattr(self.sampling, name)}\n" for name in _SETTINGS))
            return
        if name not in _SETTINGS:
            raise ValueError(f"there is no setting {name}; there are {', '.join(_SETTINGS)}")
        text = text.strip()
        try:
            value: Any = _SETTINGS[name](text)
            if name == "stop":  # may be quoted as in JSON, and none is empty
                value = (json.loads(text) if text.startswith('"') else text,) if text else ()
        except ValueError as error:
            kind = 'a JSON string such as "\\n\\n"' if name == "stop" else "a number"
            raise ValueError(f"/set {name} takes {kind}, not {text!r}") from error
        self.sampling = dataclasses.replace(self.sampling, **{name: value})
        _show(f"({name} = {value})\n")


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
