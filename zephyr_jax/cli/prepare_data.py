"""Raw dialogues or preferences -> a TFDS set: read, cleaned, filtered, split, reported."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from zephyr_jax.cli import flags
from zephyr_jax.data.prepare import prepare as preparation
from zephyr_jax.data.prepare.prepare import DATASETS, DUPLICATES, Selection
from zephyr_jax.data.raw.binarize import CRITERIA, PAIRINGS, TIES, BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.readers import read_text

CLEANING = ("truecase", "refusals")
# option -> data sets, and configurations of them, that it has an effect on
_APPLIES_TO = {
    "clean": ("ultrachat raw", "messages"),
    "refusal_phrases": ("ultrachat raw", "messages"),
    "tool_turns": ("messages",),
    "criterion": ("ultrafeedback raw",),
    "pairing": ("ultrafeedback raw",),
    "no_score_repair": ("ultrafeedback raw",),
    "ties": ("ultrafeedback", "preferences"),
    "drop_sources": ("ultrafeedback", "preferences", "unpaired"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=DATASETS)
    add = parser.add_argument
    formats = "jsonl, JSON (also .gz, .zst) or parquet"
    source = f"folder, file or glob of {formats}, or org/name@REVISION"
    add("--source", type=flags.not_empty, required=True, help=source)
    output = "output root: DATA_DIR/DATASET/CONFIG_NAME/VERSION"
    flags.add_data_dir(parser, required=True, help=output)
    name = "raw (default) or, as published, 200k or binarized; own sets: any name (default own)"
    add("--config_name", type=flags.not_empty, help=name)
    workers = "number of processes (default: one per core)"
    add("--workers", type=flags.at_least(0), default=0, help=workers)
    add("--max_bad_fraction", type=float, default=0.01, help="tolerated fraction of unfit rows")
    add("--max_row_mb", type=int, default=64, help="longest line that is read, in MB (64)")
    flags.add_overwrite(parser, "replace a set made from other files or rules")
    records = parser.add_argument_group("which records are used")
    flags.add_seed(records)
    add = records.add_argument
    add("--holdout", type=float, help="fraction held out where no file's name decides (0.1)")
    add("--sample", type=float, default=1.0, help="fraction of prompts used (1)")
    sizes = "exact split sizes, such as 207865,23110"
    flags.add_rows(records, metavar="TRAIN,HELD_OUT", help=sizes)
    add("--duplicates", choices=DUPLICATES, default="keep", help="drop repeated prompts (keep)")
    add("--drop_overlap", action="store_true", help="drop training rows of held-out prompts")
    add("--max_chars", type=int, default=0, help="maximum length of all messages together")
    add("--min_answer_chars", type=int, default=0, help="minimum length of each answer")
    add("--max_turns", type=int, default=0, help="maximum number of messages without the system's")
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help="files of benchmark prompts")
    add("--ngram", type=int, default=13, help="words shared with such a prompt, in a row (13)")
    add = parser.add_argument_group("ultrachat raw, and messages").add_argument
    rules = "rules that apply (both to ultrachat raw, none to messages)"
    add("--clean", nargs="*", choices=CLEANING, help=rules)
    add("--refusal_phrases", metavar="FILE", help="own phrases that mark a refusal, one per line")
    keep = "messages only: keep turns of tools, for a chat template that shows them (drop)"
    add("--tool_turns", choices=("drop", "keep"), help=keep)
    add = parser.add_argument_group("ultrafeedback, preferences and unpaired").add_argument
    add("--criterion", choices=CRITERIA, help="raw only: score that decides (overall_score)")
    add("--pairing", choices=PAIRINGS, help="raw only: which answers make a pair (random)")
    add("--ties", choices=TIES, help="what to do with pairs of equal scores (keep)")
    add("--no_score_repair", action="store_true", help="raw only: keep scores of 10 as they are")
    add("--drop_sources", nargs="+", metavar="SOURCE", help="such as truthful_qa")


def run(args: argparse.Namespace) -> None:
    """Prepares what the command line asks for; logs the folder and what was kept and dropped."""
    names = ("data_dir", "max_bad_fraction", "max_row_mb", "workers", "overwrite")
    path = preparation.prepare(**{name: getattr(args, name) for name in names}, **plan_of(args))
    report = preparation.report(path)
    rows = report["rows"]
    counts = {"read": rows["read"], "bad": rows["bad"], **report["rules"]}
    counts.update({f"-> {split}": kept for split, kept in rows["kept"].items()})
    table = "\n".join(f"  {name:<24}{count:>10,}" for name, count in counts.items())
    if args.drop_sources and not report["rules"].get("source_dropped"):
        logging.warning("no row is from --drop_sources %s", " ".join(args.drop_sources))
    logging.info("%s\n%s\n  details: %s", path, table, path / preparation.REPORT)


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `make_plan`; an option that has no effect on the data set is an error."""
    rows = None
    if args.rows is not None:
        train, _, held_out = args.rows.partition(",")
        if not (train.isdecimal() and held_out.isdecimal()):
            raise ValueError(f"--rows={args.rows}: give TRAIN,HELD_OUT, such as 207865,23110")
        rows = (int(train), int(held_out))
    if args.ngram != Selection.ngram and not args.decontaminate:
        raise ValueError(f"--ngram={args.ngram} has no effect without --decontaminate")
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Selection)}
    fields |= {"rows": rows, "decontaminate": tuple(args.decontaminate)}
    named = {name: getattr(args, name) for name in ("dataset", "source", "config_name")}
    return named | {"rules": _rules(args), "selection": Selection(**fields)}


def _rules(args: argparse.Namespace) -> CleaningRules | BinarizationRules:
    variant = f"{args.dataset} {args.config_name or DATASETS[args.dataset].default}"
    for option, sets in _APPLIES_TO.items():
        passed = getattr(args, option) not in (None, False)
        if passed and not {args.dataset, variant} & {*sets}:
            raise ValueError(f"--{option} has no effect on {variant}: it is for {', '.join(sets)}")
    if DATASETS[args.dataset].records != "dialogue":
        named = {name: getattr(args, name) for name in ("criterion", "pairing", "ties")}
        return BinarizationRules(
            **{name: value for name, value in named.items() if value},
            seed=args.seed,
            repair_scores=not args.no_score_repair,
            drop_sources=tuple(args.drop_sources or ()),
        )
    default = () if args.dataset == "messages" else CLEANING
    clean, phrases = default if args.clean is None else args.clean, CleaningRules.refusal_phrases
    if args.refusal_phrases is not None:
        if "refusals" not in clean:
            raise ValueError("--refusal_phrases has no effect without --clean refusals")
        lines = read_text(Path(args.refusal_phrases)).splitlines()
        phrases = tuple(line.strip() for line in lines if line.strip())
    keep = args.tool_turns == "keep"
    return CleaningRules("truecase" in clean, "refusals" in clean, phrases, keep)
