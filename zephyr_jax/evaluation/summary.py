"""The numbers of a scored set, with their bootstrap intervals.

docs/evaluation.md defines every name.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.evaluation.bootstrap import Interval, Ratio, intervals, mean_of
from zephyr_jax.evaluation.documents import ScoreSet
from zephyr_jax.evaluation.pairs import PairTable, pair_columns
from zephyr_jax.evaluation.scoring import Scored
from zephyr_jax.losses.pairs import implicit_rewards

# The main numbers, shown for each source.
OF_SOURCES = ("perplexity", "logps/accuracies", "rewards/accuracies", "rewards/margins")
_WITHOUT_REFERENCE = ("logps/", "lengths/")  # of `pair_columns`


class Resampling(NamedTuple):
    """How intervals are drawn."""

    samples: int
    seed: int


class Metrics(NamedTuple):
    """The numbers of a set, and of each source in it where there are several."""

    all: dict[str, Interval]
    sources: dict[str, dict[str, Interval]]  # the largest source first
    counts: dict[str, int]
    source_counts: dict[str, int]


def answer_table(scored: Scored, beta: float) -> PairTable:
    """The scored pairs as training tabulates them; the loss is DPO's, 0 without a reference."""
    logps, tokens = scored.logps[:, 1:], scored.tokens[:, 1:]
    ref_logps, losses = np.zeros_like(logps), np.zeros(len(logps))
    if scored.ref_logps is not None:
        ref_logps = scored.ref_logps[:, 1:]
        rewards = implicit_rewards(logps, ref_logps, beta)
        losses = np.logaddexp(0.0, rewards[:, 1] - rewards[:, 0])
    return PairTable(np.arange(1, len(logps) + 1), losses, logps, ref_logps, tokens)


def summarize(scored: Scored, documents: ScoreSet, beta: float, resampling: Resampling) -> Metrics:
    """All numbers of a scored set.

    Dialogues are resampled one by one, pairs with all that share their prompt.

    Args:
        scored: what `scoring.score` returned.
        documents: what was scored.
        beta: of the implicit rewards.
        resampling: how the intervals are drawn.
    """
    ratios = _pair_ratios(scored, beta) if documents.pairs else _dialogue_ratios(scored)

    def of(mask: np.ndarray) -> dict[str, Interval]:
        part = {name: Ratio(x.above[mask], x.below[mask]) for name, x in ratios.items()}
        samples, seed = resampling
        return _with_perplexities(
            intervals(part, documents.prompts[mask], samples=samples, seed=seed)
        )

    names = np.where(documents.sources == "", "unknown", documents.sources)
    unique, sizes = np.unique(names, return_counts=True)
    order = unique[np.argsort(-sizes, kind="stable")] if len(unique) > 1 else []
    unit = "pairs" if documents.pairs else "dialogues"
    counts = {unit: len(names), "target_tokens": int(scored.tokens.sum())}
    if documents.pairs:
        counts["prompts"] = len(np.unique(documents.prompts))
    return Metrics(
        of(np.ones(len(names), bool)),
        {str(name): of(names == name) for name in order},
        counts,
        {str(name): int((names == name).sum()) for name in order},
    )


def _dialogue_ratios(scored: Scored) -> dict[str, Ratio]:
    nll, tokens = -scored.logps[:, 0], scored.tokens[:, 0]
    return {"nll": Ratio(nll, tokens), "nll/per_dialogue": mean_of(nll / tokens)}


def _pair_ratios(scored: Scored, beta: float) -> dict[str, Ratio]:
    table = answer_table(scored, beta)
    columns = pair_columns(table, beta)
    if scored.ref_logps is None:
        columns = {k: x for k, x in columns.items() if k.startswith(_WITHOUT_REFERENCE)}
    each = table.logps / table.tokens
    columns |= {
        "logps/ties": table.logps[:, 0] == table.logps[:, 1],
        "logps/accuracies_per_token": each[:, 0] > each[:, 1],
        "logps/ties_per_token": each[:, 0] == each[:, 1],
    }
    ratios = {name: mean_of(column) for name, column in columns.items()}
    for i, answer in enumerate(("chosen", "rejected")):
        ratios[f"nll/{answer}"] = Ratio(-table.logps[:, i], table.tokens[:, i])
    if scored.kl is not None:
        kl = scored.kl[:, 1:]
        ratios["kl_per_token"] = Ratio(kl.sum(axis=1), table.tokens.sum(axis=1))
        for i, answer in enumerate(("chosen", "rejected")):
            ratios[f"kl_per_token/{answer}"] = Ratio(kl[:, i], table.tokens[:, i])
    return ratios


def _with_perplexities(metrics: dict[str, Interval]) -> dict[str, Interval]:
    """The same, and of each `nll` its exponential; a percentile interval's ends go with it."""
    out: dict[str, Interval] = {}
    for name, interval in metrics.items():
        out[name] = interval
        if name.startswith("nll"):
            out[name.replace("nll", "perplexity")] = Interval(*(_exp(x) for x in interval))
    return out


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # of a model that is lost; above lies infinity


def as_json(metrics: dict[str, Interval]) -> dict[str, Any]:
    """Intervals as plain dicts."""
    return {name: interval._asdict() for name, interval in metrics.items()}


def result_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` in columns, for a terminal."""
    counts = ", ".join(f"{count:,} {name}" for name, count in result["counts"].items())
    sets = ", ".join(f"{part['name']} {part['split']}" for part in result["sets"])
    chat = ", ".join(f"{name} {value}" for name, value in result["chat"].items())
    lines = [
        f"{result['model']} on {sets}: {counts}",
        f"chat settings of {result['chat_of']}: {chat}",
        _columns(result["numbers"]),
    ]
    sources = result["sources"]
    for name in (x for x in OF_SOURCES if sources and x in result["numbers"]):
        rows = {
            f"{source} ({own['documents']})": own["numbers"][name]
            for source, own in sources.items()
        }
        lines.append(f"{name} by source\n{_columns(rows)}")
    return "\n\n".join(lines)


def _columns(rows: dict[str, dict[str, float]]) -> str:
    wide = max(map(len, rows))
    lines = [f"{'':<{wide}}  {'value':>10}  95% interval"]
    for name, interval in rows.items():
        value, low, high = (shown(interval[part]) for part in Interval._fields)
        lines.append(f"{name:<{wide}}  {value:>10}  {low} to {high}")
    return "\n".join(lines)


def shown(value: float) -> str:
    """A number with four decimals; fewer where it is large, more where it is small."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 0.01:
        return f"{value:.3g}"
    return f"{value:.2f}" if size >= 100 else f"{value:.4f}"
