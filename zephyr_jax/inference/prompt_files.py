"""Files of conversations: lines of JSON with a prompt or messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.data.text.chat import render_text


class Line(NamedTuple):
    """A line of such a file: FILE:NUMBER, its JSON object, and its conversation."""

    place: str
    row: dict[str, Any]
    messages: list[dict[str, str]]


def read_lines(path: Path, system: list[dict[str, str]]) -> list[Line]:
    """The lines that are not blank, each with a chat that can be rendered, after `system`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a conversation, naming it, or there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    lines = []
    # Not splitlines: JSON strings may hold characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{place} is not a line with prompt or messages") from error
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
