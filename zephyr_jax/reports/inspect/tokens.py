"""Records of a prepared set: their texts, and as tokens with the mask of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import PairIds, render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.inspect.spans import Card, Span

# The project's own rendering; published recipes that differ are looked at by `packed`.
OPTIONS = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}


class Token(NamedTuple):
    """One token: its id, its text ("" where a character goes on), whether it carries loss."""

    id: int
    text: str
    target: bool
    special: bool

    def span(self, style: str, plain_style: str) -> Span:
        """The token in `style` where it carries loss, else in `plain_style`."""
        shown = style if self.target else plain_style
        return Span(self.text, f"{shown} special".strip() if self.special else shown)


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


def chat_ids(tok: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a dialogue as it is trained on, before it is cut to a row."""
    return render_chat(tok, messages, **OPTIONS)[0]


def pair_ids(tok: Tokenizer, record: Row) -> PairIds:
    """The ids of a pair's prompt and answers, before they are cut."""
    chosen, rejected = record["chosen"], record["rejected"]
    said = (turns[-1]["content"] for turns in (chosen, rejected))
    return render_pair(tok, chosen[:-1], *said, **OPTIONS)


def pair_tokens(tok: Tokenizer, record: Row) -> tuple[list[Token], list[Token], list[Token]]:
    """The tokens of a pair's prompt, its chosen and its rejected answer; answers carry loss."""
    prompt, *answers = pair_ids(tok, record)
    n = len(prompt)
    both = [tokens_of(tok, prompt + ids, [0] * n + [1] * len(ids)) for ids in answers]
    return both[0][:n], both[0][n:], both[1][n:]


def record_cards(record: Row, tok: Tokenizer | None, ids: bool) -> list[Card]:
    """A record of a set for a reader: its turns, or its tokens where there is a tokenizer.

    Args:
      record: of dialogues or of pairs.
      tok: renders the chat; tokens with loss are green, others dim.
      ids: a table of the tokens too.
    """
    about = [Card(f"prompt_id {record['prompt_id']}", style="dim")]
    if "messages" in record:
        if tok is None:
            return about + [_turn_card(turn, "") for turn in record["messages"]]
        return about + _token_cards("dialogue", chat_tokens(tok, record["messages"]), ids)
    if record.get("source"):
        about.append(Card(f"source {record['source']}", style="dim"))
    heads = {side: f"{side}, score {record[f'score_{side}']:g}" for side in ("chosen", "rejected")}
    if tok is None:
        cards = [_turn_card(turn, "") for turn in record["chosen"][:-1]]
        return (
            about
            + cards
            + [
                Card(head, [Span(record[side][-1]["content"])], f"bold {side}", beside=True)
                for side, head in heads.items()
            ]
        )
    prompt, *answers = pair_tokens(tok, record)
    cards = _token_cards("prompt", prompt, ids)
    tables = []
    for tokens, (side, head) in zip(answers, heads.items(), strict=True):
        card, *table = _token_cards(head, tokens, ids, side, first=len(prompt))
        cards.append(card._replace(beside=True))
        tables += table
    return about + cards + tables


def _turn_card(turn: Mapping[str, str], side: str) -> Card:
    return Card(turn["role"], [Span(turn["content"])], f"bold {side}".strip())


def _token_cards(
    title: str, tokens: Sequence[Token], ids: bool, side: str = "", first: int = 0
) -> list[Card]:
    """The text with its mask in color and, on request, the table of its tokens."""
    loss = sum(token.target for token in tokens)
    spans = [token.span("target", "dim") for token in tokens]
    title = f"{title}: {len(tokens)} tokens, {loss} with loss"
    cards = [Card(title, spans, f"bold {side}".strip())]
    return [*cards, ids_card(tokens, first)] if ids else cards


def ids_card(tokens: Sequence[Token], first: int = 0) -> Card:
    """A table of tokens: position, id, whether it carries loss, its text in one line."""
    spans = [Span(f"{'position':>8} {'id':>7} loss  text\n", "dim")]
    for at, token in enumerate(tokens, first):
        loss = "yes " if token.target else "  - "
        row = token._replace(text=token.text.replace("\n", "\\n"))
        spans += [Span(f"{at:>8} {token.id:>7} {loss}  "), row.span("target", "dim"), Span("\n")]
    return Card("token ids", spans)
