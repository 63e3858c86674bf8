"""The schema of a data set's rows, prompt ids, and the turns of dialogues in one form.

A turn is {"role", "content"} or ShareGPT's {"from", "value"}, perhaps with a mark that says whether
it is learned from. It is read as {"role", "content"}, with `"train": False` if it is context only,
and of tools with the `tool_calls`, `name`, `tool_call_id` that templates read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Turn = dict[str, Any]
# The records of a row, none if a rule dropped it, and the rules that changed or dropped.
Records = tuple[list[Row], Counter[str]]

_NAMES = {
    "system": "system developer sys",
    "user": "user human prompter usr end_user customer client questioner",
    "assistant": "assistant gpt gpt4 gpt_4 chatgpt bard bing gemini claude model llm bot chatbot "
    "ai ai_assistant agent function_call tool_call tool_calls",
    "tool": "tool function observation ipython code_interpreter tool_response tool_result "
    "tool_results tool_output function_response function_result function_output",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
# The marks of a turn, and the value with which it is learned from.
MARKS = {
    **dict.fromkeys(("weight", "loss_weight", "loss_scale", "sample_weight"), True),
    **dict.fromkeys(("train", "training", "trainable", "is_trainable"), True),
    **dict.fromkeys(("loss", "loss_mask", "compute_loss"), True),
    **dict.fromkeys(("masked", "is_masked", "ignore_loss", "no_loss"), False),
}
# Whether an answer is a good one: TRL's column, and LLaMA-Factory's.
LABELS = ("label", "kto_tag")
_WEIGHTS = ("weight", "loss_weight", "sample_weight")  # marks of a row too
# Marks that one tool reads otherwise than another, or that are those of parts of a turn.
_OTHER_MARKS = ("mask", "train_detail", "training_detail")
_CALLS = ("function_call", "tool_call", "tool_calls")  # roles, and keys of the assistant's turns
_OF_TOOLS = frozenset((*_CALLS, "tool_call_id", "name"))
_HARMLESS = ("id", "index", "turn_id", "message_id", "timestamp", "created_at", "date")
_KNOWN = {"role", "from", "content", "value", *MARKS, *_OTHER_MARKS, *_HARMLESS}
_KNOWN |= {"lang", "language", "model"}
_UNREAD_COLUMNS = ("mask", "tools", "functions")
_UNREAD_COLUMNS += ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_ORDER = re.compile("s?(?:ua(?:t+a)*)+")  # the first letters of the roles
# Columns of any row that may be missing.
OPTIONAL = dict.fromkeys(("prompt_id", "source", "system", "input"), "text?")
_EMPTY = (None, "", [], {})
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class BadRow(ValueError):
    """A row that does not fit its schema; the message is the reason, as `reason:place`."""


@dataclasses.dataclass(frozen=True)
class Schema:
    """What one configuration reads, and how a row becomes a record: `prepare/sets/*/README.md`."""

    shapes: tuple[tuple[str, ...], ...]  # kinds of rows, each by the keys that it must have
    splits: tuple[str, str]  # the names of the training and the held-out split
    convert: Callable[[Row], Records]  # a BadRow if the values do not fit
    texts: Callable[[Row, str], list[str]]  # of a row or a record, as an example of a rule
    rules: Mapping[str, Any]  # what decides the outcome, as JSON holds it
    forbidden: tuple[str, ...] = ()  # keys of rows that belong to another schema

    def fits(self, row: object) -> bool:
        """Whether a parsed record has the keys of one of the shapes."""
        if not isinstance(row, dict) or any(key in row for key in self.forbidden):
            return False
        return any(all(key in row for key in shape) for shape in self.shapes)

    def read(self, row: Row) -> Records:
        """What `convert` returns; a BadRow also for a key that the row lacks."""
        lacking = ([key for key in shape if key not in row] for shape in self.shapes)
        if fewest := min(lacking, key=len):
            raise BadRow(f"missing_key:{fewest[0]}")
        return self.convert(row)


def prompt_digest(prompt: str) -> str:
    """The prompt's id, as the published sets have it: SHA-256 of its UTF-8 bytes, in hex.

    >>> prompt_digest("Which books are still banned in Canada?")[:8]
    'aeccf551'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()


def named_prompt(turns: Sequence[Turn], text: str | None = None) -> tuple[str, str]:
    """The prompt, `text` or the first question, and its id: of several questions by all turns."""
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    prompt = identified = text or questions[0]
    if len(questions) > 1:
        identified = json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return prompt, prompt_digest(identified)


def keyed_hash(purpose: str, seed: int, key: str) -> int:
    """An integer below 2^64 that depends on the purpose, the seed and the key alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}/{key}".encode()).digest()[:8], "big")


def window(text: str, at: int = 0, width: int = 80) -> str:
    """At most `width` characters of the text around an index, with marks where it was cut."""
    start = max(0, at - width // 2)
    shown = text[start : start + width]
    return ("…" if start else "") + shown + ("…" if start + width < len(text) else "")


def first_columns(row: Mapping[str, Any], groups: Sequence[Iterable[str]]) -> Any:
    """The first group of columns that a row has, at best without the Nones of parquet."""
    filled = [group for group in groups if all(row.get(key) is not None for key in group)]
    present = [group for group in groups if all(key in row for key in group)]
    return [*filled, *present, *groups][0]


def joined(*texts: str | None) -> str:
    """The texts that are not blank, with a blank line between them."""
    return "\n\n".join(text for text in texts if text and text.strip())


def truth(value: object) -> bool | None:
    """True or False for a bool, for 0 and 1 and for both as texts; None for anything else."""
    return _TRUTH.get(str(value).strip().lower())


def check_types(row: Row, columns: Mapping[str, str]) -> None:
    """Raises a BadRow for a value that does not fit its type; with "?" it may be None or absent."""
    for key, kind in columns.items():
        value, expected = row.get(key), kind.removesuffix("?")
        if (value is not None or kind == expected) and not _has_type(value, expected):
            raise BadRow(f"wrong_type:{key}")
    _mark({key: row.get(key) for key in _WEIGHTS}, "")  # 0 or 1, whatever the columns


def _has_type(value: Any, kind: str) -> bool:
    if "turns" in kind:
        return True  # a `Reader` sees
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == "exchanges":
        lists = isinstance(value, list)
        return lists and all(_has_type(pair, "texts") and len(pair) == 2 for pair in value)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (kind == "id" and isinstance(value, int))


def _mark(turn: Mapping[str, Any], place: str) -> bool | None:
    """Whether the marks of a turn or a row say to learn from it, None without any."""
    for key in _OTHER_MARKS:
        if turn.get(key) not in _EMPTY:
            raise BadRow(f"unsupported_mark:{place}{key}")
    marks = {}
    for key in [key for key in turn if key in MARKS and turn[key] is not None]:
        if truth(turn[key]) is None:
            raise BadRow(f"not_0_or_1:{place}{key}={window(str(turn[key]), width=20)}")
        marks[key] = truth(turn[key]) is MARKS[key]
    if len({*marks.values()}) > 1:
        raise BadRow(f"marks_differ:{place}{{{','.join(marks)}}}")
    return next(iter(marks.values()), None)


class Reader:
    """Reads the turns of one row; `remarks` are what of it is not read as it is meant.

    They are examples by the names that count them. Of `answers` each is needed as a target.
    """

    def __init__(self, row: Row, *, answers: bool = False):
        self.row, self.answers = row, answers
        self.remarks: dict[str, str] = {}
        for key in (*_UNREAD_COLUMNS, *LABELS, *MARKS):
            mark = truth(row.get(key)) if key not in _UNREAD_COLUMNS else None
            if mark is None and row.get(key) not in _EMPTY:
                self.remarks[f"unread_column:{key}"] = f"{key}: {window(str(row[key]))}"
            elif mark is not None and mark is not MARKS.get(key, mark):
                self.remarks["marked_row"] = f"{key}: {row[key]}"

    def turns(self, key: str, role: str = "", learned: str = "all") -> list[Turn]:
        """The turns of a column, of which "all", the "last" or "none" are learned from.

        With a `role` the column may also hold a text, which is a turn of it, or a single turn. A
        BadRow says what cannot be read.
        """
        value = self.row[key]
        if role and isinstance(value, str):
            return [{"role": role, "content": value}]
        turns = [value] if role and isinstance(value, dict) else value
        if not isinstance(turns, list):
            raise BadRow(f"wrong_type:{key}")
        first = {"all": 0, "last": len(turns) - 1, "none": len(turns)}[learned]
        return [self._read(turn, f"{key}[{i}]", i < first) for i, turn in enumerate(turns)]

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        """The turns behind the text of the `system` column, unless they have a system turn."""
        system = self.row.get("system")
        if not system or not system.strip():
            return turns
        if not turns or turns[0]["role"] != "system":
            return [{"role": "system", "content": system}, *turns]
        if turns[0]["content"].strip() != system.strip():
            self.remarks["unread_column:system"] = f"system: {window(system)}"
        return turns

    def _read(self, turn: Any, place: str, is_context: bool) -> Turn:
        if not isinstance(turn, dict):
            raise BadRow(f"wrong_type:{place}")
        role, content = ("from", "value") if turn.get("from") is not None else ("role", "content")
        if role not in turn:
            keys = window(",".join(sorted(turn)), width=60)
            raise BadRow(f"unknown_keys:{place}{{{keys}}}")
        if content not in turn and not any(map(turn.get, _CALLS)):
            raise BadRow(f"missing_key:{place}.{content}")
        if not isinstance(turn[role], str):
            raise BadRow(f"wrong_type:{place}.{role}")
        name = re.sub(r"[\s_-]+", "_", turn[role].strip().lower())
        if name not in ROLES:
            raise BadRow(f"unknown_role:{place}.{role}={window(turn[role], width=20)}")
        text, others = _text(turn.get(content), f"{place}.{content}")
        read = _with_calls({"role": ROLES[name], "content": text}, turn, name, others)
        mark = _mark(turn, f"{place}.")
        if mark is False:
            read["train"] = False
        known = _KNOWN
        shown = f"{read['role']}: {read['content']}{read.get('tool_calls', '')}"
        if "tool_calls" in read or read["role"] == "tool" or name in _CALLS:
            self.remarks["tool_turn"], known = shown, known | _OF_TOOLS
        self.remarks |= {f"not_text:{kind}": shown for kind in others}
        is_answer, is_target = read["role"] == "assistant", mark is not False and not is_context
        if mark and (is_context or not is_answer):
            self.remarks["mark_without_effect"] = shown
        if self.answers and not is_context and not is_target:
            self.remarks["no_target_turn"] = shown
        elif not self.answers and is_answer and not is_target:
            self.remarks["context_answer"] = shown
        unread = [key for key in turn if key not in known and turn[key] not in _EMPTY]
        self.remarks |= {f"unread_key:{k}": f"{k}: {window(str(turn[k]))}" for k in unread}
        return read


def _text(content: Any, place: str) -> tuple[str, list[str]]:
    """The text of a turn's content, and the types of its parts that are no text."""
    if not isinstance(content, str | list | None):
        raise BadRow(f"wrong_type:{place}")
    texts, others = [], []
    for i, part in enumerate(content if isinstance(content, list) else [content or ""]):
        fields = {"text": part} if isinstance(part, str) else part
        fields = fields if isinstance(fields, dict) else {}
        kind = fields.get("type") or "text"
        value, values = (fields.get("text"), texts) if kind in _TEXT_PARTS else (kind, others)
        if not isinstance(value, str):
            raise BadRow(f"wrong_type:{place}[{i}]")
        values.append(value)
    return "\n".join(texts), others


def _with_calls(read: Turn, turn: Mapping[str, Any], name: str, others: list[str]) -> Turn:
    """The turn with what templates read of calls of tools and their results; `others`: no calls."""
    calls = _parsed(turn.get("tool_calls") or turn.get("function_call") or turn.get("tool_call"))
    text = read["content"]
    if name in _CALLS and not calls and (parsed := _parsed(text)) not in (text, [], {}):
        calls, read["content"] = parsed, ""  # ShareGPT's
    if read["role"] == "tool":
        read |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    elif calls and read["role"] == "assistant":
        listed = calls if isinstance(calls, list) else [calls]
        found = [_call(_without_nones(_parsed(call))) for call in listed]
        read["tool_calls"] = [call for call in found if call is not None]
        others += ["tool_call"] * found.count(None)
    return read


def _call(call: Any) -> dict[str, Any] | None:
    """A call as chat templates read it: {"type", "function": {"name", "arguments"}}; else None."""
    outer = call if isinstance(call, dict) and "function" in call else {"type": "function"}
    function = _parsed(outer.get("function", call))
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    if "arguments" in function:
        function = function | {"arguments": _parsed(function["arguments"])}
    return outer | {"function": function}


def _parsed(text: Any) -> Any:
    """The JSON object or list that a text holds, else the value as it is."""
    with contextlib.suppress(TypeError, ValueError):
        parsed = json.loads(text)
        return parsed if isinstance(parsed, dict | list) else text
    return text


def _without_nones(value: Any) -> Any:
    """The value without the Nones that parquet fills in, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


def plain(turns: Iterable[Turn]) -> list[Turn]:
    """Turns with role and content alone."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def is_dropping(name: str) -> bool:
    """Whether a remark is a reason to drop the row."""
    return name in ("marked_row", "tool_turn", "no_target_turn") or name.startswith("not_text:")


def well_ordered(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether user and assistant (with tools in between) alternate, after at most one system."""
    return _ORDER.fullmatch("".join(message["role"][0] for message in messages)) is not None


def is_transcript(text: object) -> bool:
    """Whether a value is a dialogue in one text, "Human: ... Assistant: ...", as in hh-rlhf."""
    first = _SPEAKER.match(text) if isinstance(text, str) else None
    return first is not None and first[1] == "Human" and "\n\nAssistant:" in str(text)


def transcript_turns(text: str) -> list[Turn]:
    """The turns of a transcript, without the blanks around each."""
    _, *parts = _SPEAKER.split(text)
    return [
        {"role": ROLES[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
