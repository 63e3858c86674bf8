"""The turns of dialogues as rows have them -> turns in one form, and what of them is not read.

{"role", "content"} or ShareGPT's {"from", "value"}, perhaps with a mark that says whether it is
learned from, becomes {"role", "content"}, with `"train": False` if it is context only, and of tools
with the `tool_calls`, `name`, `tool_call_id` that templates read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zephyr_jax.data.raw.schema import Row, Turn, window

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
_READ = ("role", "from", "content", "value", *MARKS, *_OTHER_MARKS)
_HARMLESS = ("id", "index", "turn_id", "message_id", "timestamp", "created_at", "date")
_KNOWN = frozenset((*_READ, *_HARMLESS, "lang", "language", "model"))
_UNREAD_COLUMNS = ("mask", "tools", "functions")
_UNREAD_COLUMNS += ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_ORDER = re.compile("s?(?:ua(?:t+a)*)+")  # the first letters of the roles
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def truth(value: object) -> bool | None:
    """True or False for a bool, for 0 and 1 and for both as texts; None for anything else."""
    return _TRUTH.get(str(value).strip().lower())


def wrong_type(row: Row, columns: Mapping[str, str]) -> str | None:
    """The first column whose value does not fit its type, as `reason:place`, or None.

    With "?" a value may be None or missing; a single turn stands for a list of one. The weight of a
    row has to be 0 or 1, whatever its columns.
    """
    for key, kind in columns.items():
        value, expected = row.get(key), kind.removesuffix("?")
        if kind != expected and value is None:
            continue
        if expected == "text or turns" and not isinstance(value, str):
            value, expected = [value] if isinstance(value, dict) else value, "turns"
        if expected == "turns" and isinstance(value, list):
            problems = (_turn_problem(turn, f"{key}[{i}]") for i, turn in enumerate(value))
            if problem := next(filter(None, problems), None):
                return problem
        elif expected == "turns" or not _has_type(value, expected):
            return f"wrong_type:{key}"
    return _mark_problem({key: row.get(key) for key in _WEIGHTS}, "")


def _has_type(value: Any, kind: str) -> bool:
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == "exchanges":
        lists = isinstance(value, list)
        return lists and all(_has_type(pair, "texts") and len(pair) == 2 for pair in value)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (kind == "id" and isinstance(value, int))


def _turn_problem(turn: object, place: str) -> str | None:
    if not isinstance(turn, dict):
        return f"wrong_type:{place}"
    role, content = _turn_keys(turn)
    if role not in turn:
        return f"unknown_keys:{place}{{{window(','.join(sorted(turn)), width=60)}}}"
    if content not in turn and not any(map(turn.get, _CALLS)):
        return f"missing_key:{place}.{content}"
    if not isinstance(turn[role], str):
        return f"wrong_type:{place}.{role}"
    if _name(turn) not in ROLES:
        return f"unknown_role:{place}.{role}={window(turn[role], width=20)}"
    parts = turn.get(content)
    if not isinstance(parts, str | list | None):
        return f"wrong_type:{place}.{content}"
    for i, (kind, text) in enumerate(_parts(turn)):
        if not isinstance(text if kind in _TEXT_PARTS else kind, str):
            return f"wrong_type:{place}.{content}[{i}]"
    return _mark_problem(turn, f"{place}.")


def _mark_problem(turn: Mapping[str, Any], place: str) -> str | None:
    """Why it cannot be said from the marks whether to learn from a turn or a row, or None."""
    for key in _OTHER_MARKS:
        if not _is_empty(turn.get(key)):
            return f"unsupported_mark:{place}{key}"
    for key in turn:
        if key in MARKS and turn[key] is not None and truth(turn[key]) is None:
            return f"not_0_or_1:{place}{key}={window(str(turn[key]), width=20)}"
    marks = _marks(turn)
    return None if len({*marks.values()}) < 2 else f"marks_differ:{place}{{{','.join(marks)}}}"


def _marks(turn: Mapping[str, Any]) -> dict[str, bool]:
    """Whether to learn from a turn, by each mark that it has."""
    marks = {key: truth(value) for key, value in turn.items() if key in MARKS}
    return {key: mark is MARKS[key] for key, mark in marks.items() if mark is not None}


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _turn_keys(turn: Mapping[str, Any]) -> tuple[str, str]:
    return ("from", "value") if turn.get("from") is not None else ("role", "content")


def _name(turn: Mapping[str, Any]) -> str:
    """The role as the row names it, in lower case and with underscores."""
    return re.sub(r"[\s_-]+", "_", turn[_turn_keys(turn)[0]].strip().lower())


def listed(value: Any) -> list[Any]:
    """The turns of a column as the row has them; none of a text."""
    values = value if isinstance(value, list) else [value]
    return [turn for turn in values if isinstance(turn, dict)]


def read_turns(value: Any, role: str = "user") -> list[Turn]:
    """The turns of a column; a text is one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [_read_turn(turn) for turn in listed(value)]


def plain(turns: Iterable[Turn]) -> list[Turn]:
    """Turns with role and content alone."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _read_turn(turn: Mapping[str, Any]) -> Turn:
    name = _name(turn)
    text = "\n".join(text for kind, text in _parts(turn) if kind in _TEXT_PARTS)
    calls = turn.get("tool_calls") or turn.get("function_call") or turn.get("tool_call")
    if name in _CALLS and not calls and (parsed := _parsed(text)) != text:  # ShareGPT's
        calls, text = parsed, ""
    read: Turn = {"role": ROLES[name], "content": text}
    if False in _marks(turn).values():
        read["train"] = False
    if ROLES[name] == "tool":
        read |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    elif calls and ROLES[name] == "assistant":
        read["tool_calls"] = [_call(_without_nones(call)) for call in listed(calls)]
    return read


def _parts(turn: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The parts of a turn's content as (type, text); a plain text is one of them."""
    content = turn.get(_turn_keys(turn)[1]) or ""
    if isinstance(content, str):
        return [("text", content)]
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    fields = [part if isinstance(part, dict) else {} for part in parts]
    return [(part.get("type") or "text", part.get("text")) for part in fields]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates read it: {"type", "function": {"name", "arguments"}}."""
    if not isinstance(call.get("function"), dict):
        call = {"type": "function", "function": call}
    function = call["function"]
    if "arguments" in function:
        function = function | {"arguments": _parsed(function["arguments"])}
    return call | {"function": function}


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


def remarks(
    row: Row, learned: Iterable[Any], context: Iterable[Any] = (), *, answers: bool = False
) -> dict[str, str]:
    """What of a row is not read as it is meant, by the name that counts it, with an example.

    `learned` and `context` are its turns; of `answers` each is needed as a target.
    """
    found: dict[str, str] = {}
    for key in (*_UNREAD_COLUMNS, *LABELS, *MARKS):
        mark = truth(row.get(key)) if key not in _UNREAD_COLUMNS else None
        if mark is None and not _is_empty(row.get(key)):
            found[f"unread_column:{key}"] = f"{key}: {window(str(row[key]))}"
        elif mark is not None and mark is not MARKS.get(key, mark):
            found["marked_row"] = f"{key}: {row[key]}"
    for turn, is_context in [*((x, False) for x in learned), *((x, True) for x in context)]:
        read, known = _read_turn(turn), _KNOWN
        shown = f"{read['role']}: {read['content']}{read.get('tool_calls', '')}"
        if "tool_calls" in read or read["role"] == "tool" or _name(turn) in _CALLS:
            found["tool_turn"], known = shown, known | _OF_TOOLS
        found |= {f"not_text:{kind}": shown for kind, _ in _parts(turn) if kind not in _TEXT_PARTS}
        if True in _marks(turn).values() and (is_context or read["role"] != "assistant"):
            found["mark_without_effect"] = shown
        is_target = read.get("train", True) and not is_context
        if answers and not is_context and not is_target:
            found["no_target_turn"] = shown
        elif not answers and read["role"] == "assistant" and not is_target:
            found["context_answer"] = shown
        unread = [key for key in turn if key not in known and not _is_empty(turn[key])]
        found |= {f"unread_key:{key}": f"{key}: {window(str(turn[key]))}" for key in unread}
    return found


def is_dropping(name: str) -> bool:
    """Whether a remark is a reason to drop the row."""
    return name in ("marked_row", "tool_turn", "no_target_turn") or name.startswith("not_text:")


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns behind the text of the `system` column, unless they have a system turn."""
    system = row.get("system")
    if not system or not system.strip() or [turn["role"] for turn in turns[:1]] == ["system"]:
        return turns
    return [{"role": "system", "content": system}, *turns]


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
