"""The size of the house against its bounds, and its picture from the real imports.

python scripts/dev/house.py size       prints every bound and exits with 1 where one is broken
python scripts/dev/house.py picture    writes docs/house.svg
"""

from __future__ import annotations

import ast
import configparser
import dataclasses
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that no environment is needed
PACKAGE = ROOT / "zephyr_jax"
CORE = ("config", "types.py", "sharding.py", "models", "losses", "data/text", "data/packing")
CORE = (*CORE, "training")
PICTURE = ROOT / "docs" / "house.svg"
# What features may add to the bare pipeline: AI feedback and evaluation; data, users, speed, trust
FEATURE_LINES = 2_500 + 1_500
FEATURE_TEST_LINES = 4_000


class Bound(NamedTuple):
    """One measured number and the most that it may be."""

    name: str
    value: int
    most: int


def python_files(*folders: Path) -> list[Path]:
    """All Python files of these folders (or files), without caches and environments."""
    files = []
    for folder in folders:
        files += sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    return files


def count_lines(files: Iterable[Path]) -> int:
    """The number of lines of these files together."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in files)


def layers() -> list[list[str]]:
    """The rows of the import contract in setup.cfg, from the top: names without `zephyr_jax.`."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    rows = parser["importlinter:contract:layers"]["layers"].strip().splitlines()
    names = (row.replace("|", " ").replace(":", " ").split() for row in rows)
    return [[name.removeprefix("zephyr_jax.") for name in row] for row in names]


def config_fields() -> int:
    """The number of fields of a run's configuration, sections counted as fields too."""
    from zephyr_jax.config.run import RunConfig

    def count(section: type) -> int:
        number = 0
        for hint in typing.get_type_hints(section).values():
            classes = [c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)]
            number += 1 + sum(count(c) for c in classes if isinstance(c, type))
        return number

    return count(RunConfig)


def declared_flags(files: Iterable[Path]) -> list[str]:
    """The command-line flags that these files declare, a flag shared by commands once."""
    flags = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                name = node.func.id if isinstance(node.func, ast.Name) else name
                flag = node.args[0].value
                if name.startswith("add") and isinstance(flag, str) and flag.startswith("--"):
                    flags.append(flag)
    return flags


def longest_function(files: Iterable[Path]) -> int:
    """The lines of the longest function, its decorators left out."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return max(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in files
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, kinds)
    )


def bounds() -> list[Bound]:
    """Every bound of the house, measured."""
    package, configs = python_files(PACKAGE), sorted((ROOT / "configs").glob("[a-z]*.py"))
    tests = count_lines(python_files(ROOT / "tests"))
    variants = [path for path in configs if "base.get_config()" in path.read_text("utf-8")]
    return [
        Bound("package, lines", count_lines(package), 18_500 + FEATURE_LINES),
        Bound("package, files", len(package), 130),
        Bound("modules at the top", len(list(PACKAGE.glob("*.py"))), 9),
        Bound("import layers", len(layers()), 8),
        Bound("core, lines", count_lines(python_files(*(PACKAGE / p for p in CORE))), 6500),
        Bound("tests, lines", tests, 19_000 + FEATURE_TEST_LINES),
        Bound("config fields", config_fields(), 85),
        Bound("command-line flags", len(declared_flags(package)), 100),
        Bound("variant config, longest", max(count_lines([path]) for path in variants), 25),
        Bound("file of the package, longest", max(count_lines([p]) for p in package), 356),
        Bound("function of the package, longest", longest_function(package), 64),
    ]


def rooms() -> dict[str, set[str]]:
    """Each room of the package and the rooms that it imports; `data` by its four rooms."""
    imports: dict[str, set[str]] = {}
    for path in python_files(PACKAGE):
        here = _room(path.relative_to(PACKAGE).with_suffix("").parts)
        found = imports.setdefault(here, set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            parts = node.module.split(".")
            if parts[0] != "zephyr_jax":
                continue
            names = [alias.name for alias in node.names] if len(parts) < 3 else [""]
            found |= {_room((*parts[1:], name)) for name in names}
    for here, found in imports.items():
        found -= {here, "__init__"}
        found &= set(imports)
    del imports["__init__"]
    return imports


def _room(parts: tuple[str, ...]) -> str:
    """The room of a module: its package, inside `data` the package below."""
    first, second = (*parts, "", "")[:2]
    if first in ("", "__init__", "_version") or (first, second) == ("data", "__init__"):
        return "__init__"
    if first == "data":
        return f"data.{second}"
    return first


def reduced(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports without those that follow from others (transitive reduction)."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for target in imports[open_.pop()] - seen:
                seen.add(target)
                open_.append(target)
        return seen

    return {
        here: {t for t in found if not any(t in reach(other) for other in found - {t})}
        for here, found in imports.items()
    }


def picture() -> str:
    """The house as SVG: a row for each layer, an arrow for each import that no other implies."""
    imports = rooms()
    known = {name for layer in layers() for name in layer} - {"__main__"}
    imports = {
        here: {room for room in found if room.split(".")[0] in known}
        for here, found in imports.items()
        if here.split(".")[0] in known
    }
    rows = []
    for layer in layers():
        row = [room for name in layer for room in sorted(imports) if room.split(".")[0] == name]
        if "data.packing" in row:  # these are layers of their own inside `data`
            above, below = ["data.packing", "data.prepare"], ["data.tokenizer_files"]
            row = [room for room in row if room not in above + below]
            rows += [[room] for room in above]
            rows += [row, below]
        else:
            rows.append(row)
    width, height, gap = 1040, 86, 18
    center: dict[str, tuple[float, float]] = {}
    boxes = []
    for number, row in enumerate(rows):
        sizes = [24 + 9 * len(room) for room in row]
        x = (width - sum(sizes) - gap * (len(row) - 1)) / 2
        y = 20 + number * height
        for room, size in zip(row, sizes, strict=True):
            center[room] = (x + size / 2, y + 16)
            boxes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{size}" height="32" rx="6"/>'
                f'<text x="{x + size / 2:.0f}" y="{y + 21}">{room}</text>'
            )
            x += size + gap
    arrows = []
    for here, found in sorted(reduced(imports).items()):
        for target in sorted(found):
            (x1, y1), (x2, y2) = center[here], center[target]
            if y1 == y2:
                continue
            arrows.append(
                f'<path d="M{x1:.0f} {y1 + 16:.0f} C{x1:.0f} {y1 + 50:.0f} '
                f'{x2:.0f} {y2 - 50:.0f} {x2:.0f} {y2 - 18:.0f}"/>'
            )
    total = 20 + len(rows) * height
    style = (
        "rect{fill:#eef3f6;stroke:#546e7a}text{font:14px sans-serif;text-anchor:middle;fill:#222}"
        "path{fill:none;stroke:#90a4ae;marker-end:url(#tip)}"
        "@media(prefers-color-scheme:dark){rect{fill:#263238}text{fill:#eee}}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><polygon points="0,0 8,4 0,8" fill="#90a4ae"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" '
        f'aria-label="Rooms of zephyr_jax and what they import"><style>{style}</style>'
        f"<defs>{tip}</defs>\n" + "\n".join(arrows + boxes) + "\n</svg>\n"
    )


def main(arguments: list[str]) -> int:
    """The exit status: 1 where a bound is broken, 2 for an unknown command."""
    if arguments == ["picture"]:
        PICTURE.write_text(picture(), "utf-8")
        sys.stdout.write(f"{PICTURE.relative_to(ROOT)} is written\n")
        return 0
    if arguments != ["size"]:
        sys.stderr.write(f"usage: {__doc__}")
        return 2
    measured = bounds()
    for name, value, most in measured:
        mark = "ok" if value <= most else f"over by {value - most:,}"
        sys.stdout.write(f"{name:<34} {value:>7,}  at most {most:>7,}  {mark}\n")
    return int(any(value > most for _, value, most in measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
