"""Cards of a raw row and its cleaning, of a prepared record, and of a packed row's loss mask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zephyr_jax.data.prepare.convert import convert_row, example_of
from zephyr_jax.data.prepare.prepare import Plan
from zephyr_jax.data.raw.filters import load_contaminants
from zephyr_jax.data.raw.readers import numbered_rows
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.page import Card, Group, Span, diff_spans


def find_row(plan: Plan, place: str, text: str) -> tuple[Row | str, str]:
    """The first row with a text in it, whatever its case; without a text the row at a place.

    The place is a number over all files (from 0), or FILE:LINE as in report.json. Returned are the
    row, or the reason why it cannot be parsed, and its FILE:LINE; a ValueError if there is none.
    """
    count, files = 0, plan.sources.files
    for source in files:
        for line, row in numbered_rows(source.path):
            where = f"{source.name}:{line}"
            if contains(row, text) if text else place in (str(count), where):
                return row, where
            count += 1
    what = f"no row holds {text!r}: --find looks at values, in any case"
    if not text:
        what = f"--row={place} is not there: give a number from 0 on, or FILE:LINE of report.json"
    some = ", ".join(source.name for source in files[:5]) + (", ..." if len(files) > 5 else "")
    raise ValueError(f"{what}; {some} hold {count} rows")


def contains(row: Any, text: str) -> bool:
    """Whether a value of a row holds a text, whatever its case."""
    return any(text.casefold() in value.casefold() for value in leaves(row).values())


def leaves(row: Any, path: str = "") -> dict[str, str]:
    """All values of a row that hold no others, as text, by paths such as `data[0].id`."""
    if isinstance(row, dict) and row:
        parts = (leaves(value, f"{path}.{key}".lstrip(".")) for key, value in row.items())
    elif isinstance(row, list | tuple) and row:
        parts = (leaves(value, f"{path}[{i}]") for i, value in enumerate(row))
    else:
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
        return {path: text}
    return {name: text for part in parts for name, text in part.items()}


def raw_cards(plan: Plan, row: Row | str, where: str) -> list[Group]:
    """The row, what became of it, and its records compared with the texts they are made from."""
    outcome = convert_row(plan, load_contaminants(plan.selection.decontaminate), row)
    cards = [Card(where)]
    if not outcome.records:
        reason = outcome.unfit or ", ".join(outcome.rules)
        cards.append(Card(f"dropped: {reason}", style="rejected"))
    if isinstance(row, str):
        return [Group(cards)]
    for rule in outcome.rules:
        before, after = example_of(plan.schema, row, outcome, rule)
        spans = [Span(f"{text}\n", "removed") for text in before]
        spans += [Span(f"{text}\n", "added") for text in after or []]
        cards.append(Card(f"rule {rule}", spans))
    texts, shown = leaves(row), set[str]()
    for record in outcome.records:
        for side, message in _messages(record):
            content = message["content"]
            same = (path for path, text in texts.items() if text.casefold() == content.casefold())
            path = next(same, "")
            title = f"{message['role']}, from {path or 'several fields'}"
            if side:
                title = f"{side} {record[f'score_{side}']:g} {title}"
            spans = diff_spans(texts[path], content) if path else [Span(content)]
            cards.append(Card(title, spans, side))
            shown.add(path)
    rest = [Span(f"{path}: {text}\n") for path, text in texts.items() if path not in shown]
    return [Group([*cards, Card("the rest of the row" if outcome.records else "the row", rest)])]


def _messages(record: Row) -> list[tuple[str, dict[str, str]]]:
    """The messages with their side, "" for those that both answers of a pair follow."""
    answers = [(side, record[side][-1]) for side in ("chosen", "rejected") if side in record]
    return [("", turn) for turn in record.get("messages") or record["chosen"][:-1]] + answers


def record_cards(record: Row, tok: Tokenizer | None) -> list[Group]:
    """A record of a set: its turns, or with a tokenizer its tokens, targets in color."""
    about = f"prompt_id {record['prompt_id']}"
    if record.get("source"):
        about += f", source {record['source']}"
    if "label" in record:
        about += f", {'desirable' if record['label'] else 'undesirable'}"
    top = Group([Card(about, style="dim")])
    if "messages" in record:
        if tok is None:
            return [top, Group([_turn_card(turn) for turn in record["messages"]])]
        ids, mask = render_chat(tok, record["messages"])
        return [top, Group([_token_card(tok, "dialogue", ids, mask, "target")])]
    context, answers = record["chosen"][:-1], []
    titles = {side: f"{side}, score {record[f'score_{side}']:g}" for side in ("chosen", "rejected")}
    texts = {side: record[side][-1]["content"] for side in titles}
    if tok is None:
        shared = [_turn_card(turn) for turn in context]
        answers += [Card(titles[side], [Span(text)], side) for side, text in texts.items()]
    else:
        prompt, *both = render_pair(tok, context, *texts.values())
        unlearned = [0] * len(prompt)
        shared = [_token_card(tok, "prompt", prompt, unlearned, "target")]
        for (side, title), ids in zip(titles.items(), both, strict=True):
            mask = unlearned + [1] * len(ids)
            answers.append(_token_card(tok, title, prompt + ids, mask, side, len(prompt)))
    return [top, Group(shared), Group(answers, parallel=True)]


def _turn_card(turn: Mapping[str, Any]) -> Card:
    title = turn["role"] + ("" if turn.get("train", True) else ", context only")
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if "tool_calls" in turn else ""
    return Card(title, [Span(turn["content"] + calls)])


def row_cards(row: np.ndarray, tok: Tokenizer) -> list[Group]:
    """A packed row (0-d, of `packing.row_dtype`): its documents, then the padding as a number."""
    seq_len, used = len(row["tokens"]), int((row["segments"] > 0).sum())
    n_documents = int(row["segments"].max(initial=0))
    title = (
        f"{n_documents} documents, {used} tokens ({used / seq_len:.1%} of {seq_len} positions), "
        f"{int(row['loss_mask'].sum())} targets"
    )
    groups = [Group([Card(title)])]
    for number in range(1, n_documents + 1):
        places = np.flatnonzero(row["segments"] == number)
        branches = row["branches"][places]
        titles = [f"document {number} from index {places[0]}"]
        if branches.any():
            titles[0] += f", pair {row['pair_ids'][number - 1]}, shared prefix"
            titles += [f"document {number}, {side}" for side in ("chosen", "rejected")]
        cards, prefix = [], places[:0]
        for branch, style in enumerate(("target", "chosen", "rejected")[: len(titles)]):
            # A branch is decoded after its prefix, whose text decides about a leading blank.
            whole = np.concatenate([prefix, places[branches == branch]])
            ids, mask = row["tokens"][whole].tolist(), row["loss_mask"][whole].tolist()
            cards.append(_token_card(tok, titles[branch], ids, mask, style, len(prefix)))
            prefix = places[branches == 0]
        groups += [Group(cards[:1]), Group(cards[1:], parallel=True)]
    return [*groups, Group([Card(f"padding: {seq_len - used} positions", style="dim")])]


def _token_card(
    tok: Tokenizer, title: str, ids: list[int], mask: Sequence[int], style: str, start: int = 0
) -> Card:
    """The tokens from `start` on, targets in a style; special ones have their literal text.

    A character of several tokens stands with the last of them.
    """
    texts = list(tok.stream(ids, continuation=False))
    rest = texts.pop()
    if ids:
        texts[-1] += rest
    names = {i: name for name, i in tok.specials.items()}
    spans = []
    for i, text, target in list(zip(ids, texts, mask, strict=True))[start:]:
        name = style if target else "dim"
        spans.append(Span(text + names.get(i, ""), f"{name} special" if i in names else name))
    if start and spans and not mask[start]:  # the prompt's last token again, a newline
        spans[0] = spans[0]._replace(text=spans[0].text.replace("\n", "\\n"))
    title = f"{title}: {len(spans)} tokens, {sum(mask[start:])} targets"
    return Card(title, spans, "" if style == "target" else style)
