"""Several runs in one page: what differs in them, their curves, figures and speed."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from zephyr_jax.evaluation.bootstrap import Interval, intervals, mean_of
from zephyr_jax.evaluation.pairs import PairTable, pair_columns
from zephyr_jax.evaluation.summary import shown
from zephyr_jax.reports.curves import points_of
from zephyr_jax.reports.html import duration, escape, missing, percent, table, write_page
from zephyr_jax.reports.plots import RUN_COLOURS, Plot, Series, figures
from zephyr_jax.reports.run_folder import Run, differences, read_run
from zephyr_jax.training.workdir import flat

_TOKENS = "tokens with loss, so far"
_LONGEST_LABEL = 24  # in a legend
# What every run has, what only runs on dialogues have, and what only runs on pairs have.
_ALL = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm"}
_SFT = {"loss": "Loss, nats per token"}
_PAIRS = {
    "loss": "Preference loss",
    "rewards/accuracies": "How often the chosen answer wins",
    "rewards/margins": "Reward margin",
    "logps/chosen": "Log-probability of chosen answers",
    "logps/rejected": "Log-probability of rejected answers",
}
_RATES = {
    "tokens with loss per second": "target_tokens_per_s",
    "tokens per second, padding left out": "tokens_per_s",
    "pairs per second": "pairs_per_s",
    "MFU": "mfu",
}


class _Entry(NamedTuple):
    """A run of the comparison, with how it is called and drawn."""

    label: str
    color: str
    run: Run


def compare_runs(workdirs: Sequence[str | os.PathLike[str]], output: str) -> epath.Path:
    """Writes a page about several runs to `output`; its path.

    Raises:
        FileNotFoundError: if a folder holds no run, or `output` lies in none.
        ValueError: if they are not two runs at least and eight at most, one is there twice, or
            one has no metrics yet.
    """
    page = epath.Path(output)
    if not page.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={page}: there is no folder {page.absolute().parent}")
    if page.is_dir():
        raise ValueError(f"--output={page} is a folder; name an .html file in it")
    if not 2 <= len(workdirs) <= len(RUN_COLOURS):
        raise ValueError(f"{len(workdirs)} runs are named; name 2 to {len(RUN_COLOURS)}")
    roots = [epath.Path(workdir).absolute() for workdir in workdirs]
    for root in roots:
        if roots.count(root) > 1:
            raise ValueError(f"{root} is named twice; name each run once")
    runs = [read_run(root) for root in roots]
    for run in runs:
        if not run.rows:
            raise ValueError(f"{run.root} has no line in metrics.jsonl yet; leave it out")
    entries = [_Entry(*parts) for parts in zip(_labels(roots), RUN_COLOURS, runs, strict=False)]
    sections = (_overview, _fields, _curves, _figures_at_the_end, _throughput)
    body = "\n".join(section(entries) for section in sections)
    write_page(page, "Runs compared", body)
    return page


def _labels(roots: Sequence[epath.Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in itertools.count(1):
        labels = ["/".join(root.parts[-length:]) for root in roots]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("the paths are not all different")


def _head(entries: Iterable[_Entry]) -> list[str]:
    return [_swatch(entry) for entry in entries]


def _swatch(entry: _Entry) -> str:
    mark = f'<span class="swatch" style="background:var(--{entry.color})"></span>'
    return f'<span class="run">{mark}{escape(entry.label)}</span>'


def _overview(entries: Sequence[_Entry]) -> str:
    rows = []
    for entry in entries:
        run, last = entry.run, entry.run.evals[-1] if entry.run.evals else {}
        of = f" of {run.total_steps:,}" if run.total_steps > run.step else ""
        wall, _ = run.seconds()
        cells = [escape(run.name), "pairs" if run.preferences else "dialogues"]
        cells += [f"{run.step:,}{of}", shown(last["eval_loss"]) if "eval_loss" in last else ""]
        rows.append([_swatch(entry), *cells, duration(wall) if wall else ""])
    head = ["run", "config", "learns from", "steps", "held-out loss", "wall time"]
    return f"<h1>{len(entries)} runs compared</h1>{table(head, rows, 3)}"


def _fields(entries: Sequence[_Entry]) -> str:
    found = differences([flat(entry.run.config) for entry in entries])
    title = "<h2>Fields that differ</h2>"
    if not found:
        return title + missing("The configurations are the same.")
    rows = [[escape(name), *map(escape, values)] for name, values in found.items()]
    return title + table(["field", *_head(entries)], rows, len(entries) + 1, wraps=True)


def _curves(entries: Sequence[_Entry]) -> str:
    kinds = [
        ("Learning from dialogues", _SFT, [e for e in entries if not e.run.preferences]),
        ("Learning from pairs", _PAIRS, [e for e in entries if e.run.preferences]),
    ]
    parts = ["<h2>Curves</h2>"]
    if all(members for _, _, members in kinds):
        parts.append(
            "<p>Some of these runs learn from dialogues, some from pairs. Learning rate and "
            "gradient norm are drawn over each other; what else they measure is not the same "
            "thing, and is drawn for each kind by itself.</p>"
        )
    parts.append('<p class="soft">Dashed with dots: held-out.</p>')
    for title, names, members in kinds:
        if members:
            losses = {
                entry.run.config["dpo"].get("loss", "sigmoid")
                for entry in members
                if entry.run.preferences
            }
            various = f"The losses differ: {', '.join(sorted(losses))}."
            said = {"loss": various} if len(losses) > 1 else {}
            parts.append(f"<h3>{title}</h3>{_drawn(members, names, said)}")
    return "".join([*parts, f"<h3>Steps</h3>{_drawn(entries, _ALL, {})}"])


def _drawn(entries: Sequence[_Entry], names: dict[str, str], said: dict[str, str]) -> str:
    """Each metric by step and, where the runs have counted them, by tokens with loss."""
    plots = []
    for name, title in names.items():
        plot = Plot(f"{_word(title)}-step", title, name, _lines(entries, name), said.get(name, ""))
        if not plot.series:
            continue
        plots.append(plot)
        counted = [entry for entry in entries if _tokens(entry.run)]
        without = ", ".join(entry.label for entry in entries if entry not in counted)
        if len(counted) > 1:
            caption = f"Without {without}: no count of tokens in its metrics." if without else ""
            lines = _lines(counted, name, by_tokens=True)
            by = {"name": f"{_word(title)}-tokens", "series": lines, "xlabel": _TOKENS}
            plots.append(dataclasses.replace(plot, caption=caption, **by))
    return figures(plots)


def _word(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _lines(entries: Iterable[_Entry], name: str, by_tokens: bool = False) -> list[Series]:
    lines = []
    for entry in entries:
        at = _tokens(entry.run) if by_tokens else None
        label = entry.label
        if len(label) > _LONGEST_LABEL:
            label = f"…{label[1 - _LONGEST_LABEL :]}"
        for split, metric in (("train", name), ("eval", f"eval_{name}")):
            points = points_of(entry.run.rows, split, metric)
            if at is not None:
                points = [(at[int(step)], value) for step, value in points if step in at]
            if points:
                lines.append(Series(label, points, entry.color, heldout=split == "eval"))
                label = ""
    return lines


def _tokens(run: Run) -> dict[int, float]:
    """Step -> tokens with loss up to it; empty where the metrics do not count them."""
    if any("target_tokens" not in row for row in run.train):
        return {}
    counts = np.cumsum([row["target_tokens"] for row in run.train])
    steps = [row["step"] for row in run.train]
    return {0: 0.0} | dict(zip(steps, counts.tolist(), strict=True)) if steps else {}


def _figures_at_the_end(entries: Sequence[_Entry]) -> str:
    title, ends = "<h2>Held-out figures at the end</h2>", [_end(entry.run) for entry in entries]
    names = dict.fromkeys(name for end in ends for name in end)
    if not names:
        return title + missing("none of them is evaluated yet")
    rows = [[escape(name), *(_in_words(end.get(name)) for end in ends)] for name in names]
    parts = [title, table(["", *_head(entries)], rows, 1), _paired(entries)]
    if any(entry.run.preferences for entry in entries):
        parts.append(
            '<p class="soft">In brackets: 95% bootstrap intervals over the pairs of the held-out '
            "set. They know nothing of other seeds of training.</p>"
        )
    return "".join(parts)


def _end(run: Run) -> dict[str, Interval | float]:
    """The last evaluation, with intervals where its pairs are stored."""
    last = run.evals[-1] if run.evals else {}
    found: dict[str, Interval | float] = {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and not name.startswith("eval_source/")
    }
    pairs = run.pairs()
    if pairs is None:
        return found
    columns = pair_columns(pairs, run.config["dpo"]["beta"])
    ratios = {name: mean_of(column) for name, column in columns.items() if name in found}
    return found | intervals(ratios)


def _in_words(value: Interval | float | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, Interval):
        return shown(value)
    return "{} <small>[{}, {}]</small>".format(*map(shown, value))


def _paired(entries: Sequence[_Entry]) -> str:
    """Differences to the first run over the same pairs, which say more than two intervals do."""
    tables = [(entry, entry.run.pairs()) for entry in entries if entry.run.preferences]
    known = [(entry, pairs) for entry, pairs in tables if pairs is not None]
    if len(known) < 2:
        return ""
    first, base = known[0]
    base_columns = _outcomes(first.run, base)
    rows = []
    for entry, pairs in known[1:]:
        if set(pairs.ids) != set(base.ids):
            continue
        columns = _outcomes(entry.run, pairs)
        found = intervals({name: mean_of(columns[name] - base_columns[name]) for name in columns})
        rows.append([_swatch(entry), *map(_in_words, found.values())])
    said = f"Less {first.label}, pair by pair"
    return table(["", *map(escape, base_columns)], rows, 1, said) if rows else ""


def _outcomes(run: Run, pairs: PairTable) -> dict[str, np.ndarray]:
    order = np.argsort(pairs.ids)
    columns = pair_columns(PairTable(*(part[order] for part in pairs)), run.config["dpo"]["beta"])
    names = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    return {name: columns[name].astype(float) for name in names}


def _throughput(entries: Sequence[_Entry]) -> str:
    rows = []
    for label, name in _RATES.items():
        rates = [entry.run.typical(name) for entry in entries]
        if any(rate is not None for rate in rates):
            rows.append([label, *("" if rate is None else f"{rate:,.4g}" for rate in rates)])
    spent = [entry.run.seconds() for entry in entries]
    rows.append(["wall time, all starts", *(duration(wall) if wall else "" for wall, _ in spent)])
    if any(share is not None for _, share in spent):
        shares = ["" if share is None else percent(share) for _, share in spent]
        rows.append(["goodput: share of it inside steps", *shares])
    said = "Rates: the median of the logged lines but the first, which compiles"
    return f"<h2>Throughput</h2>{table(['', *_head(entries)], rows, 1, said)}"
