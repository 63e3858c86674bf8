"""Raw dialogues or preferences -> a TFDS set: read, cleaned, filtered, split, accounted for."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

from absl import logging

from zephyr_jax.data.prepare import prepare as station
from zephyr_jax.data.prepare.plan import DUPLICATES, Selection
from zephyr_jax.data.raw.binarize import CRITERIA, PAIRINGS, TIES, BinarizationRules
from zephyr_jax.data.raw.cleaning import CleaningRules
from zephyr_jax.data.raw.filters import Filters

# option -> data sets and configurations ("": any) that it has an effect on
_HOMES = {
    "no_truecase": {"ultrachat": "raw"},
    "keep_refusals": {"ultrachat": "raw"},
    "truecase": {"messages": ""},
    "drop_refusals": {"messages": ""},
    "refusal_phrases": {"ultrachat": "raw", "messages": ""},
    "criterion": {"ultrafeedback": "raw"},
    "pairing": {"ultrafeedback": "raw"},
    "no_score_repair": {"ultrafeedback": "raw"},
    "ties": {"ultrafeedback": "", "preferences": ""},
    "drop_sources": {"ultrafeedback": "", "preferences": ""},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument("dataset", choices=station.DATASETS)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="folder of jsonl (also .gz, .zst) or parquet files, one file, a glob, or a hub id, "
        "org/name@REVISION",
    )
    add("--data_dir", required=True, help="the set goes to DATA_DIR/DATASET/CONFIG_NAME/VERSION")
    add(
        "--config_name",
        help="raw (default), or the published form: 200k or binarized; for messages and "
        "preferences a name of your own (default own)",
    )
    add("--workers", type=int, default=0, help="processes (default: one for each core)")
    add(
        "--beam",
        nargs="*",
        metavar="OPTION",
        help="run on Apache Beam, with options of it such as runner=DirectRunner",
    )
    add("--max_bad_fraction", type=float, default=0.01, help="of rows that may fail to fit (0.01)")
    add("--overwrite", action="store_true", help="replace a set made otherwise")
    _add_selection(parser.add_argument_group("which records are used"))
    _add_filters(parser.add_argument_group("what leaves records out"))
    chat = parser.add_argument_group("ultrachat raw, and messages")
    chat.add_argument("--no_truecase", action="store_true", help="ultrachat: leave capitals")
    chat.add_argument("--keep_refusals", action="store_true", help="ultrachat: drop no refusals")
    chat.add_argument("--truecase", action="store_true", help="messages: mend capitals")
    chat.add_argument("--drop_refusals", action="store_true", help="messages: drop refusals")
    chat.add_argument("--refusal_phrases", help="file with one phrase a line, for ours")
    pairs = parser.add_argument_group("ultrafeedback and preferences")
    pairs.add_argument("--criterion", choices=CRITERIA, help="raw only; default overall_score")
    pairs.add_argument("--pairing", choices=PAIRINGS, help="raw only; default random")
    pairs.add_argument("--ties", choices=TIES, help="pairs of equal score; default keep")
    pairs.add_argument("--no_score_repair", action="store_true", help="raw only; trust tens")
    pairs.add_argument("--drop_sources", nargs="+", metavar="SOURCE", help="such as truthful_qa")


def _add_selection(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, Selection()
    add("--seed", type=int, default=default.seed, help="of every lot")
    add("--holdout", type=float, default=default.holdout, help="share of prompts held out (0.1)")
    add("--sample", type=float, default=default.sample, help="share of the prompts used (1)")
    add(
        "--rows",
        metavar="TRAIN,HELD_OUT",
        help="sizes of the splits instead of shares; 207865,23110 are those of ultrachat_200k",
    )
    add("--duplicates", choices=DUPLICATES, default=default.duplicates, help="of prompts (keep)")
    add(
        "--near_threshold",
        type=float,
        default=default.near_threshold,
        help="Jaccard similarity from which prompts are near duplicates (0.8)",
    )
    add("--drop_straddling", action="store_true", help="drop training rows of held-out prompts")


def _add_filters(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, Filters()
    add("--max_chars", type=int, default=default.max_chars, help="of all messages together")
    add("--min_answer_chars", type=int, default=default.min_answer_chars, help="of each answer")
    add("--max_turns", type=int, default=default.max_turns, help="messages, no system message")
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help="prompts of benchmarks")
    add("--ngram", type=int, default=default.ngram, help="words that mark contamination (13)")


def run(args: argparse.Namespace) -> None:
    """Prepare what the command line asks for; log the place and what was kept and dropped.

    Raises:
      FileNotFoundError, ValueError: as `prepare`, and for options that would have no effect.
    """
    runner = None
    if args.beam is not None:
        from zephyr_jax.data.prepare.beam import run_on_beam  # needs the extra `beam`

        runner = functools.partial(run_on_beam, options=args.beam)
    path = station.prepare(
        args.dataset,
        args.source,
        args.data_dir,
        args.config_name,
        rules=rules_of(args),
        selection=selection_of(args),
        filters=Filters(
            args.max_chars,
            args.min_answer_chars,
            args.max_turns,
            tuple(args.decontaminate),
            args.ngram,
        ),
        max_bad_fraction=args.max_bad_fraction,
        workers=args.workers,
        overwrite=args.overwrite,
        runner=runner,
    )
    told = station.report(path)
    rows = told["rows"]
    counted = {"read": rows["read"], "bad": rows["bad"], **told["rules"]}
    counted.update({f"-> {split}": kept for split, kept in rows["kept"].items()})
    table = "\n".join(f"  {name:<24}{count:>10,}" for name, count in counted.items())
    logging.info("%s\n%s\n  details: %s", path, table, path / station.REPORT)


def selection_of(args: argparse.Namespace) -> Selection:
    """Which records the command line asks for."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Selection)}
    if args.rows is not None:
        try:
            train, held_out = (int(part) for part in args.rows.split(","))
        except ValueError:
            raise ValueError(
                f"--rows={args.rows}: give TRAIN,HELD_OUT, such as 207865,23110"
            ) from None
        fields["rows"] = (train, held_out)
    return Selection(**fields)


def rules_of(args: argparse.Namespace) -> CleaningRules | BinarizationRules:
    """The rules of the command line for its data set; what does not apply to it is an error."""
    config_name = args.config_name or station.DATASETS[args.dataset].default
    for option, homes in _HOMES.items():
        if getattr(args, option) and homes.get(args.dataset) not in ("", config_name):
            said = ", ".join(" ".join(filter(None, home)) for home in homes.items())
            raise ValueError(
                f"--{option} has no effect on {args.dataset} {config_name}: it is for {said}"
            )
    if station.DATASETS[args.dataset].rules is BinarizationRules:
        return BinarizationRules(
            criterion=args.criterion or CRITERIA[0],
            pairing=args.pairing or PAIRINGS[0],
            ties=args.ties or TIES[0],
            seed=args.seed,
            repair_scores=not args.no_score_repair,
            drop_sources=tuple(args.drop_sources or ()),
        )
    phrases = CleaningRules.refusal_phrases
    if args.refusal_phrases:
        lines = Path(args.refusal_phrases).read_text(encoding="utf-8").splitlines()
        phrases = tuple(line.strip() for line in lines if line.strip())
    if args.dataset == "messages":
        return CleaningRules(args.truecase, args.drop_refusals, phrases)
    return CleaningRules(not args.no_truecase, not args.keep_refusals, phrases)
