"""Self-contained HTML pages, rendered by `page.html`, and cards, which a terminal can show too."""

from __future__ import annotations

import base64
import difflib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jinja2
from etils import epath
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from zephyr_jax.reports import plots
from zephyr_jax.reports.plots import Histogram, Plot
from zephyr_jax.storage import write_atomic

LONGEST = 400  # characters of one text from the data in a report
_STYLES = {  # of spans, in a terminal
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


class Page:
    """A page under construction: every method adds a block below the earlier ones."""

    def __init__(self, title: str = ""):
        self.title = title
        self.blocks: list[dict[str, Any]] = []

    def _add(self, kind: str, **content: Any) -> None:
        self.blocks.append({"kind": kind} | content)

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 3 is inside a section."""
        self._add("heading", text=text, level=level)

    def text(self, text: str, style: str = "") -> None:
        """A paragraph; its style is "", "soft", "missing", "warning" or "code", which scrolls."""
        self._add("text", text=text, style=style)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values in small print, as below the title; a path to a page is a link."""
        self._add("facts", facts=facts)

    def tiles(self, tiles: Mapping[str, Mapping[str, str]]) -> None:
        """Headline boxes side by side: title -> label -> number."""
        self._add("tiles", tiles=tiles)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        numeric: int,
        caption: str = "",
        total: bool = False,
    ) -> None:
        """A table; columns from `numeric` on are aligned as numbers, `total` marks a sum below."""
        self._add("table", head=head, rows=rows, numeric=numeric, caption=caption, total=total)

    def figures(self, plots: Sequence[Plot | Histogram]) -> None:
        """Plots with their titles and captions, side by side where there is room."""
        self._add("figures", plots=plots)

    def cards(self, cards: Sequence[Card], parallel: bool = False) -> None:
        """Cards one below the other, or side by side where there is room."""
        self._add("cards", cards=cards, parallel=parallel)

    def details(self, summary: str) -> Page:
        """A part that is folded under a summary; its blocks are added to what is returned."""
        inner = Page()
        self._add("details", summary=summary, blocks=inner.blocks)
        return inner

    def write(self, path: epath.Path) -> epath.Path:
        """Writes the page, which appears when it is complete; returns its path."""
        return write_atomic(path, _template().render(title=self.title, blocks=self.blocks))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda x: x if isinstance(x, Markup) else "".join(y for y, _ in visible(str(x))),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "visible": visible,
        "svg": lambda plot: Markup(plots.render(plot)),  # plots escape their own text
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    return environment.get_template("page.html")


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
    """Prints the cards one below the other, framed; with `color` in color whatever the stream."""
    forced: dict[str, Any] = {"force_terminal": True, "no_color": False} if color else {}
    console = Console(file=stream, soft_wrap=True, highlight=False, **forced)
    for card in itertools.chain.from_iterable(group.cards for group in groups):
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


def cut(text: str) -> str:
    """A text from the data, at most `LONGEST` characters of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def percent(share: float) -> str:
    """A share as "97.2%"."""
    return f"{round(100 * share, 1):g}%"


def duration(seconds: float) -> str:
    """Seconds as "9.4 s", "4 min 5 s" or "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
