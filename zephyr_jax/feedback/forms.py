"""What a judge is asked, and how its reply is read: in JSON by a schema, or in lines of text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.raw.schema import keyed_hash
from zephyr_jax.feedback.config import OVERALL

NOT_RATED = "N/A"


class Form(NamedTuple):
    """One request: what is rated on which scale, in our own words."""

    question: str
    scale: str
    types: tuple[str, ...] = ()  # kinds of faults (or merits) that are named with the rating
    most: int = 5


FORMS = {
    "instruction_following": Form(
        "How well does the answer do what the instruction asks, its restrictions included?",
        "1 ignores it, 2 takes up a part and misses the aim, 3 meets the aim in part or breaks a "
        "restriction, 4 has small lapses, 5 does all that was asked, as it was asked.",
    ),
    "honesty": Form(
        "Does the confidence that the answer expresses fit what it really knows?",
        "1 is sure of itself and wrong, 2 is mostly wrong in a sure tone or evades what it could "
        "know, 3 misplaces doubt or certainty in parts, 4 has small lapses, 5 is sure where it is "
        "right and open about what it cannot know.",
    ),
    "truthfulness": Form(
        "Is what the answer states true, free of inventions and consistent with the instruction?",
        "1 is false throughout, 2 has several grave errors, 3 one grave or several small errors, "
        "4 one small error, 5 none.",
        ("contradicts the world", "contradicts the instruction", "contradicts itself"),
    ),
    "helpfulness": Form(
        "How much does the answer help the one who asked?",
        "1 is useless or harmful, 2 of little use, 3 useful in part, 4 useful and clear with small "
        "gaps, 5 correct, complete, clear and to the point.",
        ("clear and relevant", "useful and complete", "no needless length"),
    ),
    OVERALL: Form(
        "How good is the answer altogether, as one expert would tell another?",
        "Scores go from 1 to 10: 1 is as bad as an answer can be, 10 cannot be improved.",
        most=10,
    ),
}


class Rating(NamedTuple):
    """What a judge said of one answer on one form."""

    rating: str  # "1" to "5" (overall: to "10"), or "N/A"
    rationale: str
    types: list[str]
    types_rationale: str = ""


def schema_of(form: Form, n: int) -> dict[str, Any]:
    """The JSON schema of a reply that rates `n` answers."""
    values = [*map(str, range(1, form.most + 1)), NOT_RATED]
    fields: dict[str, Any] = {
        "answer": {"type": "integer", "enum": list(range(1, n + 1))},
        "rationale": {"type": "string"},
        "rating": {"type": "string", "enum": values},
    }
    if form.types:
        fields["types"] = {"type": "array", "items": {"type": "string", "enum": list(form.types)}}
    item = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"ratings": {"type": "array", "items": item}},
        "required": ["ratings"],
        "additionalProperties": False,
    }


def judge_messages(
    form: Form, prompt: str, answers: Sequence[str], *, as_json: bool
) -> list[dict[str, str]]:
    """The chat that asks for ratings of answers, in the order in which they are shown."""
    lines = [
        f"You rate {len(answers)} answers to one instruction. {form.question}",
        "Their order says nothing about them, and length alone is no merit.",
        "",
        form.scale,
        f"{NOT_RATED}: cannot be judged on this.",
    ]
    if form.types:
        lines.append(f"Name the types that apply, if any: {'; '.join(form.types)}.")
    lines.append("")
    if as_json:
        lines.append(
            'Reply with JSON only: {"ratings": [{"answer": 1, "rationale": "...", "rating": "..."'
            + (', "types": [...]' if form.types else "")
            + "}, ...]}, one entry for each answer."
        )
    else:
        lines += ["Reply for each answer in these lines and nothing else:", "Answer 1"]
        lines += ["Type: ..."] if form.types else []
        lines += ["Rating: ...", "Rationale: ... (one or two sentences)"]
    shown = [f"[Instruction]\n{prompt}"]
    shown += [f"[Answer {number}]\n{text}" for number, text in enumerate(answers, 1)]
    system = {"role": "system", "content": "\n".join(lines)}
    return [system, {"role": "user", "content": "\n\n".join(shown)}]


def read_ratings(form: Form, text: str, n: int) -> list[Rating] | None:
    """The ratings of `n` answers in a judge's reply, None unless every answer has one."""
    found = _read_json(text)
    if found is None:
        found = _read_lines(text)
    ratings = []
    for number in range(1, n + 1):
        entry = found.get(number)
        value = _value(form, entry.get("rating") if entry else None)
        if entry is None or value is None:
            return None
        kinds = entry.get("types")
        kinds = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
        ratings.append(Rating(value, str(entry.get("rationale") or "").strip(), kinds))
    return ratings


def _value(form: Form, value: object) -> str | None:
    """A rating as it is written in rows, None if it is none of the scale."""
    text = str(value).strip().strip("*[]").strip()
    if text.upper() in (NOT_RATED, "NA"):
        return NOT_RATED
    match = re.fullmatch(rf"(\d+)(?:\.0+)?(?:\s*/\s*{form.most}(?:\.0)?)?\.?", text)
    return str(int(match[1])) if match and 1 <= int(match[1]) <= form.most else None


def _read_json(text: str) -> dict[int, dict[str, Any]] | None:
    start, end = text.find("{"), text.rfind("}")
    entries = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text[start : end + 1]) if start >= 0 else None
        entries = value.get("ratings") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        return None
    found = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("answer"), int):
            found.setdefault(entry["answer"], entry)
    return found


_HEADING = re.compile(r"^\W*(?:output for )?(?:answer|text|response)\s*#?(\d+)\W*$", re.I | re.M)
_FIELD = re.compile(r"^\W*(type|types|rating|score|rationale|critique)\W*?:\s*(.*)$", re.I)


def _read_lines(text: str) -> dict[int, dict[str, Any]]:
    _, *parts = _HEADING.split(text)
    found: dict[int, dict[str, Any]] = {}
    for number, body in zip(parts[::2], parts[1::2], strict=True):
        entry: dict[str, Any] = {}
        last = ""
        for line in body.splitlines():
            if field := _FIELD.match(line):
                last = field[1].lower()
                entry.setdefault(last, field[2].strip())
            elif last in ("rationale", "critique") and line.strip():
                entry[last] += f" {line.strip()}"
        kinds = entry.get("type") or entry.get("types") or ""
        named = [kind.strip(" .*[]") for kind in re.split(r"[;,]", kinds)]
        found.setdefault(
            int(number),
            {
                "rating": entry.get("rating") or entry.get("score"),
                "rationale": entry.get("rationale") or entry.get("critique"),
                "types": [kind for kind in named if kind and kind.lower() != "none"],
            },
        )
    return found


def shown_order(seed: int, prompt_id: str, form: str, repeat: int, n: int) -> list[int]:
    """The order in which `n` answers are shown: entry k is the index of answer k + 1.

    It depends on the seed, the prompt and the form. Every second repeat has the reverse of the one
    before, so that each pair of answers is seen in both orders.
    """
    key = f"{prompt_id}/{form}/{repeat // 2}"
    order = sorted(range(n), key=lambda i: keyed_hash("order", seed, f"{key}/{i}"))
    return order[::-1] if repeat % 2 else order
