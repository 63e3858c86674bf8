"""The recipes of the installed package: `python -m zephyr_jax.recipes list | show | copy`.

list: names and first lines. show NAME: the file. copy NAME DIR: the file into a folder of yours,
to be edited and given to --config.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; bad input ends in one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        "zephyr_jax.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and first lines")
    show = commands.add_parser("show", help="one file")
    copy = commands.add_parser("copy", help="one file into a folder")
    for command in (show, copy):
        command.add_argument("name")
    copy.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    try:
        if args.command == "list":
            sys.stdout.write(_table())
        elif args.command == "show":
            sys.stdout.write(_file(args.name).read_text("utf-8"))
        else:
            sys.stdout.write(f"{_copy(_file(args.name), args.folder.expanduser())}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def _files() -> list[Path]:
    return sorted(_FOLDER.glob("[a-z]*.py"))


def _table() -> str:
    lines = []
    for path in _files():
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines.append(f"{path.stem:<32} {said.splitlines()[0] if said else ''}".rstrip() + "\n")
    return "".join(lines)


def _file(name: str) -> Path:
    known = {path.stem: path for path in _files()}
    if name not in known:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(known)}")
    return known[name]


def _copy(source: Path, folder: Path) -> Path:
    """The copy of a recipe under its own name; never over a file that is there."""
    target = folder / source.name
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    temporary.write_bytes(source.read_bytes())
    os.replace(temporary, target)
    return target


if __name__ == "__main__":
    main()
