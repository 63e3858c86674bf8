"""Self-contained HTML pages, rendered by `page.html`, which escapes all text."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from zephyr_jax.reports import plots
from zephyr_jax.reports.cards import Card, visible
from zephyr_jax.reports.plots import Histogram, Plot
from zephyr_jax.storage import write_atomic

LONGEST = 400  # characters of one text from the data in a report


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
        """A paragraph; its style is "", "soft", "missing" or "warning"."""
        self._add("text", text=text, style=style)

    def code(self, text: str) -> None:
        """Lines as they are, in a block that scrolls."""
        self._add("code", text=text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and values in small print, as below the title."""
        self._add("facts", facts=facts)

    def links(self, links: Mapping[str, str]) -> None:
        """Links to files in folders next to the page: words -> relative path."""
        self._add("links", links=links)

    def tiles(self, tiles: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Headline boxes side by side: title -> (label, number) pairs."""
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
        wraps = numeric >= len(head)  # words; numbers scroll
        content = {"head": head, "rows": rows, "numeric": numeric, "caption": caption}
        self._add("table", **content, total=total, wraps=wraps)

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

    def write(self, path: epath.Path) -> None:
        """Writes the page; the file appears when it is complete."""
        template = _environment().get_template("page.html")
        write_atomic(path, template.render(title=self.title, blocks=self.blocks))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "visible": visible,
        "svg": lambda plot: Markup(plots.render(plot)),  # plots escape their own text
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    return environment


def _printable(value: Any) -> Any:
    """What jinja is about to write, with unprintable characters as escapes."""
    if isinstance(value, Markup):
        return value
    return "".join(text for text, _ in visible(str(value)))


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
