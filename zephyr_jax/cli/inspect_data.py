"""Shows data: a raw row and its cleaning, a record of a prepared set, a row of a packed set.

With --html=FILE as one page that needs no network, for sets with numbers over their records.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath

from zephyr_jax.cli import prepare_data
from zephyr_jax.data.prepare import prepare
from zephyr_jax.reports.html import Card, Group, Page
from zephyr_jax.reports.inspect.raw import leaves
from zephyr_jax.reports.inspect.terminal import make_console, print_cards

if TYPE_CHECKING:
    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.data.packing.packed import PackedSet
    from zephyr_jax.data.text.tokenizer import Tokenizer

# What a command shows: the title, the cards, and what adds the numbers to a page.
_View = tuple[str, list[Group], Callable[[Page], None]]
_HIDDEN = "Characters that cannot be printed are shown as escapes."
_LEGEND = {
    "raw": f"Red and struck through: removed; green: added. {_HIDDEN}",
    "set": f"Colored: target tokens (with a tokenizer); gray: no loss. {_HIDDEN}",
    "packed": f"Green, blue, orange: target tokens of dialogues, chosen and rejected answers; "
    f"gray: no loss. {_HIDDEN}",
}
# Flags of prepare_data about writing: accepted, so that its command line can be repeated with
# another first word, and without effect here.
_OF_WRITING: dict[str, dict[str, Any]] = {
    "beam": {"nargs": "*"},
    "overwrite": {"action": "store_true"},
}
_OF_WRITING |= {"data_dir": {}, "workers": {}, "max_bad_fraction": {}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="raw|set|packed")
    raw = kinds.add_parser(
        "raw",
        help="a raw row, and what cleaning did to it",
        description="A raw row and what cleaning did to it. Takes the flags of prepare_data.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    prepare_data.add_arguments(raw)
    for name, how in _OF_WRITING.items():
        raw.add_argument(f"--{name}", help=argparse.SUPPRESS, **how)
    _add_choice(raw, "number over all files from 0 on, or FILE:LINE as in report.json", find=True)
    prepared = kinds.add_parser("set", help="a record of a prepared set", allow_abbrev=False)
    prepared.add_argument("path", help="the folder that prepare_data named")
    prepared.add_argument("--split", help="default: the first that has records")
    prepared.add_argument("--tokenizer", help="file or folder; shows the tokens, targets in color")
    prepared.add_argument("--ids", action="store_true", help="also print a table of the tokens")
    _add_choice(prepared, "number from 0 on (0)", find=True)
    packed = kinds.add_parser("packed", help="a row of a run's packed set", allow_abbrev=False)
    packed.add_argument("--config", required=True, help="a config file, or the name of a recipe")
    packed.add_argument("--split", choices=("train", "eval"), default="train")
    packed.add_argument(
        "--pack_for", type=int, metavar="SHARDS", help="as with train; default: what is there"
    )
    packed.add_argument("--ids", action="store_true", help="also print a table of the tokens")
    _add_choice(packed, "number from 0 on (0)", find=False)
    for kind in (prepared, packed):
        kind.add_argument(
            "--sample",
            type=int,
            default=0,
            help="how many records or rows the page's numbers are from (all; 2000 of over 200,000)",
        )


def _add_choice(parser: argparse.ArgumentParser, row: str, find: bool) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", default="", help=row)
    if find:
        which.add_argument("--find", default="", help="the first with this text, in any case")
    parser.add_argument("--html", metavar="FILE", help="write a page instead")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        FileNotFoundError, ValueError: if something is missing, or a flag does not fit it.
    """
    if args.kind != "raw" and args.sample < 0:
        raise ValueError(f"--sample={args.sample} must be at least 1")
    path = Path(args.html).expanduser() if args.html else None
    if path and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--html={path}: there is no folder {path.absolute().parent}")
    title, groups, add_numbers = {"raw": _raw, "set": _set, "packed": _packed}[args.kind](args)
    if path is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
        print_cards(groups, make_console(args.color, sys.stdout))
        return
    page = Page(title)
    page.text(_LEGEND[args.kind], "soft")
    for group in groups:
        page.cards(*group)
    add_numbers(page)
    page.write(epath.Path(path))
    logging.info("%s", path)


def _raw(args: argparse.Namespace) -> _View:
    from zephyr_jax.reports.inspect.raw import find_row, raw_cards

    plan = prepare.make_plan(**prepare_data.plan_of(args))
    raw = find_row(plan, args.row, args.find)
    return f"{args.dataset} {plan.config_name}", raw_cards(plan, raw), lambda _: None


def _set(args: argparse.Namespace) -> _View:
    from zephyr_jax.data.text.tokenizer import Tokenizer
    from zephyr_jax.reports.data import add_prepared_set
    from zephyr_jax.reports.inspect.documents import record_cards
    from zephyr_jax.reports.inspect.statistics import add_records

    report = prepare.report(args.path)
    kept = report["rows"]["kept"]
    splits = [name for name, count in kept.items() if count]
    split = args.split or splits[0]
    records = prepare.read_split(args.path, split)
    tok = None
    if args.tokenizer:
        read = Tokenizer.from_folder if Path(args.tokenizer).is_dir() else Tokenizer.from_file
        tok = read(args.tokenizer)
    if args.ids and tok is None:
        raise ValueError("--ids needs --tokenizer=FILE: a set holds text")
    at = _found(records, args.find, split) if args.find else _row(args.row, len(records), split)
    title = Card(f"{split}, record {at} of {len(records)}")

    def add_numbers(page: Page) -> None:
        for name in splits:
            add_records(page, name, prepare.read_split(args.path, name), tok, args.sample)
        page.heading("How the set was made")
        add_prepared_set(page, report)

    made_from = report.get("made_from", {})
    name = f"{made_from.get('dataset', args.path)} {made_from.get('config_name', '')}".strip()
    groups = [Group([title]), *record_cards(records[at], tok, args.ids)]
    return f"{name}, {split}", groups, add_numbers


def _found(records: Sequence[dict[str, Any]], text: str, split: str) -> int:
    wanted = text.casefold()
    for at in range(len(records)):
        if any(wanted in text.casefold() for text in leaves(records[at]).values()):
            return at
    raise ValueError(f"no record of {split} holds {text!r}: --find looks at values, in any case")


def _row(text: str, count: int, split: str) -> int:
    if not (text or "0").isdecimal() or int(text or 0) >= count:
        raise ValueError(f"--row={text}: {split} has {count} rows; give a number from 0 on")
    return int(text or 0)


def _packed(args: argparse.Namespace) -> _View:
    from zephyr_jax.config.run import load_config
    from zephyr_jax.reports.data import add_packed_set
    from zephyr_jax.reports.inspect.documents import row_cards
    from zephyr_jax.reports.inspect.statistics import add_rows
    from zephyr_jax.weights.checkpoint import find_tokenizer, resolve

    config = load_config(args.config, args.overrides)
    if not (config.data.tokenizer or config.init):
        raise ValueError("config.data.tokenizer is empty and there is no init to take it from")
    tok = find_tokenizer(config.data.tokenizer or resolve(config.init, weights=False))
    packed = _packed_set(config, tok, args)
    count = packed.manifest["splits"][args.split]["rows"]
    at = _row(args.row, count, args.split)
    # Rows of a stream hold their documents end to end, as one segment.
    stream = ", a stream cut into rows" if config.data.packing == "concat" else ""
    title = Card(f"{packed.folder.name}, {args.split}, row {at} of {count}{stream}")
    groups = [Group([title]), *row_cards(packed.rows(args.split).read([at])[0], tok, args.ids)]

    def add_numbers(page: Page) -> None:
        page.heading("The packed set")
        add_packed_set(page, packed.manifest)
        add_rows(page, packed, args.split, args.sample)

    return f"{config.name}, packed {args.split}", groups, add_numbers


def _packed_set(config: RunConfig, tok: Tokenizer, args: argparse.Namespace) -> PackedSet:
    """The packed set; of pairs there may be one for each number of shards."""
    from zephyr_jax.data.packing.packed import open_packed

    if args.pack_for is not None and args.pack_for < 1:
        raise ValueError(f"--pack_for={args.pack_for} must be at least 1")
    multiples = [1]
    if args.pack_for:
        multiples = [args.pack_for * config.train.micro_batches]
    elif config.dpo:
        paths = epath.Path(config.data.data_dir).glob("packed/dpo-*/manifest.json")
        manifests = [json.loads(path.read_text()) for path in paths]
        multiples = sorted({manifest["made_from"]["rows_multiple"] for manifest in manifests})
    for multiple in multiples:
        packed = open_packed(config, tok, multiple)
        if packed is not None:
            return packed
    words = ["python", "scripts/train.py", f"--config={args.config}", *args.overrides]
    raise FileNotFoundError(
        f"{config.name} is not packed yet in {config.data.data_dir}: pack it with "
        f"{shlex.join([*words, f'--pack_for={args.pack_for or 1}'])}"
    )
