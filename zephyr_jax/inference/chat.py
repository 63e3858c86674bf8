"""A chat in the terminal: turns, and commands that begin with a slash."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.inference import generate as generation
from zephyr_jax.inference.prompt_files import read_lines
from zephyr_jax.inference.sampling import SamplingParams
from zephyr_jax.storage import write_atomic
from zephyr_jax.types import Params

HELP = '''/help              this list
/regenerate        repeat the last reply with another seed
/undo              remove the last turn and its reply
/reset  (/clear)   start a new conversation; the system message stays
/system [TEXT]     show or set the system message; /system - removes it
/save FILE         write the conversation as a line of .jsonl, with "messages"
/load FILE[:LINE]  continue a conversation from such a line
/set [NAME VALUE]  show or set the sampling: /set temperature 0.2, /set stop "\\n"
/quit              end, as Ctrl-D and, while you type, Ctrl-C do; Ctrl-C stops a reply
A line that ends with \\ goes on in the next one; """ begins and ends a turn of several lines.
A turn that begins with a slash is written with two.
'''
_SETTINGS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float}
_SETTINGS |= {"min_p": float, "seed": int, "stop": str}


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _turns() -> Iterator[str]:
    """What is typed, turn by turn, without the empty ones."""
    try:
        while True:
            if (turn := _typed()).strip():
                yield turn
    except (EOFError, KeyboardInterrupt):
        _show("\n")


def _typed() -> str:
    """One turn: a line, lines that end with a backslash and the next, or those between quotes."""
    lines = [input("you: ").strip()]
    if lines[0].startswith('"""'):
        lines = [lines[0][3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... "))
        lines[-1] = lines[-1].rstrip()[:-3]
        text = "\n".join(lines).strip("\n")
        return f"/{text}" if text.startswith("/") else text  # a block is never a command
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... ").rstrip())
    return "\n".join(lines)


class Chat:
    """A conversation with a model; `turns` are those of user and assistant."""

    def __init__(
        self,
        cfg: MistralConfig,
        params: Params,
        tok: Tokenizer,
        sampling: SamplingParams,
        system: str = "",
    ):
        """A conversation without turns; `system` is the system message, "" for none."""
        self.sampling, self.system = sampling, system
        self.turns: list[dict[str, str]] = []
        self._model, self._tok, self._positions = (
            (cfg, params, tok),
            tok,
            cfg.max_position_embeddings,
        )
        self._saved: dict[Path, bytes] = {}

    def talk(self) -> None:
        """Talks on stdin and stdout until the input ends, /quit, or Ctrl-C while typing."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  input() then has a history and editing

            _show("/help lists the commands\n")
        for turn in _turns():
            try:
                if not turn.startswith("/") or turn.startswith("//"):
                    content = turn.removeprefix("/") if turn.startswith("//") else turn
                    self._answer([*self.turns, {"role": "user", "content": content}])
                    continue
                name, _, argument = turn.partition(" ")
                if name == "/quit":
                    return
                self._command(name, argument.strip())
            except (ValueError, OSError) as error:
                _show(f"({' '.join(str(error).split())})\n")
            except KeyboardInterrupt:
                _show("\n(stopped)\n")

    def _command(self, name: str, argument: str) -> None:
        if name == "/help":
            _show(HELP)
        elif name == "/regenerate":
            self._regenerate()
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
        return len(generation.prompt_ids(self._tok, self._messages(turns)))

    def _answer(self, turns: list[dict[str, str]]) -> None:
        """Has the last of `turns` answered; they become the chat's unless they are too long."""
        n = self._length(turns)
        if n > self._positions:
            _show(
                f"(the conversation would have {n} tokens, the model has {self._positions} "
                "positions: this turn was not sent, and nothing was dropped; /undo makes room, "
                "/reset starts a new conversation)\n"
            )
            return
        parts: list[str] = []

        def add(part: str) -> None:
            parts.append(part)
            _show(part)

        _show("model: ")
        try:
            prompts = [self._messages(turns)]
            generation.generate(*self._model, prompts, self.sampling, on_text=add)
        except KeyboardInterrupt:
            _show("\n(stopped)")
            if not parts:
                _show(" before the first word; the conversation is unchanged\n")
                return
        _show("\n")
        self.turns = [*turns, {"role": "assistant", "content": "".join(parts)}]
        left = self._positions - self._length(self.turns)
        if left < self._positions // 8:
            _show(f"({max(left, 0)} of {self._positions} positions are left; /undo or /reset)\n")

    def _regenerate(self) -> None:
        if not self.turns:
            raise ValueError("there is no reply yet")
        turns = self.turns
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
            if not self.sampling.temperature:
                raise ValueError("at temperature 0 the reply would be the same; /set temperature")
            if not turns:
                raise ValueError("there is no question before this reply")
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
        n = self._length(self.turns) if self.turns else 0
        _show(f"({len(self.turns)} turns, {n} of {self._positions} positions)\n")

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            raise ValueError("there is nothing to save yet" if name else "/save needs a FILE.jsonl")
        path = Path(name).expanduser().absolute()
        if path.exists() and (path.is_dir() or path.read_bytes() != self._saved.get(path)):
            raise ValueError(f"{path} exists; name another file, or remove it first")
        messages = self._messages(self.turns)
        line = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode()
        write_atomic(path, line)
        self._saved[path] = line
        _show(f"(saved in {path})\n")

    def _load(self, name: str) -> None:
        if not name:
            raise ValueError("/load needs a FILE.jsonl, or FILE.jsonl:3 for its third line")
        path, number = Path(name).expanduser(), ""
        if not path.exists() and name.rpartition(":")[2].isdecimal():
            file, _, number = name.rpartition(":")
            path = Path(file).expanduser()
        lines = read_lines(path, [])
        if number:
            lines = [line for line in lines if line.place == f"{path}:{int(number)}"]
        if len(lines) > 1:
            raise ValueError(f"{path} has {len(lines)} conversations; name one: /load {path}:1")
        if not lines:
            raise ValueError(f"{path} has no conversation in line {number}")
        turns = [{key: m[key] for key in ("role", "content")} for m in lines[0].messages]
        generation.prompt_ids(self._tok, turns)  # refuses what the model's own template refuses
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        self.turns = turns
        self._show_size()
        if turns and turns[-1]["role"] == "user":
            _show("(the last turn has no reply; /regenerate has it answered)\n")

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        if not name:
            _show("".join(f"{name} = {getattr(self.sampling, name)}\n" for name in _SETTINGS))
            return
        if name not in _SETTINGS:
            raise ValueError(f"there is no setting {name}; there are {', '.join(_SETTINGS)}")
        value: Any = _stop_strings(text.strip()) if name == "stop" else _number(name, text)
        self.sampling = dataclasses.replace(self.sampling, **{name: value})
        _show(f"({name} = {value})\n")


def _number(name: str, text: str) -> int | float:
    try:
        return _SETTINGS[name](text)
    except ValueError as error:
        raise ValueError(f"/set {name} takes a number, not {text!r}") from error


def _stop_strings(text: str) -> tuple[str, ...]:
    """The stop string, none for an empty text; a quoted one is a JSON string."""
    if not text.startswith('"'):
        return (text,) if text else ()
    try:
        return (str(json.loads(text)),)
    except ValueError as error:
        raise ValueError(f'{text} is not a JSON string; write "\\n\\n" for two newlines') from error
