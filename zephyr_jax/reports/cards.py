"""Texts with marked parts as framed cards, which a page or a terminal shows."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.text import Text

_STYLES = {
    "dim": "dim",
    "bold": "bold",
    "target": "green",
    "added": "green",
    "removed": "red strike",
    "chosen": "blue",
    "rejected": "yellow",
    "special": "bold magenta",
}
# Red and green are one color to many eyes, and a pipe has none: a terminal shows these too.
_MARKS = {"removed": ("[-", "-]"), "added": ("{+", "+}")}


class Span(NamedTuple):
    """A part of a text, and the names of its styles with blanks between."""

    text: str
    style: str = ""


class Card(NamedTuple):
    """A framed text with a title, which `style` colors; without spans only the title."""

    title: str
    spans: Sequence[Span] = ()
    style: str = ""


class Group(NamedTuple):
    """Cards one below the other, or side by side where there is room."""

    cards: Sequence[Card]
    parallel: bool = False


def visible(text: str) -> Iterator[tuple[str, bool]]:
    r"""Yields the text in parts, with whether a part stands for unprintable characters.

    Newlines stay. Control characters, marks of direction, unusual blanks and lone surrogates
    become escapes, so that nothing in a text can move a cursor or reverse the order of reading.

    >>> list(visible("a\x1b[2J\u202e\tb\n"))
    [('a', False), ('\\x1b', True), ('[2J', False), ('\\u202e\\t', True), ('b\n', False)]
    """
    for hidden, run in itertools.groupby(text, lambda c: not (c.isprintable() or c == "\n")):
        part = "".join(run)
        yield (part.encode("unicode_escape").decode() if hidden else part), hidden


def diff_spans(before: str, after: str) -> list[Span]:
    """Both texts in one, word by word: styles `removed` and `added`, none for what is common."""
    old, new = (re.findall(r"\S+\s*|\s+", text) for text in (before, after))
    spans = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if tag == "equal":
            spans.append(Span("".join(old[a:b])))
        else:
            spans += [Span("".join(old[a:b]), "removed"), Span("".join(new[c:d]), "added")]
    return [span for span in spans if span.text]


def print_cards(groups: Iterable[Group], stream: TextIO, color: bool = False) -> None:
    """Prints the cards one below the other, each framed, without wrapping.

    Colors are for terminals that NO_COLOR and TERM allow them, and for any stream with `color`.
    """
    forced: dict[str, Any] = {"force_terminal": True, "no_color": False}
    forced = forced | {"color_system": "standard"} if color else {}
    console = Console(file=stream, soft_wrap=True, highlight=False, **forced)
    for group in groups:
        for card in group.cards:
            title = _styled([Span(card.title.replace("\n", " "), f"bold {card.style}")])
            if not card.spans:
                console.print(title)
                continue
            console.print(Text.assemble(("┌ ", "dim"), title))
            for line in _styled(card.spans).split("\n"):
                console.print(Text.assemble(("│ ", "dim"), line))
            console.print(Text("└", "dim"))


def _styled(spans: Sequence[Span]) -> Text:
    text = Text()
    for span in spans:
        before, after = _MARKS.get(span.style, ("", ""))
        style = " ".join(_STYLES[name] for name in span.style.split())
        for part, hidden in visible(f"{before}{span.text}{after}"):
            text.append(part, f"{style} reverse" if hidden else style)
    return text
