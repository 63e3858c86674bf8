"""The recipes of the installed package: `python -m zephyr_jax.recipes list | show | diff | copy`.

list: names and first lines. show NAME: the whole literal config, whether the recipe is a literal
file or a variant of one. diff A B: the fields in which two recipes differ. copy NAME DIR: the
literal config as a file in a folder of yours, to be edited and given to --config.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zephyr_jax.config.run import load_config
from zephyr_jax.storage import write_atomic

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
    show = commands.add_parser("show", help="the whole literal config")
    show.add_argument("name")
    diff = commands.add_parser("diff", help="the fields in which two recipes differ")
    diff.add_argument("name")
    diff.add_argument("other")
    copy = commands.add_parser("copy", help="the literal config into a folder")
    copy.add_argument("name")
    copy.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    try:
        if args.command == "list":
            text = _table()
        elif args.command == "show":
            text = literal(args.name)
        elif args.command == "diff":
            text = _difference(args.name, args.other)
        else:
            text = f"{_copy(args.name, args.folder.expanduser())}\n"
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    sys.stdout.write(text)


def literal(name: str) -> str:
    """The text of a config file that holds every field of this recipe.

    Raises:
        ValueError: if there is no such recipe.
    """
    source = _source(name)
    if "base.get_config()" not in source:
        return source
    lines = [
        f'"""{ast.get_docstring(ast.parse(source))}"""',
        "",
        "from ml_collections import ConfigDict",
    ]
    lines += ["", "", "def get_config() -> ConfigDict:", "    config = ConfigDict()"]
    for field, value in load_config(name).to_dict().items():
        if isinstance(value, dict):
            lines += ["", f"    config.{field} = ConfigDict()"]
            lines += [f"    config.{field}.{key} = {_quoted(item)}" for key, item in value.items()]
        elif value is not None:
            lines.append(f"    config.{field} = {_quoted(value)}")
    return "\n".join([*lines, "    return config", ""])


def _quoted(value: Any) -> str:
    return repr(value).replace("'", '"')


def _files() -> list[Path]:
    return sorted(_FOLDER.glob("[a-z]*.py"))


def missing(name: str) -> FileNotFoundError:
    """The error for a config that is neither a file nor a recipe; its note lists the recipes."""
    near = difflib.get_close_matches(Path(name).stem, [path.stem for path in _files()], 2)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    error = FileNotFoundError(f"no config file {name} and no recipe of that name{meant}")
    error.add_note(f"The recipes are:\n{_table()}".rstrip())
    return error


def _table() -> str:
    lines = []
    for path in _files():
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines.append(f"{path.stem:<34} {doc.partition(chr(10))[0]}".rstrip() + "\n")
    return "".join(lines)


def _source(name: str) -> str:
    files = {path.stem: path for path in _files()}
    if name not in files:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(files)}")
    return files[name].read_text("utf-8")


def _difference(name: str, other: str) -> str:
    """One line for each field that differs: its values in the first and in the second recipe."""
    for each in (name, other):
        _source(each)
    first, second = (_flat(load_config(each).to_dict()) for each in (name, other))
    fields = [field for field in first | second if first.get(field) != second.get(field)]
    width = max(map(len, fields), default=0)
    values = [(first.get(field, "-"), second.get(field, "-")) for field in fields]
    return "".join(
        f"{field:<{width}}  {a}  ->  {b}\n" for field, (a, b) in zip(fields, values, strict=True)
    )


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`{"optim.peak_lr": 2e-5, ...}` of a nested dict."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def _copy(name: str, folder: Path) -> Path:
    """The literal config under its own name; never over a file that is there."""
    text, target = literal(name), folder / f"{name}.py"
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(target, text)
    return target


if __name__ == "__main__":
    main()
