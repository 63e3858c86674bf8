"""Styled text, and its three faces: plain, ANSI colors for a terminal, HTML.

A span holds text as it is in the data. Every face shows control characters as escapes, so that
nothing in a dialogue can move a cursor, reverse the direction of reading or become markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TextIO

# A span's style is names of these, with blanks between; in HTML they are the span's classes.
_ANSI = {
    "bold": "1",
    "dim": "2",
    "target": "32",
    "added": "32",
    "removed": "9;31",
    "trunk": "36",
    "chosen": "34",
    "rejected": "33",
    "underlined": "4",
    "special": "35",
    "control": "7",
}
# Red and green are one color to many eyes, and a pipe has none: a terminal shows these too.
_MARKS = {"removed": ("[-", "-]"), "added": ("{+", "+}")}
_CODES = re.compile("\x1b\\[[0-9;]*m")


class Span(NamedTuple):
    """A piece of text from the data, and the names of its styles."""

    text: str
    style: str = ""


class Card(NamedTuple):
    """A framed text with a title; neighbors with `beside` stand side by side where there is room.

    `style` colors the title. A card without spans is a line that only says its title.
    """

    title: str
    spans: Sequence[Span] = ()
    style: str = "bold"
    beside: bool = False


def visible(text: str) -> Iterable[tuple[str, bool]]:
    r"""The text in pieces, with whether a piece stands for characters that cannot be printed.

    A newline stays. Blanks that look like others, marks of direction and halves of surrogate pairs
    are shown as escapes too.

    >>> list(visible("a\x1b[2J\u202e\tb\n"))
    [('a', False), ('\\x1b', True), ('[2J', False), ('\\u202e\\t', True), ('b\n', False)]
    """
    shown, hidden = "", False
    for character in text:
        odd = not (character.isprintable() or character == "\n")
        if shown and odd != hidden:
            yield shown, hidden
            shown = ""
        shown += character.encode("unicode_escape").decode() if odd else character
        hidden = odd
    if shown:
        yield shown, hidden


def merged(spans: Iterable[Span]) -> list[Span]:
    """The spans with neighbors of one style joined and empty ones left out."""
    out: list[Span] = []
    for span in spans:
        if out and out[-1].style == span.style:
            out[-1] = Span(out[-1].text + span.text, span.style)
        elif span.text:
            out.append(span)
    return out


def plain(spans: Iterable[Span]) -> str:
    """The spans for a terminal without colors."""
    return "".join(text for span in _marked(spans) for text, _ in visible(span.text))


def to_ansi(spans: Iterable[Span]) -> str:
    """The spans for a terminal with colors; no style goes on across a newline."""
    out = ""
    for span in _marked(spans):
        for text, hidden in visible(span.text):
            codes = ";".join(_ANSI[name] for name in _names(span.style, hidden))
            for line in re.split("(\n)", text):
                out += f"\x1b[{codes}m{line}\x1b[0m" if codes and line.strip("\n") else line
    return out


def without_colors(text: str) -> str:
    """The text without the codes that `to_ansi` put there."""
    return _CODES.sub("", text)


def to_html(spans: Iterable[Span]) -> str:
    """The spans as escaped HTML, for an element that keeps white space."""
    out = ""
    for span in merged(spans):
        for text, hidden in visible(span.text):
            names = " ".join(_names(span.style, hidden))
            escaped = html.escape(text)
            out += f'<span class="{names}">{escaped}</span>' if names else escaped
    return out


def _marked(spans: Iterable[Span]) -> Iterable[Span]:
    """The spans, joined, with marks around what was removed and added."""
    for text, style in merged(spans):
        before, after = _MARKS.get(style, ("", ""))
        yield Span(f"{before}{text}{after}", style)


def _names(style: str, hidden: bool) -> list[str]:
    return style.split() + ["control"] * hidden


def cards_text(cards: Iterable[Card], colors: bool) -> str:
    """The cards one after another for a terminal, each framed; ends with a newline."""
    show = to_ansi if colors else plain
    edge = show([Span("│ ", "dim")])
    out = ""
    for card in cards:
        title = show([Span(card.title.replace("\n", " "), card.style)])
        if not card.spans:
            out += f"{title}\n"
            continue
        lines = show(card.spans).removesuffix("\n").split("\n")
        body = "".join(f"{edge}{line}\n" for line in lines)
        out += f"{show([Span('┌ ', 'dim')])}{title}\n{body}{show([Span('└', 'dim')])}\n"
    return out


def cards_html(cards: Sequence[Card]) -> str:
    """The cards as HTML; every run of those that stand beside each other in one grid."""
    out, open_grid = "", False
    for card in cards:
        if card.beside != open_grid:
            out += '<div class="pair">' if card.beside else "</div>"
            open_grid = card.beside
        title = to_html([Span(card.title, card.style)])
        if card.spans:
            out += f'<div class="card"><h3>{title}</h3><p class="said">{to_html(card.spans)}</p>'
            out += "</div>"
        else:
            out += f"<p>{title}</p>"
    return out + "</div>" * open_grid


def wants_colors(when: str, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether a stream gets colors: `always`, `never`, or `auto`.

    `auto` is a terminal that can, unless NO_COLOR is set to anything (no-color.org).
    """
    if when != "auto":
        return when == "always"
    dumb = environment.get("TERM") == "dumb"
    return stream.isatty() and not environment.get("NO_COLOR") and not dumb


def writable(text: str, encoding: str | None) -> str:
    """The text with what the encoding lacks as escapes."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
