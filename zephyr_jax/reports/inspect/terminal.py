"""Cards in a terminal: colors by `rich`, marks around changes where there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from zephyr_jax.reports.html import Group, Span, visible

_STYLES = {
    "dim": "dim",
    "bold": "bold",
    "target": "green",
    "added": "green",
    "removed": "red strike",
    "chosen": "blue",
    "rejected": "yellow",
    "special": "bold magenta",
    "control": "reverse",
}
# Red and green are one color to many eyes, and a pipe has none: a terminal shows these too.
_MARKS = {"removed": ("[-", "-]"), "added": ("{+", "+}")}


def make_console(color: str, stream: TextIO) -> Console:
    """A console without wrapping; `color` is always, never or auto (NO_COLOR and TERM decide)."""
    if color == "auto":
        return Console(file=stream, soft_wrap=True, highlight=False)
    system = "standard" if color == "always" else None
    return Console(
        file=stream,
        soft_wrap=True,
        highlight=False,
        force_terminal=color == "always",
        color_system=system,
        no_color=color == "never",
    )


def print_cards(groups: Iterable[Group], console: Console) -> None:
    """Prints the cards one below the other, each framed."""
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
        for part, hidden in visible(f"{before}{span.text}{after}"):
            styles = [_STYLES[name] for name in span.style.split()]
            if hidden:
                styles.append(_STYLES["control"])
            text.append(part, " ".join(styles))
    return text
