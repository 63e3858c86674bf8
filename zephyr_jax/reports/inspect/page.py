"""One HTML page of what is looked at: the record in colors, and the numbers of its set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from zephyr_jax.reports import html as report_html
from zephyr_jax.reports.data import packed_set, prepared_set
from zephyr_jax.reports.html import escape, percent, table
from zephyr_jax.reports.inspect.spans import Card, cards_html
from zephyr_jax.reports.inspect.statistics import LIMITS, Bin, histogram, summary

_STYLE = """
.card { border: 1px solid var(--line); border-radius: .4rem; background: var(--card);
  padding: .5rem .8rem; margin: .6rem 0; min-width: 0; }
.card h3 { margin: 0 0 .3rem; font-size: .875rem; overflow-wrap: anywhere; }
.pair .card { margin: 0; }
.said { max-width: none; }
figure th, figure td { border: 0; padding-top: .1rem; padding-bottom: .1rem; }
figure td:has(> .bar) { width: 65%; }
.bold { font-weight: 600; }
.dim { color: var(--soft); }
.target, .added { color: var(--right); background: var(--right-back); }
.removed { color: var(--wrong); text-decoration: line-through; }
.trunk { color: var(--heldout); }
.chosen { color: var(--chosen); }
.rejected { color: var(--rejected); }
.underlined { text-decoration: underline; text-underline-offset: .2em; }
.special { font-weight: 700; border-bottom: 2px dotted; }
.control { background: var(--mark); color: var(--ink); border-radius: .2rem; }
"""
_LEGEND = {
    "raw": (("taken away", "removed"), ("added", "added")),
    "set": (("carries loss", "target"), ("no loss", "dim"), ("special token", "special")),
    "packed": (
        ("trunk", "trunk"),
        ("chosen", "chosen"),
        ("rejected", "rejected"),
        ("carries loss", "underlined"),
        ("special token", "special"),
    ),
}


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page that needs nothing but itself, in the style of the demo's report.

    Raises:
      FileNotFoundError: the folder is not there.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--html={path}: there is no folder {path.absolute().parent}")
    report_html.write_page(epath.Path(path), title, body, _STYLE)


def record_section(kind: str, title: str, cards: Sequence[Card]) -> str:
    """The cards of one record or row under a heading, with the meaning of the colors.

    Args:
      kind: `raw`, `set` or `packed`.
      title: the heading.
      cards: as for a terminal.
    """
    legend = " ".join(f'<span class="{name}">{said}</span>' for said, name in _LEGEND[kind])
    legend += ' <span class="control">\\x1b</span> a character that cannot be printed'
    return f'<h1>{escape(title)}</h1><p class="soft">{legend}</p>{cards_html(cards)}'


def figure(title: str, values: Sequence[float], caption: str = "", as_share: bool = False) -> str:
    """A histogram as rows of bars with their counts, and the main numbers below it."""
    if not len(values):
        return ""
    bins = histogram(values)
    most = max(bin.size for bin in bins)
    rows = [
        [_range(bin, as_share), f'<div class="bar" style="width:{100 * bin.size / most:.1f}%">'
         "</div>", f"{bin.size:,}"]
        for bin in bins
    ]  # fmt: skip
    show = percent if as_share else _number
    main = ", ".join(f"{name} {show(value)}" for name, value in summary(values).items())
    said = f"{caption} {main}." if caption else f"{main}."
    return (
        f"<figure><h3>{escape(title)}</h3>{table(['from', '', 'count'], rows, numeric=2)}"
        f"<figcaption>{escape(said)}</figcaption></figure>"
    )


def _range(bin: Bin, as_share: bool) -> str:
    show = percent if as_share else _number
    if bin.low is None:
        return f"below {show(bin.high or 0.0)}"
    return f"{show(bin.low)} or more" if bin.high is None else show(bin.low)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3g}"


def numbers_section(title: str, numbers: Mapping[str, Sequence[float]], unit: str, of: str) -> str:
    """Histograms of the records of one split: lengths, and of pairs the margins of the scores.

    Args:
      title: the split.
      numbers: of `record_numbers`.
      unit: of lengths: `tokens` or `characters`.
      of: which records the numbers are from, in words.
    """
    names = {
        "length": f"Length in {unit}",
        "prompt": f"Prompt, {unit}",
        "chosen": f"Chosen answer, {unit}",
        "rejected": f"Rejected answer, {unit}",
    }
    figures = [figure(said, numbers[key]) for key, said in names.items() if key in numbers]
    margins = numbers.get("margin", ())
    if any(margins):
        below = sum(margin < 0 for margin in margins)
        ties = sum(margin == 0 for margin in margins)
        said = f"{ties:,} ties, {below:,} below 0;"
        figures.append(figure("Score margin, chosen minus rejected", margins, said))
    elif margins:
        figures.append('<p class="soft">No score differs: there are no margins.</p>')
    over = _over_limits(numbers.get("length", ())) if unit == "tokens" else ""
    return (
        f'<h2>{escape(title)}</h2><p class="soft">{escape(of)} records</p>'
        f'<div class="plots">{"".join(figures)}</div>{over}'
    )


def _over_limits(lengths: Sequence[float]) -> str:
    """How many are cut off by rows of the usual lengths."""
    if not lengths:
        return ""
    over = [sum(length > limit for length in lengths) for limit in LIMITS]
    rows = [
        [f"{limit:,} tokens", f"{count:,}", percent(count / len(lengths))]
        for limit, count in zip(LIMITS, over, strict=True)
    ]
    return table(["longer than", "records", "share"], rows, 1, "What rows of a length would cut")


def packed_section(manifest: Mapping[str, Any], numbers: Mapping[str, Any], of: str) -> str:
    """The counts of a packed set, and for one split how full its rows are and what they hold."""
    figures = [
        figure("Fill of the rows", numbers["fill"], as_share=True),
        figure("Documents in a row", numbers["documents"]),
        figure("Length of a document, tokens", numbers["length"]),
        figure("Tokens with loss in a document", numbers["targets"]),
    ]
    return (
        f"<h2>The packed set</h2>{packed_set(dict(manifest))}"
        f'<p class="soft">{escape(of)} rows</p><div class="plots">{"".join(figures)}</div>'
    )


def rules_section(report: dict[str, Any]) -> str:
    """What the rules did to a prepared set: counts by split, with texts before and after."""
    by_split = report.get("rules_by_split", {})
    fates = list(dict.fromkeys(fate for counts in by_split.values() for fate in counts))
    rows = [
        [escape(rule), *(f"{counts.get(fate, 0):,}" for fate in fates)]
        for rule, counts in by_split.items()
    ]
    head = ["kept records by rule", *map(escape, fates)]
    return f"<h2>How the set was made</h2>{prepared_set(report, 'rule')}" + (
        table(head, rows, 1, "Where the records went that a rule had a say in") if rows else ""
    )
