"""Rows of a packed set: their documents, and the branches of those that are pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.inspect.spans import Card, Span
from zephyr_jax.reports.inspect.tokens import Token, ids_card, tokens_of

BRANCHES = ("trunk", "chosen", "rejected")


class Packed(NamedTuple):
    """One document of a row: the tokens of its trunk and its branches, and the pair's id.

    A dialogue is a trunk alone, and its id is 0. The first token of a branch repeats the prompt's
    last one.
    """

    parts: dict[str, list[Token]]
    id: int
    start: int

    @property
    def length(self) -> int:
        """Tokens of all parts."""
        return sum(map(len, self.parts.values()))


def documents_of(row: np.ndarray, tok: Tokenizer) -> list[Packed]:
    """The documents of one row (0-d, of `packing.row_dtype`), in their order."""
    documents = []
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segments"] == segment)
        branches = row["branches"][places]
        trunk = places[branches == 0]
        parts = {}
        for code, name in enumerate(BRANCHES):
            here = places[branches == code]
            # A branch is decoded behind its trunk, whose text decides about a leading blank.
            whole = here if code == 0 else np.concatenate([trunk, here])
            tokens = tokens_of(tok, row["tokens"][whole].tolist(), row["loss_mask"][whole].tolist())
            if len(here):
                parts[name] = tokens[len(whole) - len(here) :]
        ids = row["pair_ids"]
        pair = int(ids[segment - 1]) if segment <= len(ids) else 0
        documents.append(Packed(parts, pair, int(places[0])))
    return documents


def row_cards(row: np.ndarray, tok: Tokenizer, ids: bool) -> list[Card]:
    """A packed row for a reader: a card for each document, then the padding as a number.

    Targets are underlined; trunk, chosen and rejected have colors of their own.
    """
    documents = documents_of(row, tok)
    seq_len = len(row["tokens"])
    used = int((row["segments"] > 0).sum())
    loss = int(row["loss_mask"].sum())
    said = f"{len(documents)} document{'s' * (len(documents) != 1)}, {used} tokens"
    cards = [Card(f"{said} ({used / seq_len:.1%} of {seq_len} places), {loss} with loss")]
    for number, document in enumerate(documents, 1):
        cards += _document_cards(number, document, ids)
    return [*cards, Card(f"padding: {seq_len - used} places", style="dim")]


def _document_cards(number: int, document: Packed, ids: bool) -> list[Card]:
    parts = document.parts
    loss = sum(token.target for tokens in parts.values() for token in tokens)
    about = (
        f"document {number}: {document.length} tokens from place {document.start}, {loss} with loss"
    )
    if document.id:
        about += f", pair {document.id}"
    if set(parts) == {"trunk"}:
        cards = [Card(about, _spans(parts["trunk"], ""))]
        return [*cards, ids_card(parts["trunk"])] if ids else cards
    trunk = parts.get("trunk", [])
    cards = [Card(about, _spans(trunk, "trunk") or [Span("(the trunk is empty)", "dim")])]
    tables = [ids_card(trunk)] if ids and trunk else []
    for side in BRANCHES[1:]:
        tokens = parts.get(side, [])
        title = f"document {number}, {side}: {len(tokens)} tokens with the prompt's last one again"
        again = [Span(token.text.replace("\n", "\\n"), "control") for token in tokens[:1]]
        spans = again + _spans(tokens[1:], side)
        cards.append(Card(title, spans, f"bold {side}", beside=True))
        tables += [ids_card(tokens, len(trunk))] if ids else []
    return cards + tables


def _spans(tokens: list[Token], color: str) -> list[Span]:
    style = f"{color} underlined".strip()
    return [token.span(style, color or "dim") for token in tokens]
