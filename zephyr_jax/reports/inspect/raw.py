"""One raw row, and what the rules of prepare_data do to it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from zephyr_jax.data.prepare.convert import convert_row, example_of
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, keyed_hash
from zephyr_jax.data.raw.sources import Source
from zephyr_jax.reports.html import Card, Group, Span, diff_spans

_SIMILAR = 0.6  # share of words in common from which a text counts as the changed form of another


class RawRow(NamedTuple):
    """A row as it was read, or the reason why it cannot be parsed, and where it is."""

    row: Row | str
    line: int
    source: Source

    @property
    def where(self) -> str:
        """The row's name as reports have it: `train_3.jsonl:17`."""
        return f"{self.source.name}:{self.line}"


def find_row(plan: Plan, place: str, text: str) -> RawRow:
    """The row at a place, or the first one with a text in it (whatever its case).

    Args:
      plan: the sources.
      place: its number over all files (from 0), or FILE:LINE as in report.json; not with `text`.
      text: what to look for.

    Raises:
      ValueError: there is no such row, or the place is neither form.
    """
    place = place or "0"
    if not place.isdecimal() and not re.fullmatch(r".+:\d+", place):
        raise ValueError(f"--row={place}: give a number from 0 on, or FILE:LINE as in report.json")
    wanted, count = text.casefold(), 0
    for count, raw in enumerate(_rows(plan), start=1):
        if text:
            if any(wanted in value.casefold() for value in leaves(raw.row).values()):
                return raw
        elif place in (str(count - 1), raw.where):
            return raw
    names = [source.name for source in plan.sources.files]
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if text:
        raise ValueError(f"no row of {some} holds {text!r}: --find looks at values, in any case")
    raise ValueError(f"no row {place}: {some} hold {count} rows, counted from 0")


def _rows(plan: Plan) -> Iterator[RawRow]:
    """Yields the rows of all files in the order of their names."""
    for source in plan.sources.files:
        rows = (row for chunk in chunks_of(source.path) for row in read_rows(chunk))
        for line, row in enumerate(rows, start=1):
            if row is not None:
                yield RawRow(row, line, source)


def split_of(plan: Plan, source: Source, record: Row) -> str:
    """Where a record goes as far as the record alone decides, in words."""
    selection, prompt_id = plan.selection, record["prompt_id"]
    if selection.rows is not None:
        return "its split depends on all rows (--rows)"
    held_out = keyed_hash("holdout", selection.seed, prompt_id) < selection.holdout * 2.0**64
    split = source.split or plan.schema.splits[held_out]
    decided = "by its file's name" if source.split else "by the hash of its prompt"
    return f"to {split}, {decided}" + (
        "" if selection.duplicates == "keep" else ", unless it is a duplicate"
    )


def raw_cards(plan: Plan, raw: RawRow) -> list[Group]:
    """The row, what became of it, and its records compared with the texts they are made from."""
    row = raw.row
    outcome = convert_row(plan, plan.contaminants(), row)
    cards = [Card(raw.where)]
    record = outcome.record
    if record is None:
        reason = outcome.unfit or ", ".join(outcome.rules)
        cards.append(Card(f"dropped: {reason}", style="rejected"))
    else:
        cards.append(Card(f"kept: {split_of(plan, raw.source, record)}", style="added"))
    if isinstance(row, str):
        return [Group(cards)]
    for rule in outcome.rules:
        before, after = example_of(plan.schema, row, outcome, rule)
        spans = [Span(f"{text}\n", "removed") for text in before]
        spans += [Span(f"{text}\n", "added") for text in after or []]
        cards.append(Card(f"rule {rule}", spans))
    texts = leaves(row)
    shown: set[str] = set()
    for side, message in _messages(record) if record else ():
        path = _origin(texts, message["content"])
        shown.add(path)
        cards.append(_message_card(record or {}, side, message, path, texts.get(path, "")))
    rest = [Span(f"{path}: {text}\n") for path, text in texts.items() if path not in shown]
    return [Group([*cards, Card("the rest of the row" if record else "the row", rest)])]


def leaves(row: Any, path: str = "") -> dict[str, str]:
    """All values of a row that hold no others, as text, by their paths.

    >>> leaves({"id": 3, "data": ["Hi", "Hello"], "more": {"x": None}})
    {'id': '3', 'data[0]': 'Hi', 'data[1]': 'Hello', 'more.x': 'null'}
    """
    if isinstance(row, dict) and row:
        parts = (leaves(value, f"{path}.{key}".lstrip(".")) for key, value in row.items())
    elif isinstance(row, list | tuple) and row:
        parts = (leaves(value, f"{path}[{i}]") for i, value in enumerate(row))
    else:
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        return {path: text}
    return {name: text for part in parts for name, text in part.items()}


def _messages(record: Row) -> list[tuple[str, dict[str, str]]]:
    """The messages with their side, "" for those that both answers of a pair follow."""
    if "messages" in record:
        return [("", message) for message in record["messages"]]
    chosen, rejected = record["chosen"], record["rejected"]
    prompt = [("", message) for message in chosen[:-1]]
    return [*prompt, ("chosen", chosen[-1]), ("rejected", rejected[-1])]


def _origin(texts: dict[str, str], content: str) -> str:
    """The path of the text that a message is made from, the most similar one; "" if none is."""

    def similarity(path: str) -> float:
        if texts[path] == content:
            return 2.0
        words = texts[path].casefold().split()
        matcher = difflib.SequenceMatcher(None, words, content.casefold().split())
        return matcher.ratio() if matcher.quick_ratio() >= _SIMILAR else 0.0

    best = max(texts, key=similarity)
    return best if similarity(best) >= _SIMILAR else ""


def _message_card(record: Row, side: str, message: dict[str, str], path: str, before: str) -> Card:
    title = f"{message['role']}, from {path or 'several fields'}"
    if side:
        title = f"{side} {record[f'score_{side}']:g} {title}"
    content = message["content"]
    return Card(title, diff_spans(before, content) if path else [Span(content)], side)
