"""What the data went through: rules with their examples, and how the packed sets came out."""

from __future__ import annotations

import difflib
import re
from typing import Any

from zephyr_jax.reports.html import LONGEST, escape, percent, table

_RULES = {
    "truecase": ("capitals put at sentence starts and for “I”", "changed"),
    "refusal": ("the assistant refuses in a stock phrase", "dropped"),
    "empty_turn": ("a turn is blank", "dropped"),
    "odd_dialogue": ("the last question has no answer", "dropped"),
    "empty_dialogue": ("no turns at all", "dropped"),
    "score_10_to_1": ("a 10 whose ratings say it was a 1", "score mended"),
    "score_10_estimated": ("a doubtful 10, set to twice the mean rating", "score mended"),
    "score_10_kept": ("a 10 that its ratings confirm", "kept"),
    "score_10_reannotated": ("a 10 that was given a second time", "kept"),
    "score_10_unrated": ("a 10 without ratings to check it by", "kept"),
    "tie": ("both answers of the pair have the same score", "kept"),
    "unscored_completion": ("an answer without a score", "answer left out"),
}


def prepared_account(report: dict[str, Any]) -> str:
    """What was read, kept and left out of a set, from its `report.json`."""
    rows = report["rows"]
    kept = sum(rows["kept"].values())
    counts = {"records read": rows["read"]}
    counts |= {f"kept for {split}": count for split, count in rows["kept"].items()}
    counts |= {"left out": rows["read"] - kept, "of these, not of the schema": rows["bad"]}
    cells = [
        [escape(name), f"{count:,}", percent(count / max(rows["read"], 1))]
        for name, count in counts.items()
    ]
    return table(["", "records", "share"], cells, numeric=1)


def prepared_set(report: dict[str, Any], title: str) -> str:
    """What each rule touched, with an example of each, from a set's `report.json`."""
    rows, rules = report["rows"], report["rules"]
    kept = ", ".join(f"{count:,} to {escape(split)}" for split, count in rows["kept"].items())
    touched = [
        [escape(rule), escape(meaning), f"{escape(effect)}", f"{count:,}"]
        for rule, count in rules.items()
        for meaning, effect in [_RULES.get(rule, ("", "dropped"))]
    ]
    head = [title, "", "effect", "count"]
    changed, dropped = "", ""
    for rule, examples in report["examples"].items():
        example = _example(rule, examples[0])
        if examples[0]["after"] is None:
            dropped += example
        else:
            changed += example
    if dropped:
        dropped = f"<details><summary>Examples of what is dropped</summary>{dropped}</details>"
    bad = f"; {rows['bad']:,} did not fit the schema" if rows["bad"] else ""
    return (
        f"<p>{rows['read']:,} records read{bad}; kept: {kept}.</p>"
        + (table(head, touched, numeric=3) if touched else "")
        + changed
        + dropped
    )


def _example(rule: str, example: dict[str, Any]) -> str:
    before, after = example["before"], example["after"]
    if after is None:
        right = '<p class="missing">dropped</p>'
    elif len(after) == len(before):
        right = "".join(_said(_marked(*pair)) for pair in zip(before, after, strict=True))
    else:  # ratings -> the pair made of them
        names = ("chosen", "rejected")
        right = "".join(_said(f"{n}  {escape(t)}") for n, t in zip(names, after, strict=False))
    left = "".join(_said(escape(turn) if turn.strip() else "(blank)") for turn in before)
    return (
        f'<p class="soft"><code>{escape(rule)}</code> {escape(example["where"])}</p>'
        f'<div class="pair"><div><b>before</b>{left or _said("(no turns)")}</div>'
        f"<div><b>after</b>{right}</div></div>"
    )


def _said(escaped: str) -> str:
    return f'<p class="said">{escaped}</p>'


def _marked(before: str, after: str) -> str:
    """The text after, escaped, with the words marked that the text before does not have there."""
    old, new = (re.findall(r"\S+|\s+", text[:LONGEST]) for text in (before, after))
    out = ""
    for tag, _, _, start, end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        words = escape("".join(new[start:end]))
        out += words if tag == "equal" or not words else f"<mark>{words}</mark>"
    return out + "…" * (len(after) > LONGEST)


def stage_of(manifest: dict[str, Any]) -> str:
    """The stage that a packed set is for: "sft" or "dpo"."""
    return manifest["made_from"]["stage"]


def packed_set(manifest: dict[str, Any]) -> str:
    """A table of what became of the documents, from a packed set's manifest."""
    splits = manifest["splits"]
    unit = "pairs" if stage_of(manifest) == "dpo" else "dialogues"
    names = {
        "rows": "rows",
        "documents": f"{unit} packed",
        "tokens": "tokens",
        "target_tokens": "tokens with loss",
        "padding_share": "padding, share of all places",
        "truncated": "dialogues cut at the row's end",
        "tokens_cut": "tokens cut off",
        "dropped_no_target": "dialogues dropped: nothing to learn from is left",
        "prompts_cut": "prompts cut",
        "answers_cut": "pairs with a cut answer",
        "dropped_too_long": "pairs dropped: longer than a row",
        "dropped_duplicate": "pairs dropped: seen before",
    }
    rows = []
    for key, label in names.items():
        values = [split.get(key) for split in splits.values()]
        if None not in values:
            shown = [percent(v) if key == "padding_share" else f"{v:,}" for v in values]
            rows.append([escape(label), *shown])
    about = f"{stage_of(manifest).upper()}: rows of {manifest['seq_len']} tokens"
    if manifest.get("rows_per_batch"):
        about += (
            f", {manifest['rows_per_batch']} rows for a batch of {manifest['batch_size']} pairs, "
            f"{manifest['epochs']} epochs laid out in advance"
        )
    heads = ["", *("held-out" if name == "eval" else name for name in splits)]
    return table(heads, rows, numeric=1, caption=about)
