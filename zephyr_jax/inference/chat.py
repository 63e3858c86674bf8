"""A chat in the terminal: turns, and commands that begin with a slash."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zephyr_jax.inference.prompt_files import read_lines

HELP = '''/help              this list
/regenerate        the last reply again, with another seed
/undo              takes back the last turn and its reply
/reset  (/clear)   begins anew; the system message stays
/system [TEXT]     shows the system message or sets it; /system - takes it away
/save FILE         writes the conversation as a line of .jsonl, with "messages"
/load FILE[:LINE]  goes on from such a line
/set [NAME VALUE]  shows how replies are drawn, or sets it: /set temperature 0.2, /set stop "\\n"
/quit              ends, as Ctrl-D does, and Ctrl-C where you type; in a reply Ctrl-C stops it
A line that ends with \\ goes on in the next one; """ begins and ends a turn of several lines.
A turn that begins with a slash is written with two.
'''
_KINDS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float}
_KINDS |= {"min_p": float, "seed": int, "stop": str}

Reply = Callable[..., list[str]]


@dataclasses.dataclass
class Chat:
    """A conversation and what talks in it.

    Attributes:
        reply: `zephyr_jax.generate` without its model: prompts and settings -> texts.
        check: raises a ValueError where settings are out of range.
        length: messages -> the number of tokens of their prompt.
        limit: the model's positions.
        settings: those of `generate`.
        system: the system message; "": none.
        turns: user and assistant by turns, without the system message.
    """

    reply: Reply
    check: Callable[[dict[str, Any]], None]
    length: Callable[[list[dict[str, str]]], int]
    limit: int
    settings: dict[str, Any]
    system: str = ""
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    saved: dict[Path, str] = dataclasses.field(default_factory=dict)

    def messages(self, turns: list[dict[str, str]] | None = None) -> list[dict[str, str]]:
        """The system message, if there is one, and the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + (self.turns if turns is None else turns)


def talk(chat: Chat) -> None:
    """Talks on stdin and stdout until the input ends, /quit, or Ctrl-C where one types."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() then has a history and editing

        _show("/help lists the commands\n")
    for said in _turns():
        try:
            if said.startswith("/") and not said.startswith("//"):
                name, _, rest = said.partition(" ")
                if name == "/quit":
                    return
                _command(chat, name, rest.strip())
            else:
                _say(chat, said.removeprefix("/") if said.startswith("//") else said)
        except (ValueError, OSError) as error:
            _show(f"({' '.join(str(error).split())})\n")
        except KeyboardInterrupt:
            _show("\n(stopped)\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _turns() -> Iterator[str]:
    """What is typed, turn by turn, without the empty ones."""
    try:
        while True:
            said = _typed()
            if said.strip():
                yield said
    except (EOFError, KeyboardInterrupt):
        _show("\n")


def _typed() -> str:
    """One turn: a line, lines that end with a backslash and the next, or those between quotes."""
    line = input("you: ").strip()
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... "))
        lines[-1] = lines[-1].rstrip()[:-3]
        text = "\n".join(lines).strip("\n")
        return f"/{text}" if text.startswith("/") else text  # a block is never a command
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... ").rstrip())
    return "\n".join(lines)


def _say(chat: Chat, said: str) -> None:
    """The user's turn and the reply to it; neither stays if the model has no room for the turn."""
    _answer(chat, [*chat.turns, {"role": "user", "content": said}])


def _answer(chat: Chat, turns: list[dict[str, str]]) -> None:
    """Has the last of `turns` answered and makes them, with the reply, the chat's."""
    n = chat.length(chat.messages(turns))
    if n > chat.limit:
        _show(
            f"(the conversation would have {n} tokens, the model has {chat.limit} positions: this "
            "turn was not sent, and nothing was dropped; /undo makes room, /reset begins anew)\n"
        )
        return
    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        _show(piece)

    _show("model: ")
    try:
        chat.reply([chat.messages(turns)], on_text=hear, **chat.settings)
    except KeyboardInterrupt:
        _show("\n(stopped)")
        if not heard:
            _show(" before a word was said; the conversation is as it was\n")
            return
    _show("\n")
    chat.turns = [*turns, {"role": "assistant", "content": "".join(heard)}]
    left = chat.limit - chat.length(chat.messages())
    if left < chat.limit // 8:
        _show(f"({max(left, 0)} of {chat.limit} positions are left; /undo or /reset makes room)\n")


def _command(chat: Chat, name: str, rest: str) -> None:
    commands = {
        "/help": lambda: _show(HELP),
        "/regenerate": lambda: _regenerate(chat),
        "/undo": lambda: _undo(chat),
        "/reset": lambda: _reset(chat),
        "/clear": lambda: _reset(chat),
        "/system": lambda: _system(chat, rest),
        "/save": lambda: _save(chat, rest),
        "/load": lambda: _load(chat, rest),
        "/set": lambda: _set(chat, rest),
    }
    if name not in commands:
        raise ValueError(f"there is no {name}; /help lists what there is, //text sends /text")
    commands[name]()


def _regenerate(chat: Chat) -> None:
    if not chat.turns:
        raise ValueError("there is no reply yet")
    answered = chat.turns[-1]["role"] == "assistant"
    if answered and not chat.settings["temperature"]:
        raise ValueError("at temperature 0 the reply would be the same; /set temperature 0.7")
    turns = chat.turns[:-1] if answered else chat.turns
    if not turns:
        raise ValueError("nothing was asked before this reply")
    if answered:
        chat.settings["seed"] = (chat.settings["seed"] + 1) % 2**32
    _answer(chat, turns)


def _undo(chat: Chat) -> None:
    if not chat.turns:
        raise ValueError("there is nothing to take back")
    turns = chat.turns[:-1]
    if chat.turns[-1]["role"] == "assistant" and turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    chat.turns = turns
    _show(f"({_count(chat)})\n")


def _reset(chat: Chat) -> None:
    chat.turns = []
    _show("(a new conversation)\n")


def _count(chat: Chat) -> str:
    n = len(chat.turns)
    if not n:
        return "the conversation is empty"
    return f"{n} turn{'s' * (n > 1)}, {chat.length(chat.messages())} of {chat.limit} positions"


def _system(chat: Chat, text: str) -> None:
    if text:
        chat.system = "" if text == "-" else text
    _show(f"(system message: {chat.system})\n" if chat.system else "(no system message)\n")


def _save(chat: Chat, name: str) -> None:
    """Writes what is said; over a file only if it holds what this chat wrote there."""
    if not name:
        raise ValueError("say where to: /save FILE.jsonl")
    if not chat.turns:
        raise ValueError("there is nothing to save yet")
    path = Path(name).expanduser().absolute()
    line = json.dumps({"messages": chat.messages()}, ensure_ascii=False) + "\n"
    if path.is_dir() or (path.exists() and path.read_bytes() != chat.saved.get(path, "").encode()):
        raise ValueError(f"{path} exists; name another file, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(line, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    chat.saved[path] = line
    _show(f"(saved in {path})\n")


def _load(chat: Chat, name: str) -> None:
    if not name:
        raise ValueError("say what: /load FILE.jsonl, or FILE.jsonl:3 for its third line")
    path, number = Path(name).expanduser(), ""
    if not path.exists() and name.rpartition(":")[2].isdecimal():
        file, _, number = name.rpartition(":")
        path = Path(file).expanduser()
    lines = read_lines(path, [])
    if number:
        lines = [line for line in lines if line.place == f"{path}:{int(number)}"]
        if not lines:
            raise ValueError(f"{path} has no conversation in line {number}")
    elif len(lines) > 1:
        raise ValueError(f"{path} has {len(lines)} conversations; say which: /load {path}:1")
    messages = [{key: m[key] for key in ("role", "content")} for m in lines[0].messages]
    chat.length(messages)  # which refuses what the model's own template does
    has_system = messages[0]["role"] == "system"
    chat.system = messages[0]["content"] if has_system else ""
    chat.turns = messages[has_system:]
    _show(f"({_count(chat)})\n")
    if chat.turns and chat.turns[-1]["role"] == "user":
        _show("(the last turn has no reply; /regenerate has it answered)\n")


def _set(chat: Chat, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not name:
        _show("".join(f"{name} = {value}\n" for name, value in chat.settings.items()))
        return
    if name not in _KINDS:
        raise ValueError(f"there is no setting {name}; there are {', '.join(_KINDS)}")
    if name == "stop":
        given: Any = _stops(value.strip())
    else:
        try:
            given = _KINDS[name](value)
        except ValueError as error:
            raise ValueError(f"/set {name} takes a number, not {value!r}") from error
    settings = chat.settings | {name: given}
    chat.check(settings)
    chat.settings = settings
    _show(f"({name} = {given})\n")


def _stops(text: str) -> list[str]:
    """The stop string that was meant, none of an empty text; between quotes as JSON has it."""
    if not text.startswith('"'):
        return [text] if text else []
    try:
        return [str(json.loads(text))]
    except ValueError as error:
        raise ValueError(f'{text} is no JSON string; write "\\n\\n" for two line ends') from error
