"""Pieces of HTML that the report is put together from; whatever comes from data is escaped here."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from zephyr_jax.storage import write_atomic

LONGEST = 400  # characters of one piece of data on the page


def missing(why: str) -> str:
    """What stands where something is not there."""
    return f'<p class="missing">{escape(why)}</p>'


def write_page(path: epath.Path, title: str, body: str, style: str = "") -> None:
    """Writes a page that needs nothing but itself; it appears under its name when it is whole.

    Args:
        path: of the page; its folder may be missing.
        title: of the window, as plain text.
        body: HTML.
        style: CSS beside that of all pages.
    """
    template = Path(__file__).with_name("report_page.html").read_text("utf-8")
    template = template.replace("</style>", f"{style}</style>", 1)
    page = string.Template(template).substitute(title=escape(title), body=body)
    write_atomic(path, page)


def tile(title: str, numbers: Sequence[tuple[str, str]], wide: bool = False) -> str:
    """A headline box of (label, number) pairs, or of the words that nothing is there yet."""
    pairs = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in numbers
    )
    inside = f"<dl>{pairs}</dl>" if pairs else MISSING
    return f'<div class="tile{" wide" * wide}"><h3>{escape(title)}</h3>{inside}</div>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: int,
    caption: str = "",
    total: bool = False,
    wraps: bool = False,
) -> str:
    """A table of escaped cells; numbers from column `numeric` on, a sum last if `total`.

    What is wider than the page scrolls, unless it `wraps`: then words break anywhere.
    """

    def cells(row: Sequence[str], first: str, rest: str) -> str:
        out = f"<{first}>{row[0]}</{first.split()[0]}>"
        for i, cell in enumerate(row[1:], 1):
            out += f"<{rest}{' class=n' * (i >= numeric)}>{cell}</{rest}>"
        return out

    lines = [f"<tr>{cells(row, 'th scope=row', 'td')}</tr>" for row in rows]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{cells(head, 'th', 'th')}</tr></thead>"
    return (
        f'<div class="{"wraps" if wraps else "scroll"}"><table>{above}{top}'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def lines_block(lines: Iterable[str]) -> str:
    """Lines as they are, in a block that scrolls."""
    return f"<pre>{chr(10).join(map(escape, lines))}</pre>"


def escape(value: Any) -> str:
    """Data as HTML text: cut where it is very long, unprintable characters made visible."""
    text = str(value)
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in text[:LONGEST]
    )
    return html.escape(shown) + "…" * (len(text) > LONGEST)


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


MISSING = missing("not run yet")
