"""The numbers of a model on prepared sets, with intervals; docs/evaluation.md defines them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zephyr_jax.config.run import DpoConfig
from zephyr_jax.data.packing.documents import Rendering
from zephyr_jax.data.packing.packing import round_up
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.pairs import PairTable, masks_of, pair_columns
from zephyr_jax.losses.pairs import compared, implicit_rewards
from zephyr_jax.sharding import BATCH, axis_size
from zephyr_jax.weights.checkpoint import params_digest
from zephyr_jax.weights.sources import load_in

# The main numbers, shown for each source and in tables of results.
MAIN = ("perplexity", "logps/accuracies", "rewards/accuracies", "rewards/margins")
_WITHOUT_REFERENCE = ("logps/", "lengths/")  # of `pair_columns`

Metrics = dict[str, dict[str, float]]  # name -> value, and the ends low and high of its interval


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The numbers by the flags of `evaluate sets` as a table and, with all settings, as dicts."""
    sets = scoring.select_records(args.data_dir, args.dataset, args.split, args.limit or 0)
    pairs = "chosen" in sets[0].records[0]
    for name in ("reference", "max_prompt_length", "beta"):
        value = getattr(args, name)
        if value is not None and not pairs:
            raise ValueError(f"--{name}={value} is for pairs; {args.dataset} has dialogues")
    if args.beta is not None and args.reference is None:
        raise ValueError(f"--beta={args.beta} scales implicit rewards; give --reference too")
    sources = [args.model] if args.reference is None else [args.model, args.reference]
    models = [load_in(source, args.dtype) for source in sources]
    if len(models) > 1:
        some = [sets[0].records[i]["chosen"] for i in range(min(20, len(sets[0].records)))]
        texts = [turn["content"] for turns in some for turn in turns]
        scoring.check_same_vocabulary(f"--reference={sources[1]}", models, texts)
    model, beta = models[0], 0.1 if args.beta is None else args.beta
    chat, chat_of = scoring.chat_of(model)
    most = min(args.seq_len, *(each.cfg.max_position_embeddings for each in models))
    lengths = {"max_length": args.max_length or min(most, args.seq_len // (2 if pairs else 1))}
    lengths["max_prompt_length"] = args.max_prompt_length or lengths["max_length"] // 2
    if lengths["max_length"] > most:
        rule = f"the lesser of --seq_len={args.seq_len} and the model's positions"
        raise ValueError(f"--max_length={args.max_length} is over {most}, {rule}")
    if pairs:  # refuses a wrong beta and wrong lengths
        DpoConfig(beta=beta, reference="none", **lengths)
    rendering = Rendering(chat, pairs, *lengths.values())
    documents = scoring.pack_records(sets, model.tokenizer, rendering, args.seq_len)
    scored = scoring.score(documents, models, round_up(args.rows or 8, axis_size(*BATCH)))
    result = {
        "model": args.model,
        "digest": params_digest(model.params),
        **{name: model.lineage[name] for name in ("step", "lineage") if name in model.lineage},
        **({"reference": args.reference, "beta": beta} if len(models) > 1 else {}),
        "sets": [{"name": x.name, "split": x.split, "digest": x.digest} for x in sets],
        "kind": "pairs" if pairs else "dialogues",
        "records": documents.counts,
        "dtype": model.cfg.dtype,
        "chat": dataclasses.asdict(chat),
        "chat_of": chat_of,
        "seq_len": args.seq_len,
        **lengths,
        **summarize(scored, documents, beta),
    }
    return f"{_table(result)}\n", result


class Ratio(NamedTuple):
    """A number as the sum of `above` divided by the sum of `below`, each `N`."""

    above: np.ndarray
    below: np.ndarray


def mean_of(values: np.ndarray | Sequence[float]) -> Ratio:
    """The mean of `N` values as a ratio of sums."""
    array = np.asarray(values, np.float64)
    return Ratio(array, np.ones_like(array))


def intervals(
    ratios: Mapping[str, Ratio], clusters: np.ndarray | None = None, samples: int = 1000
) -> Metrics:
    """The percentile bootstrap interval of each ratio (Efron 1979), in float64 on the host.

    All ratios are of the same `N` units. Those with an equal value in `clusters` are drawn
    together, since they are not independent of each other; None draws each by itself.
    """
    sums = np.stack([part for ratio in ratios.values() for part in ratio], axis=1, dtype=float)
    if clusters is not None:
        names, which = np.unique(clusters, return_inverse=True)
        units, sums = sums, np.zeros((len(names), sums.shape[1]))
        np.add.at(sums, which, units)
    rng, n = np.random.default_rng(0), len(sums)
    draws = (rng.integers(0, n, n) for _ in range(samples))
    drawn = np.stack([np.bincount(draw, minlength=n) @ sums for draw in draws])
    totals = sums.sum(axis=0)
    low, high = np.quantile(drawn[:, ::2] / drawn[:, 1::2], [0.025, 0.975], axis=0)
    return {
        name: {"value": float(value), "low": float(a), "high": float(b)}
        for name, value, a, b in zip(ratios, totals[::2] / totals[1::2], low, high, strict=True)
    }


def summarize(scored: scoring.Scored, documents: scoring.ScoreSet, beta: float) -> dict[str, Any]:
    """`counts`, `numbers` and those of several `sources`; pairs of a prompt are drawn together."""
    if documents.pairs:
        ratios = _pair_ratios(scored, beta)
    else:
        nll, tokens = -scored.logps[:, 0], scored.tokens[:, 0]
        ratios = {"nll": Ratio(nll, tokens), "nll/per_dialogue": mean_of(nll / tokens)}

    def metrics(mask: np.ndarray) -> Metrics:
        part = {name: Ratio(x.above[mask], x.below[mask]) for name, x in ratios.items()}
        numbers = intervals(part, documents.prompts[mask])
        for name in [name for name in part if name.startswith("nll")]:
            # A percentile interval's ends go with any function that rises
            ends = {end: math.exp(min(x, 700.0)) for end, x in numbers[name].items()}
            numbers[name.replace("nll", "perplexity")] = ends
        return numbers

    n = len(documents.sources)
    counts = {"pairs" if documents.pairs else "dialogues": n}
    counts["target_tokens"] = int(scored.tokens.sum())
    if documents.pairs:
        counts["prompts"] = len(np.unique(documents.prompts))
    masks = masks_of(documents.sources) if len(set(documents.sources)) > 1 else {}
    sources = {x: {"documents": int(m.sum()), "numbers": metrics(m)} for x, m in masks.items()}
    return {"counts": counts, "numbers": metrics(np.ones(n, bool)), "sources": sources}


def answer_table(scored: scoring.Scored, beta: float) -> PairTable:
    """The scored pairs as training tabulates them; the loss is DPO's, 0 without a reference."""
    logps, tokens = scored.logps[:, 1:], scored.tokens[:, 1:]
    ref_logps, losses = np.zeros_like(logps), np.zeros(len(logps))
    if scored.ref_logps is not None:
        ref_logps = scored.ref_logps[:, 1:]
        rewards = implicit_rewards(logps, ref_logps, beta)
        losses = np.logaddexp(0.0, rewards[:, 1] - rewards[:, 0])
    return PairTable(np.arange(1, len(logps) + 1), losses, logps, ref_logps, tokens)


def _pair_ratios(scored: scoring.Scored, beta: float) -> dict[str, Ratio]:
    table = answer_table(scored, beta)
    columns = pair_columns(table, beta)
    if scored.ref_logps is None:
        columns = {k: x for k, x in columns.items() if k.startswith(_WITHOUT_REFERENCE)}
    each = table.logps / table.tokens
    columns |= {f"{name}_per_token": x for name, x in compared("logps", each).items()}
    ratios = {name: mean_of(column) for name, column in columns.items()}
    for i, answer in enumerate(("chosen", "rejected")):
        ratios[f"nll/{answer}"] = Ratio(-table.logps[:, i], table.tokens[:, i])
    return ratios


def _table(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in result["counts"].items())
    sets = ", ".join(f"{part['name']} {part['split']}" for part in result["sets"])
    chat = ", ".join(f"{name} {value}" for name, value in result["chat"].items())
    parts = [
        f"{result['model']} on {sets}: {counts}",
        f"chat settings of {result['chat_of']}: {chat}",
        metric_table(result["numbers"]),
    ]
    for name in MAIN:
        if result["sources"] and name in result["numbers"]:
            rows = {
                f"{source} ({own['documents']})": own["numbers"][name]
                for source, own in result["sources"].items()
            }
            parts.append(f"{name} by source\n{metric_table(rows)}")
    return "\n\n".join(parts)


def metric_table(metrics: Metrics) -> str:
    """A line for each number with its interval."""
    wide = max(map(len, metrics))
    lines = [f"{'':<{wide}}  {'value':>10}  95% interval"]
    for name, interval in metrics.items():
        value, low, high = map(shown, interval.values())
        lines.append(f"{name:<{wide}}  {value:>10}  {low} to {high}")
    return "\n".join(lines)


def shown(value: float) -> str:
    """A number with four decimals; fewer where it is large, more where it is small."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 0.01:
        return f"{value:.3g}"
    return f"{value:.2f}" if size >= 100 else f"{value:.4f}"
