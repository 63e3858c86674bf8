"""What the data went through: rules with their examples, and how the packed sets came out."""

from __future__ import annotations

from typing import Any

from zephyr_jax.reports.html import Card, Page, Span, cut, diff_spans, percent

_RULES = {
    "truecase": ("capitalization fixed at sentence starts and for “I”", "changed"),
    "refusal": ("the assistant refuses in a stock phrase", "dropped"),
    "empty_turn": ("a turn is blank", "dropped"),
    "odd_dialogue": ("the last question has no answer", "dropped"),
    "empty_dialogue": ("no turns at all", "dropped"),
    "score_10_to_1": ("a 10 whose ratings say it was a 1", "score fixed"),
    "score_10_estimated": ("a doubtful 10, set to twice the mean rating", "score fixed"),
    "score_10_kept": ("a 10 that its ratings confirm", "kept"),
    "score_10_reannotated": ("a 10 that was rated a second time", "kept"),
    "score_10_unrated": ("a 10 without ratings to check it by", "kept"),
    "tie": ("both answers of the pair have the same score", "kept"),
    "unscored_completion": ("an answer without a score", "answer dropped"),
}
_PACKED = {
    "rows": "rows",
    "documents": "documents packed",
    "tokens": "tokens",
    "target_tokens": "target tokens",
    "padding_share": "padding, share of all positions",
    "truncated": "dialogues cut at the row's end",
    "tokens_cut": "tokens cut off",
    "dropped_no_target": "dialogues dropped: no target is left",
    "prompts_cut": "prompts cut",
    "answers_cut": "pairs with a cut answer",
    "dropped_too_long": "pairs dropped: longer than a row",
    "dropped_duplicate": "pairs dropped: duplicates",
}


def add_prepared_set(page: Page, report: dict[str, Any]) -> None:
    """Adds what was read, kept and dropped of a set and by which rules, from its `report.json`."""
    rows = report["rows"]
    counts = {"records read": rows["read"]}
    counts |= {f"kept for {split}": count for split, count in rows["kept"].items()}
    counts |= {"dropped": rows["read"] - sum(rows["kept"].values())}
    counts |= {"of these, not of the schema": rows["bad"]}
    shares = [
        [name, f"{count:,}", percent(count / max(rows["read"], 1))]
        for name, count in counts.items()
    ]
    page.table(["", "records", "share"], shares, 1)
    rules = [
        [rule, *_RULES.get(rule, ("", "dropped")), f"{count:,}"]
        for rule, count in report["rules"].items()
    ]
    if rules:
        details = page.details("What each rule did, with examples")
        details.table(["rule", "", "effect", "count"], rules, 3)
        for rule, examples in report["examples"].items():
            details.text(f"{rule}: {examples[0]['where']}", "soft")
            before, after = examples[0]["before"], examples[0]["after"]
            left = [Span(f"{cut(text).strip() or '(blank)'}\n") for text in before]
            cards = [Card("before", left or [Span("(no turns)", "dim")])]
            details.cards([*cards, Card("after", _after(before, after))], parallel=True)


def _after(before: list[str], after: list[str] | None) -> list[Span]:
    """What a rule left of some texts, with the changed words marked."""
    if after is None:
        return [Span("(dropped)", "dim")]
    spans = []
    if len(after) == len(before):
        for one, other in zip(before, after, strict=True):
            changes = diff_spans(cut(one), cut(other))
            spans += [span for span in changes if span.style != "removed"] + [Span("\n")]
        return spans
    names = ("chosen", "rejected")  # ratings became a pair
    return [Span(f"{name}  {cut(x)}\n") for name, x in zip(names, after, strict=False)]


def add_packed_set(page: Page, manifest: dict[str, Any]) -> None:
    """Adds a table of what became of the documents, from a packed set's manifest."""
    splits = manifest["splits"]
    rows = []
    for key, label in _PACKED.items():
        values = [split.get(key) for split in splits.values()]
        if None not in values:
            shown = [percent(v) if key == "padding_share" else f"{v:,}" for v in values]
            rows.append([label, *shown])
    about = f"{manifest['made_from']['stage'].upper()}: rows of {manifest['seq_len']} tokens"
    if manifest.get("rows_per_batch"):
        about += (
            f", {manifest['rows_per_batch']} rows for a batch of {manifest['batch_size']} pairs, "
            f"{manifest['epochs']} epochs planned"
        )
    page.table(["", *("held-out" if x == "eval" else x for x in splits)], rows, 1, about)
