"""Shows data: a raw row and its cleaning, a record of a prepared set, a row of a packed set.

With --html=FILE as one page that needs no network, for sets with numbers over their records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from absl import logging
from etils import epath

from zephyr_jax.cli import flags, prepare_data
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.packed import open_packed
from zephyr_jax.data.prepare import prepare
from zephyr_jax.reports import data
from zephyr_jax.reports.inspect import contains, find_row, raw_cards, record_cards, row_cards
from zephyr_jax.reports.page import Card, Group, Page, print_cards
from zephyr_jax.training.setup import run_tokenizer
from zephyr_jax.weights.sources import find_tokenizer

# What a command shows: the title, the cards, and what adds the numbers to a page.
_View = tuple[str, list[Group], Callable[[Page], None]]
_LEGEND = {
    "raw": "Red and struck through: removed; green: added.",
    "set": "Colored: target tokens (with a tokenizer); gray: no loss.",
    "packed": "Green, blue, orange: targets of dialogues, chosen, rejected answers; gray: no loss.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="raw|set|packed")
    cleaned = "a raw row, and what cleaning did to it; takes the flags of prepare_data"
    raw = kinds.add_parser("raw", help=cleaned, allow_abbrev=False, conflict_handler="resolve")
    prepare_data.add_arguments(raw)
    flags.add_data_dir(raw, help=argparse.SUPPRESS)  # required there, without effect here
    prepared = kinds.add_parser("set", help="a record of a prepared set", allow_abbrev=False)
    prepared.add_argument("path", help="the folder that prepare_data named")
    flags.add_split(prepared, help="default: the first that has records")
    prepared.add_argument("--tokenizer", help="file or folder; shows the tokens, targets in color")
    packed = kinds.add_parser("packed", help="a row of a run's packed set", allow_abbrev=False)
    flags.add_config(packed, "a config file, or the name of a recipe")
    flags.add_split(packed, choices=("train", "eval"), default="train")
    row = "number from 0 on (0); of a raw row over all files, or FILE:LINE as in report.json"
    page = "write a page instead"
    for kind in (raw, prepared, packed):
        kind.add_argument("--html", type=flags.output_file, metavar="FILE", help=page)
        which = kind.add_mutually_exclusive_group()
        which.add_argument("--row", default="0", help=row)
        if kind is not packed:
            which.add_argument("--find", default="", help="the first with this text, in any case")


def run(args: argparse.Namespace) -> None:
    title, groups, add_numbers = {"raw": _raw, "set": _set, "packed": _packed}[args.kind](args)
    if args.html is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
        print_cards(groups, sys.stdout)
        return
    page = Page(title)
    page.text(f"{_LEGEND[args.kind]} What cannot be printed is shown as escapes.", "soft")
    for group in groups:
        page.cards(*group)
    add_numbers(page)
    page.write(epath.Path(args.html))
    logging.info("%s", args.html)


def _raw(args: argparse.Namespace) -> _View:
    plan = prepare.make_plan(**prepare_data.plan_of(args))
    cards = raw_cards(plan, *find_row(plan, args.row, args.find))
    return f"{args.dataset} {plan.config_name}", cards, lambda _: None


def _set(args: argparse.Namespace) -> _View:
    report = prepare.report(args.path)
    splits = [name for name, count in report["rows"]["kept"].items() if count]
    split = args.split or splits[0]
    records = prepare.read_split(args.path, split)
    tok = find_tokenizer(args.tokenizer) if args.tokenizer else None
    found = (i for i, record in enumerate(records) if contains(record, args.find))
    at = next(found, -1) if args.find else _row(args.row, len(records), split)
    if at < 0:
        what = f"no record of {split} holds {args.find!r}"
        raise ValueError(f"{what}: --find looks at values, in any case")

    def add_numbers(page: Page) -> None:
        for name in splits:
            data.add_records(page, name, prepare.read_split(args.path, name), tok)
        page.heading("How the set was made")
        data.add_prepared_set(page, report)

    title = Card(f"{split}, record {at} of {len(records)}")
    return f"{args.path}, {split}", [Group([title]), *record_cards(records[at], tok)], add_numbers


def _row(text: str, count: int, split: str) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"--row={text}: {split} has {count} rows; give a number from 0 on")
    return int(text)


def _packed(args: argparse.Namespace) -> _View:
    config = load_config(args.config, args.overrides)
    tok = run_tokenizer(config.data, config.init, compare=False)
    packed = open_packed(config, tok)
    if packed is None:
        words = " ".join(["python scripts/train.py", f"--config={args.config}", *args.overrides])
        missing = f"{config.name} is not packed yet in {config.data.data_dir}"
        raise FileNotFoundError(f"{missing}: pack it with {words} --pack_only")
    if args.split not in packed.manifest["splits"]:
        raise ValueError(f"--split={args.split}: data.splits={config.data.splits} holds none out")
    count = packed.manifest["splits"][args.split]["rows"]
    at = _row(args.row, count, args.split)
    # Rows of a stream hold their documents end to end, as one segment.
    stream = ", a stream cut into rows" if config.data.packing == "concat" else ""
    title = Card(f"{packed.folder.name}, {args.split}, row {at} of {count}{stream}")

    def add_numbers(page: Page) -> None:
        page.heading("The packed set")
        data.add_packed_set(page, packed.manifest)

    groups = [Group([title]), *row_cards(packed.rows(args.split).read([at])[0], tok)]
    return f"{config.name}, packed {args.split}", groups, add_numbers
