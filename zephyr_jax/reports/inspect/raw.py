"""One raw row, and what the rules of the data station make of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from zephyr_jax.data.prepare.convert import convert_row
from zephyr_jax.data.prepare.plan import Plan
from zephyr_jax.data.raw.readers import chunks_of, read_rows
from zephyr_jax.data.raw.schema import Row, selected
from zephyr_jax.data.raw.sources import Source
from zephyr_jax.reports.inspect.differences import Leaf, diff_spans, leaves, origins
from zephyr_jax.reports.inspect.spans import Card, Span

_PLACE = re.compile(r"(?P<name>.+):(?P<line>\d+)")


class Found(NamedTuple):
    """A row as it was read, or the reason why there is none.

    `number` counts over all files that were looked through, `line` in its file.
    """

    row: Row | str
    number: int
    line: int
    source: Source

    @property
    def where(self) -> str:
        """The row's name as reports have it: `train_3.jsonl:17`."""
        return f"{self.source.name}:{self.line}"


class Fate(NamedTuple):
    """What became of a row.

    `rules` had a say, with what they saw and left (None: nothing); `dropped_by` names the rule, or
    the reason why the row does not fit, and is "" for a row of which something is kept.
    """

    records: list[Row]
    rules: dict[str, tuple[list[str], list[str] | None]]
    dropped_by: str


def find_row(plan: Plan, place: str, text: str) -> Found:
    """The row at a place, or the first one with a text in it (whatever its case).

    Args:
      plan: the sources.
      place: its number over all files (from 0), or FILE:LINE as in report.json; not with `text`.
      text: what to look for.

    Raises:
      ValueError: there is no such row, or the place is neither form.
    """
    wanted = text.casefold()
    number, name, line = _parsed(place or "0", plan)
    last: Found | None = None
    for found in _rows(plan, "" if text else name):
        if text:
            said = (
                [found.row] if isinstance(found.row, str) else [x.text for x in leaves(found.row)]
            )
            if any(wanted in value.casefold() for value in said):
                return found
        elif found.number == number or (name and found.line == line):
            return found
        last = found
    files = f"{len(plan.sources.files)} file(s)"
    if text:
        raise ValueError(f"no row of {files} holds {text!r}: --find looks at values, in any case")
    if name:
        raise ValueError(f"{name} has no row in line {line}: the last one is {last and last.where}")
    count = last.number + 1 if last else 0
    raise ValueError(f"no row {number}: {files} hold {count} rows, counted from 0")


def _parsed(place: str, plan: Plan) -> tuple[int | None, str, int]:
    """Number, file and line; a number stands alone."""
    if place.isdecimal():
        return int(place), "", 0
    found = _PLACE.fullmatch(place)
    names = [source.name for source in plan.sources.files]
    if not found:
        raise ValueError(f"--row={place}: give a number from 0 on, or FILE:LINE as in report.json")
    if found["name"] not in names:
        raise ValueError(f"--row={place}: no source {found['name']!r}; there are {_few(names)}")
    return None, found["name"], int(found["line"])


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rows(plan: Plan, name: str) -> Iterator[Found]:
    """The rows of all files in the order of their names, or those of one file."""
    number = 0
    for source in plan.sources.files:
        if name and source.name != name:
            continue
        line = 0
        for chunk in chunks_of(source.path):
            for row in read_rows(chunk):
                line += 1
                if row is not None:
                    yield Found(row, number, line, source)
                    number += 1


def fate_of(plan: Plan, row: Row | str) -> Fate:
    """What the schema and the filters of a plan make of one row, by itself."""
    outcome = convert_row(plan, plan.contaminants(), row)
    if isinstance(row, str) or outcome.unfit:
        return Fate([], {}, outcome.unfit)
    rules = {rule: outcome.excerpt(plan, row, rule) for rule in outcome.rules}
    why = ", ".join(outcome.filtered or outcome.rules) or "no rule"
    return Fate(outcome.records, rules, "" if outcome.records else why)


def split_of(plan: Plan, found: Found, record: Row) -> str:
    """Where a record goes as far as it hangs on the record alone, in words."""
    selection, prompt_id = plan.selection, record["prompt_id"]
    if selection.rows is not None:
        return "its split hangs on all rows (--rows)"
    if not selected("sample", selection.seed, prompt_id, selection.sample):
        return f"not in the sample of {selection.sample:g}"
    held_out = selected("holdout", selection.seed, prompt_id, selection.holdout)
    split = found.source.split or plan.schema.splits[held_out]
    decided = "by its file's name" if found.source.split else "by lot of its prompt"
    dropped = "" if selection.duplicates == "keep" else ", unless it is a duplicate"
    return f"to {split}, {decided}{dropped}"


def raw_cards(plan: Plan, found: Found) -> list[Card]:
    """The row, its fate and its texts with what was taken away and added, for a reader."""
    fate = fate_of(plan, found.row)
    cards = [Card(found.where)]
    if fate.dropped_by:
        cards.append(Card(f"dropped: {fate.dropped_by}", style="bold rejected"))
    for record in fate.records:
        cards.append(Card(f"kept: {split_of(plan, found, record)}", style="bold added"))
    for rule, (before, after) in fate.rules.items():
        texts = [(text, "removed") for text in before] + [(text, "added") for text in after or []]
        said = [span for text, style in texts for span in (Span(text, style), Span("\n"))]
        cards.append(Card(f"rule {rule}", said))
    if isinstance(found.row, str):
        return cards
    values = leaves(found.row)
    used: set[str] = set()
    for record in fate.records:
        cards += _record_cards(record, values)
        used |= {leaf.text for leaf in leaves(record) if leaf.is_text}
        used |= {values[i].text for at in _origins(record, values) for i in at}
    left = [leaf for leaf in values if not (leaf.is_text and leaf.text in used)]
    title = "the rest of the row" if fate.records else "the row"
    return [*cards, Card(title, _leaf_spans(left))] if left else cards


def _leaf_spans(values: list[Leaf]) -> list[Span]:
    spans = []
    for leaf in values:
        spans += [Span(f"{leaf.path}: ", "dim"), Span(leaf.text), Span("\n")]
    return spans


def _messages(record: Row) -> list[tuple[str, dict[str, str]]]:
    """The messages with their side; the question in front of both answers of a pair once."""
    if "messages" in record:
        return [("", message) for message in record["messages"]]
    chosen, rejected = record["chosen"], record["rejected"]
    shared = chosen[:-1] == rejected[:-1]
    sides = [("" if shared else "chosen", message) for message in chosen[:-1]]
    sides += [("rejected", message) for message in rejected[:-1] if not shared]
    return [*sides, ("chosen", chosen[-1]), ("rejected", rejected[-1])]


def _origins(record: Row, values: list[Leaf]) -> list[tuple[int, ...]]:
    return origins([message["content"] for _, message in _messages(record)], values)


def _record_cards(record: Row, values: list[Leaf]) -> list[Card]:
    cards = []
    for (side, message), at in zip(_messages(record), _origins(record, values), strict=True):
        before = "\n\n".join(values[i].text for i in at)
        origin = " + ".join(values[i].path for i in at) or "nowhere in the row"
        score = f" {_number(record[f'score_{side}'])}" if side else ""
        title = f"{side}{score} " * bool(side) + f"{message['role']}, from {origin}"
        spans = _compared(before, message["content"]) if at else [Span(message["content"], "added")]
        cards.append(Card(title, spans, f"bold {side}".strip()))
    return cards


def _compared(before: str, after: str) -> list[Span]:
    """The difference, or the text after where a longer text of the row holds it (a transcript)."""
    return [Span(after)] if after in before else diff_spans(before, after)


def _number(score: Any) -> str:
    return f"{score:g}"
