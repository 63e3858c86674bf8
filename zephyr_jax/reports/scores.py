"""The body of a page about a scored set: its numbers, their intervals, and distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zephyr_jax.evaluation.bootstrap import Interval
from zephyr_jax.evaluation.scoring import EDGES, Scored
from zephyr_jax.evaluation.summary import OF_SOURCES, Numbers, answer_table, shown
from zephyr_jax.reports.html import escape, table, tile
from zephyr_jax.reports.pair_plots import reward_plots, spread
from zephyr_jax.reports.plots import Bars, Histogram, figures

_HEADLINES = {
    "perplexity": "perplexity",
    "nll": "nats per token",
    "rewards/accuracies": "reward accuracy",
    "logps/accuracies": "log-likelihood accuracy",
    "rewards/margins": "reward margin",
    "kl_per_token": "KL, nats per token",
}


def page_body(
    title: str, facts: Sequence[tuple[str, Any]], found: Numbers, scored: Scored, beta: float
) -> str:
    """The body in HTML.

    Args:
        title: the heading.
        facts: what was scored by what, as (name, value).
        found: its numbers.
        scored: what they are made of.
        beta: of the rewards.
    """
    tiles = "".join(
        tile(
            label, [("{1} to {2}".format(*map(shown, found.all[name])), shown(found.all[name][0]))]
        )
        for name, label in _HEADLINES.items()
        if name in found.all
    )
    said = [[escape(name), escape(_in_words(value))] for name, value in facts]
    parts = [
        f'<h1>{escape(title)}</h1><div class="tiles">{tiles}</div><h2>Distributions</h2>',
        f"{figures(_plots(scored, beta))}<h2>Numbers, with 95% intervals</h2>",
        table(["", "value", "low", "high"], _rows(found.all), 1),
        f"<h2>By source</h2>{_sources(found)}" if found.sources else "",
        f"<h2>What was scored</h2>{table(['', ''], said, 2)}",
    ]
    return "".join(parts)


def _sources(found: Numbers) -> str:
    """The main numbers of each source in a row."""
    names = [name for name in OF_SOURCES if name in found.all]
    rows = [
        [
            escape(source),
            f"{found.source_counts[source]:,}",
            *("{} ({} to {})".format(*map(shown, own[name])) for name in names),
        ]
        for source, own in found.sources.items()
    ]
    return table(["", "number", *map(escape, names)], rows, 1)


def _in_words(value: Any) -> str:
    """A setting as text: lists and tables without their brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(x)}" for name, x in value.items())
    return "; ".join(map(_in_words, value)) if isinstance(value, list) else str(value)


def _rows(found: dict[str, Interval]) -> list[list[str]]:
    return [[escape(name), *map(shown, interval)] for name, interval in found.items()]


def _plots(scored: Scored, beta: float) -> list[Histogram]:
    per_token = "nats per token"
    if not scored.tokens[:, 1:].any():
        means = -scored.logps[:, 0] / scored.tokens[:, 0]
        return [
            _token_plot([Bars("tokens", scored.histogram[0].tolist(), "heldout")]),
            spread("dialogues", "Dialogues by their mean", per_token, "dialogues", dialogue=means),
        ]
    table_ = answer_table(scored, beta)
    sides = [
        Bars(name, scored.histogram[i].tolist(), name)
        for i, name in ((1, "chosen"), (2, "rejected"))
    ]
    if scored.ref_logps is None:
        margins = table_.logps[:, 0] - table_.logps[:, 1]
        margin = "Log-likelihood, chosen minus rejected", "nats"
        return [_token_plot(sides), spread("margins", *margin, "pairs", margin=margins)]
    return [*reward_plots(table_, beta), _token_plot(sides)]


def _token_plot(bars: list[Bars]) -> Histogram:
    beyond = sum(b.counts[-1] for b in bars) / max(1.0, sum(sum(b.counts) for b in bars))
    caption = f"The last bin also holds what lies beyond ({100 * beyond:.2f}% of the tokens)."
    title = "What the target tokens cost"
    return Histogram("tokens", title, "nats", "tokens", EDGES.tolist(), bars, caption)
