"""Records of a prepared set and rows of a packed set, as cards that show the loss mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import PairIds, render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.html import Card, Group, Span

# The project's own rendering; published recipes that differ are shown by `row_cards`.
OPTIONS = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}
_STYLES = ("target", "chosen", "rejected")  # of targets in a document's parts


class Token(NamedTuple):
    """One token: its id, its text ("" where a character goes on), whether it is a target."""

    id: int
    text: str
    target: bool
    special: bool


class PackedDocument(NamedTuple):
    """One document of a row: a dialogue's tokens, or a pair's shared prefix and two branches.

    A dialogue has id 0. The first token of a branch repeats the prompt's last one.
    """

    parts: list[list[Token]]
    id: int
    start: int


def tokens_of(tok: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> list[Token]:
    """The tokens of a text that begins there; special ones have their literal text.

    A character of several tokens stands with the last of them.
    """
    ids = [int(i) for i in ids]
    texts = list(tok.stream(ids, continuation=False))
    rest = texts.pop()
    if ids:
        texts[-1] += rest
    names = {i: name for name, i in tok.specials.items()}
    return [
        Token(i, text + names.get(i, ""), bool(target), i in names)
        for i, text, target in zip(ids, texts, mask, strict=True)
    ]


def chat_tokens(tok: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[Token]:
    """The tokens of a dialogue as it is trained on, before it is cut to a row."""
    return tokens_of(tok, *render_chat(tok, messages, **OPTIONS))


def pair_ids(tok: Tokenizer, record: Row) -> PairIds:
    """The ids of a pair's prompt and answers, before they are cut."""
    answers = (record[side][-1]["content"] for side in ("chosen", "rejected"))
    return render_pair(tok, record["chosen"][:-1], *answers, **OPTIONS)


def pair_tokens(tok: Tokenizer, record: Row) -> list[list[Token]]:
    """The tokens of a pair's prompt, its chosen and its rejected answer; answers are targets."""
    prompt, *answers = pair_ids(tok, record)
    n = len(prompt)
    both = [tokens_of(tok, prompt + ids, [0] * n + [1] * len(ids)) for ids in answers]
    return [both[0][:n], *(tokens[n:] for tokens in both)]


def record_cards(record: Row, tok: Tokenizer | None, ids: bool) -> list[Group]:
    """A record of a set: its turns, or its tokens where there is a tokenizer.

    Args:
      record: a dialogue or a pair.
      tok: renders the chat; targets are colored, other tokens dim.
      ids: whether to add tables of the tokens.
    """
    about = f"prompt_id {record['prompt_id']}"
    if record.get("source"):
        about += f", source {record['source']}"
    groups = [Group([Card(about, style="dim")])]
    if "messages" in record:
        if tok is not None:
            return groups + _token_groups(["dialogue"], [chat_tokens(tok, record["messages"])], ids)
        return [*groups, Group([_turn_card(turn) for turn in record["messages"]])]
    sides = ("chosen", "rejected")
    titles = [f"{side}, score {record[f'score_{side}']:g}" for side in sides]
    if tok is not None:
        return groups + _token_groups(["prompt", *titles], pair_tokens(tok, record), ids)
    answers = [
        Card(title, [Span(record[side][-1]["content"])], side)
        for title, side in zip(titles, sides, strict=True)
    ]
    turns = [_turn_card(turn) for turn in record["chosen"][:-1]]
    return [*groups, Group(turns), Group(answers, parallel=True)]


def _turn_card(turn: Mapping[str, str]) -> Card:
    return Card(turn["role"], [Span(turn["content"])])


def documents_of(row: np.ndarray, tok: Tokenizer) -> list[PackedDocument]:
    """The documents of one row (0-d, of `packing.row_dtype`), in their order."""
    documents = []
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segments"] == segment)
        branches = row["branches"][places]
        prefix = places[branches == 0]
        parts = []
        for branch in range(int(branches.max()) + 1):
            own = places[branches == branch]
            # A branch is decoded after its prefix, whose text decides about a leading blank.
            whole = np.concatenate([prefix, own]) if branch else own
            tokens = tokens_of(tok, row["tokens"][whole].tolist(), row["loss_mask"][whole].tolist())
            parts.append(tokens[len(whole) - len(own) :])
        ids = row["pair_ids"]
        pair = int(ids[segment - 1]) if segment <= len(ids) else 0
        documents.append(PackedDocument(parts, pair, int(places[0])))
    return documents


def row_cards(row: np.ndarray, tok: Tokenizer, ids: bool) -> list[Group]:
    """A packed row: cards for each document, then the padding as a number."""
    documents = documents_of(row, tok)
    seq_len, used = len(row["tokens"]), int((row["segments"] > 0).sum())
    title = (
        f"{len(documents)} documents, {used} tokens ({used / seq_len:.1%} of {seq_len} positions), "
        f"{int(row['loss_mask'].sum())} targets"
    )
    groups = [Group([Card(title)])]
    for number, document in enumerate(documents, 1):
        about = f"document {number} from index {document.start}"
        titles = [about]
        if document.id:
            titles = [f"{about}, pair {document.id}, shared prefix"]
            titles += [f"document {number}, {side}" for side in ("chosen", "rejected")]
        groups += _token_groups(titles, document.parts, ids)
    return [*groups, Group([Card(f"padding: {seq_len - used} positions", style="dim")])]


def _token_groups(titles: list[str], parts: list[list[Token]], ids: bool) -> list[Group]:
    """A dialogue, or a prompt and below it two answers side by side; then the ids of each part."""
    cards, tables = [], []
    for number, (title, tokens) in enumerate(zip(titles, parts, strict=True)):
        targets = sum(token.target for token in tokens)
        spans = [_span(token, _STYLES[number]) for token in tokens]
        if number and spans and not tokens[0].target:  # the prompt's last token again, a newline
            spans[0] = spans[0]._replace(text=spans[0].text.replace("\n", "\\n"))
        title = f"{title}: {len(tokens)} tokens, {targets} targets"
        cards.append(Card(title, spans, _STYLES[number] if number else ""))
        tables.append(_ids_card(tokens, len(parts[0]) if number else 0))
    groups = [Group(cards[:1]), Group(cards[1:], parallel=True)]
    return [*groups, Group(tables)] if ids else groups


def _span(token: Token, style: str) -> Span:
    style = style if token.target else "dim"
    return Span(token.text, f"{style} special" if token.special else style)


def _ids_card(tokens: Sequence[Token], first: int) -> Card:
    """A table of tokens: position, id, whether it is a target, its text in one line."""
    spans = [Span(f"{'position':>8} {'id':>7} loss  text", "dim")]
    for at, token in enumerate(tokens, first):
        loss = "yes" if token.target else " - "
        text = token.text.replace("\n", "\\n")
        spans += [Span(f"\n{at:>8} {token.id:>7} {loss}   "), _span(token._replace(text=text), "")]
    return Card("token ids", spans)
