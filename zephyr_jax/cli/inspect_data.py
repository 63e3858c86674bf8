"""Shows data: a raw row and its cleaning, a record of a prepared set, a row of a packed set.

With --html=FILE as one page that needs no network; of sets with numbers over their records.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from zephyr_jax.cli import prepare_data
from zephyr_jax.data.prepare import prepare as station
from zephyr_jax.reports.inspect.differences import leaves
from zephyr_jax.reports.inspect.spans import Card, cards_text, wants_colors, writable

if TYPE_CHECKING:
    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.data.packing.packed import PackedSet
    from zephyr_jax.data.text.tokenizer import Tokenizer

# Of prepare_data's words, those about writing: taken, so that its command line can be repeated
# with another first word, and without effect here.
_OF_WRITING = {
    "data_dir": {},
    "workers": {},
    "beam": {"nargs": "*"},
    "max_bad_fraction": {},
    "overwrite": {"action": "store_true"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="raw|set|packed")
    raw = kinds.add_parser(
        "raw",
        help="a raw row, and what cleaning did to it",
        description="A raw row and what cleaning did to it. Takes the words of prepare_data.",
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    prepare_data.add_arguments(raw)
    for name, how in _OF_WRITING.items():
        raw.add_argument(f"--{name}", help=argparse.SUPPRESS, **how)
    _add_choice(raw, "number over all files from 0 on, or FILE:LINE as in report.json", find=True)
    made = kinds.add_parser("set", help="a record of a prepared set", allow_abbrev=False)
    made.add_argument("path", help="the folder that prepare_data named")
    made.add_argument("--split", help="default: the first that has records")
    made.add_argument("--tokenizer", help="file or folder; shows tokens with the loss in color")
    made.add_argument("--ids", action="store_true", help="a table of the tokens too")
    _add_choice(made, "number from 0 on (0)", find=True)
    packed = kinds.add_parser("packed", help="a row of a run's packed set", allow_abbrev=False)
    packed.add_argument("--config", required=True, help="a config file, or the name of a recipe")
    packed.add_argument("--split", choices=("train", "eval"), default="train")
    packed.add_argument(
        "--pack_for", type=int, metavar="SHARDS", help="as with train; default: what is there"
    )
    packed.add_argument("--ids", action="store_true", help="a table of the tokens too")
    _add_choice(packed, "number from 0 on (0)", find=False)
    for kind in (made, packed):
        kind.add_argument(
            "--sample",
            type=int,
            default=0,
            help="records or rows that the page's numbers are from (all; 2000 of over 200,000)",
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
      FileNotFoundError, ValueError: nothing is there, or not what was asked for.
    """
    if args.kind != "raw" and args.sample < 0:
        raise ValueError(f"--sample={args.sample} must be at least 1")
    {"raw": _raw, "set": _set, "packed": _packed}[args.kind](args)


def _raw(args: argparse.Namespace) -> None:
    from zephyr_jax.reports.inspect.raw import find_row, raw_cards

    plan = station.make_plan(**prepare_data.plan_of(args))
    found = find_row(plan, args.row, args.find)
    _show(args, f"{args.dataset} {plan.config_name}", raw_cards(plan, found), lambda: "")


def _set(args: argparse.Namespace) -> None:
    from zephyr_jax.reports.inspect.tokens import record_cards

    report = station.report(args.path)
    kept = report["rows"]["kept"]
    split = args.split or next(name for name, count in kept.items() if count)
    records = station.read_split(args.path, split)
    tok = _tokenizer(args.tokenizer) if args.tokenizer else None
    if args.ids and tok is None:
        raise ValueError("--ids needs --tokenizer=FILE: a set holds text")
    at = _found(records, args.find, split) if args.find else _row(args.row, len(records), split)
    title = Card(f"{split}, record {at} of {len(records)}")
    cards = [title, *record_cards(records[at], tok, args.ids)]

    def numbers() -> str:
        from zephyr_jax.reports.inspect import page

        splits = [name for name, count in kept.items() if count]
        told = (_split_numbers(args.path, name, tok, args.sample, kept) for name in splits)
        return "".join(told) + page.rules_section(report)

    made_from = report.get("made_from", {})
    name = " ".join(filter(None, (made_from.get("dataset"), made_from.get("config_name"))))
    _show(args, f"{name or Path(args.path).name}, {split}", cards, numbers)


def _split_numbers(
    path: str, split: str, tok: Tokenizer | None, sample: int, kept: dict[str, int]
) -> str:
    from tqdm import tqdm

    from zephyr_jax.reports.inspect import page
    from zephyr_jax.reports.inspect.statistics import record_numbers, sampled

    records = station.read_split(path, split)
    chosen = sampled(len(records), sample, sum(kept.values()))
    bar = tqdm(chosen.indices, desc=f"measure {split}", unit="record", disable=None)
    numbers = record_numbers((records[i] for i in bar), tok)
    unit = "characters" if tok is None else "tokens"
    return page.numbers_section(split, numbers, unit, chosen.said)


def _tokenizer(name: str) -> Tokenizer:
    from zephyr_jax.data.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(name) if Path(name).is_dir() else Tokenizer.from_file(name)


def _found(records: Sequence[dict[str, Any]], text: str, split: str) -> int:
    wanted = text.casefold()
    for at in range(len(records)):
        if any(wanted in leaf.text.casefold() for leaf in leaves(records[at])):
            return at
    raise ValueError(f"no record of {split} holds {text!r}: --find looks at values, in any case")


def _row(said: str, count: int, split: str) -> int:
    if not (said or "0").isdecimal() or int(said or 0) >= count:
        raise ValueError(f"--row={said}: {split} has {count} rows; give a number from 0 on")
    return int(said or 0)


def _packed(args: argparse.Namespace) -> None:
    from zephyr_jax.config.run import load_config
    from zephyr_jax.reports.inspect.packed_rows import row_cards
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
    cards = [title, *row_cards(packed.rows(args.split).read([at])[0], tok, args.ids)]

    def numbers() -> str:
        return _packed_numbers(config, packed, args.split, args.sample)

    _show(args, f"{config.name}, packed {args.split}", cards, numbers)


def _packed_set(config: RunConfig, tok: Tokenizer, args: argparse.Namespace) -> PackedSet:
    """The set that is there; which one of pairs hangs on the shards that it was packed for."""
    from zephyr_jax.data.packing.packed import open_packed

    if args.pack_for is not None and args.pack_for < 1:
        raise ValueError(f"--pack_for={args.pack_for} must be at least 1")
    multiples = [1]
    if args.pack_for:
        multiples = [args.pack_for * config.train.micro_batches]
    elif config.dpo:
        told = (json.loads(p.read_text()) for p in _packed_there(config.data.data_dir))
        multiples = sorted({manifest["made_from"]["rows_multiple"] for manifest in told})
    for multiple in multiples:
        packed = open_packed(config, tok, multiple)
        if packed is not None:
            return packed
    words = ["python", "scripts/train.py", f"--config={args.config}", *args.overrides]
    raise FileNotFoundError(
        f"{config.name} is not packed yet in {config.data.data_dir}: pack it with "
        f"{shlex.join([*words, f'--pack_for={args.pack_for or 1}'])}"
    )


def _packed_there(data_dir: str) -> list[Any]:
    """The manifests of all packed sets of pairs."""
    from etils import epath

    return list(epath.Path(data_dir).glob("packed/dpo-*/manifest.json"))


def _packed_numbers(config: RunConfig, packed: PackedSet, split: str, sample: int) -> str:
    """The numbers of the packed set, and of the prepared sets behind it that are local."""
    from zephyr_jax.data.packing import mixture
    from zephyr_jax.reports.html import escape
    from zephyr_jax.reports.inspect import page
    from zephyr_jax.reports.inspect.statistics import packed_numbers, sampled
    from zephyr_jax.storage import is_remote

    count = packed.manifest["splits"][split]["rows"]
    chosen = sampled(count, sample, count)
    numbers = packed_numbers(packed, split, chosen.indices)
    out = page.packed_section(packed.manifest, numbers, f"{split}: {chosen.said}")
    name = config.data.train_split if split == "train" else config.data.eval_split
    for member in mixture.members(config.data):
        if not is_remote(member.folder):
            report = station.report(member.folder)
            kept = report["rows"]["kept"]
            out += f"<h2>{escape(member.name)}, from which it was packed</h2>"
            out += _split_numbers(str(member.folder), name, None, sample, kept)
            out += page.rules_section(report)
    return out


def _show(args: argparse.Namespace, title: str, cards: Sequence[Card], numbers: Any) -> None:
    """The cards on stdout, or with `--html` on a page with what `numbers()` adds."""
    if args.html:
        from zephyr_jax.reports.inspect.page import record_section, write_page

        path = Path(args.html).expanduser()
        write_page(path, title, record_section(args.kind, title, cards) + numbers())
        logging.info("%s", path)
        return
    colors = wants_colors(args.color, sys.stdout, os.environ)
    try:
        sys.stdout.write(writable(cards_text(cards, colors), sys.stdout.encoding))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
