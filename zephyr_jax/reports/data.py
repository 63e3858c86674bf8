"""Sections about data: rules with their examples, packed sets, and histograms of lengths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from tqdm import tqdm

from zephyr_jax.config import weighted
from zephyr_jax.data.packing.packed import read_manifest
from zephyr_jax.data.prepare import prepare
from zephyr_jax.data.raw.schema import Row
from zephyr_jax.data.text.chat import render_chat, render_pair
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.reports.page import Card, Page, Span, cut, diff_spans, percent
from zephyr_jax.reports.plots import Histogram

if TYPE_CHECKING:
    from zephyr_jax.reports.run import Run

_LIMITS = (512, 1024, 2048, 4096, 8192)
_SAMPLE = 20_000  # records that histograms are drawn of at most


def add_data(page: Page, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Adds what became of records and packed rows, by a run's section `data` and its checkpoint."""
    gone = f"is not in {data['data_dir']} any more."
    for name, report in prepared_reports(data).items():
        page.heading(name, 3)
        if report:
            add_prepared_set(page, report)
        else:
            page.text(f"The prepared set {gone}", "missing")
    page.heading("Packed rows", 3)
    try:
        packed = epath.Path(data["data_dir"]) / "packed" / meta.get("packed", "none")
        add_packed_set(page, read_manifest(packed))
    except FileNotFoundError:
        page.text(f"The packed set {gone}" if meta else "No checkpoint yet.", "missing")


def add_rounds(page: Page, runs: Sequence[Run]) -> None:
    """Adds each run's round of feedback, what its judge is worth, and what became of the run."""
    columns = [_round(run) for run in runs]
    if not any("prompts" in column for column in columns):
        page.text("No set of this run's pairs comes from collect_feedback.py.", "missing")
        return
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    page.table(["", *(run.root.name for run in runs)], rows, 1, "Intervals are 95%.")


def _round(run: Run) -> dict[str, str]:
    init, train = run.config["init"], run.config["data"]["splits"][0]
    out = {"began with": init, "held to": run.config["dpo"].get("reference_model") or init}
    for name, report in prepared_reports(run.config["data"]).items():
        account = report.get("feedback")
        if not account:
            continue
        answers = sum(counts.get("answered", 0) for counts in account["answers"].values())
        counts = {"prompts": account["prompts"]["prompts"], "answers": answers}
        counts |= {f"judge, {x}".replace("_", " "): n for x, n in account["judgements"].items()}
        counts["pairs to train on"] = report["rows"]["kept"].get(train, 0)
        out |= {"feedback": name} | {label: f"{n:,}" for label, n in counts.items()}
        for form, measures in account["agreement"].items():
            for measure, x in measures.items():
                ends = f" ({percent(x['low'])} to {percent(x['high'])})" if "low" in x else ""
                out[f"{form}, {measure}".replace("_", " ")] = percent(x["value"]) + ends
    if run.evals:
        accuracy = run.evals[-1].get("eval_rewards/accuracies", math.nan)
        out["held-out reward accuracy"] = percent(accuracy)
    for entry in run.results:
        out |= {column: str(number) for column, number in entry.numbers.items()}
    return out


def prepared_reports(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> `report.json` of a run's prepared sets; {} of one that is not there any more."""
    reports = {}
    for name in weighted("data.dataset", data["dataset"]):
        try:
            reports[name] = prepare.report(prepare.set_folder(data["data_dir"], name))
        except FileNotFoundError:
            reports[name] = {}
    return reports


def add_prepared_set(page: Page, report: dict[str, Any]) -> None:
    """Adds what was read, kept and dropped of a set and by which rules, from its `report.json`."""
    rows = report["rows"]
    counts = {"records read": rows["read"]}
    counts |= {f"kept for {split}": count for split, count in rows["kept"].items()}
    counts |= {"dropped": rows["read"] - sum(rows["kept"].values())}
    counts |= {"of these, invalid": rows["bad"]}
    read = max(rows["read"], 1)
    shares = [[name, f"{n:,}", percent(n / read)] for name, n in counts.items()]
    page.table(["", "records", "share"], shares, 1)
    if not report["rules"]:
        return
    details = page.details("What each rule did, with examples")
    rules = [[rule, f"{count:,}"] for rule, count in report["rules"].items()]
    details.table(["rule", "count"], rules, 1)
    for rule, (example, *_) in report["examples"].items():
        details.text(f"{rule}: {example['where']}", "soft")
        before = [Span(f"{cut(text).strip() or '(blank)'}\n") for text in example["before"]]
        after = _after(example["before"], example["after"])
        cards = [Card("before", before or [Span("(no turns)", "dim")]), Card("after", after)]
        details.cards(cards, parallel=True)


def _after(before: list[str], after: list[str] | None) -> list[Span]:
    if after is None:
        return [Span("(dropped)", "dim")]
    if len(after) != len(before):  # ratings became a pair
        both = zip(("chosen", "rejected"), after, strict=False)
        return [Span(f"{name}  {cut(x)}\n") for name, x in both]
    both = zip(before, after, strict=True)
    changes = [span for a, b in both for span in [*diff_spans(cut(a), cut(b)), Span("\n")]]
    return [span for span in changes if span.style != "removed"]


def add_packed_set(page: Page, manifest: dict[str, Any]) -> None:
    """Adds a table of what became of the documents, from a packed set's manifest."""
    splits = manifest["splits"]
    rows = []
    for name in dict.fromkeys(name for split in splits.values() for name in split):
        values = [split.get(name, "") for split in splits.values()]  # some are of one split alone
        if any(isinstance(value, int | float) for value in values):  # and not a digest
            number = percent if name == "padding_share" else "{:,}".format
            shown = ["" if value == "" else number(value) for value in values]
            rows.append([name.replace("_", " "), *shown])
    made = manifest["made_from"]
    about = f"{made['stage'].upper()}: rows of {manifest['seq_len']} tokens"
    if manifest.get("rows_per_batch"):
        about += f", {manifest['rows_per_batch']} rows for a batch of {made['batch_size']} pairs"
        about += f", {made['epochs']} epochs planned"
    page.table(["", *("held-out" if x == "eval" else x for x in splits)], rows, 1, about)


def add_records(page: Page, split: str, records: Sequence[Row], tok: Tokenizer | None) -> None:
    """Adds histograms of the lengths of a split's records, and of the score margins of pairs."""
    indices = range(0, len(records), max(1, -(-len(records) // _SAMPLE)))
    numbers: dict[str, list[float]] = defaultdict(list)
    for index in tqdm(indices, desc=f"measure {split}", unit="record", disable=None):
        try:
            measured = record_numbers(records[index], tok)
        except ValueError as error:
            raise ValueError(f"{split}, record {index}: {error}") from error
        for name, value in measured.items():
            numbers[name].append(value)
    page.heading(split)
    page.text(f"{len(indices):,} of {len(records):,} records", "soft")
    plots = []
    for name, listed in numbers.items():
        values, unit = np.asarray(listed, float), "tokens" if tok else "characters"
        note = f"Median {np.median(values):.4g}, 95% up to {np.quantile(values, 0.95):.4g}."
        xlabel = "" if name == "score margin" else unit
        plots.append(Histogram(name.capitalize(), xlabel, "records", {name: values}, note))
    page.figures(plots)
    if tok:
        lengths = np.asarray(numbers["length"])
        over = {limit: int((lengths > limit).sum()) for limit in _LIMITS}
        rows = [[f"{x:,} tokens", f"{n:,}", percent(n / len(lengths))] for x, n in over.items()]
        head = ["longer than", "records", "share"]
        page.table(head, rows, 1, "Records longer than a sequence length")


def record_numbers(record: Row, tok: Tokenizer | None) -> dict[str, float]:
    """Lengths of a record in tokens or else characters, and of a pair its score margin."""
    messages = record.get("messages")
    if messages:
        return {"length": len(render_chat(tok, messages)[0] if tok else _text(messages))}
    context, answers = record["chosen"][:-1], [record[side][-1:] for side in ("chosen", "rejected")]
    if tok:
        parts = render_pair(tok, context, *(answer[0]["content"] for answer in answers))
    else:
        parts = map(_text, (context, *answers))
    prompt, chosen, rejected = map(len, parts)
    margin, longer = record["score_chosen"] - record["score_rejected"], max(chosen, rejected)
    numbers: dict[str, float] = {"length": prompt + longer, "prompt": prompt, "chosen": chosen}
    return numbers | {"rejected": rejected, "score margin": margin}


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    return "".join(message["content"] for message in messages)
