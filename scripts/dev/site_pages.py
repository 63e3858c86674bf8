"""Pages of the documentation that MkDocs makes of the source: config fields, notebooks.

A hook of mkdocs.yml. The notebooks' outputs are those that render_notebooks.py stored.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import logging
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
OUTPUTS = NOTEBOOKS / "outputs"
_FIELDS = """# Config fields

Every field of a config file, made from the dataclasses in `zephyr_jax/config/`. On the command line
a field is set by `--config.SECTION.FIELD=VALUE`. A field that is required has to be in the file.
"""


class Field(NamedTuple):
    """One field of a config section, in words."""

    name: str
    type: str
    default: str  # "" for none
    allowed: str
    meaning: str


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those of docs/ (MkDocs calls this)."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    files.append(File.generated(config, "api/fields.md", content=fields_page()))
    for path in sorted(NOTEBOOKS.glob("*.py")):
        uri = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, uri, content=notebook_page(path)))
    for path in sorted(OUTPUTS.glob("*.png")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def fields_page() -> str:
    """The page of all fields, section by section."""
    lines, names = [_FIELDS], dict(sections())
    for section, kind in names.items():
        lines += [f"## {section or 'The run'}", "", inspect.getdoc(kind) or "", ""]
        lines += ["| field | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        for field in fields(kind):
            if section or field.name not in names:  # the sections have their own tables
                default = f"`{field.default}`" if field.default else "(required)"
                cells = [f"`{field.name}`", f"`{field.type}`", default]
                cells += [_cell(field.allowed), _cell(field.meaning)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text for a table's cell, in which nothing is markup but what stands between backticks."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([|<*_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def sections() -> list[tuple[str, type]]:
    """The sections of a config with their dataclasses; "" is the run itself."""
    from zephyr_jax.config.run import RunConfig

    found: list[tuple[str, type]] = [("", RunConfig)]
    for name, hint in typing.get_type_hints(RunConfig).items():
        kinds = typing.get_args(hint) or (hint,)
        found += [(name, kind) for kind in kinds if hasattr(kind, "__dataclass_fields__")]
    return found


def fields(kind: type) -> list[Field]:
    """The fields of a dataclass and of its bases, those without a default first."""
    found: dict[str, Field] = {}
    for base in reversed(kind.__mro__):
        if hasattr(base, "__dataclass_fields__"):
            found |= {field.name: field for field in _own_fields(base)}
    return sorted(found.values(), key=lambda field: bool(field.default))


def _own_fields(kind: Any) -> Iterator[Field]:
    source = inspect.getsource(kind)
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    lines, allowed = source.splitlines(), _allowed(kind, tree)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            default = _default(kind.__dataclass_fields__[name])
            meaning = _comment(lines, node.lineno - 1, (node.end_lineno or node.lineno) - 1)
            hint = ast.unparse(node.annotation)
            values = allowed.get(name) or ("True, False" if hint == "bool" else "")
            if "str" in hint and "`" not in values:  # a rule, without a list of values
                values = "; ".join(filter(None, (_listed(kind, meaning), values)))
            yield Field(name, hint, default, values, meaning)


def _default(field: dataclasses.Field[Any]) -> str:
    """The default as Python writes it; "" for none."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "" if field.default is dataclasses.MISSING else repr(field.default)


def _listed(kind: Any, meaning: str) -> str:
    """The entries of the tables that a comment names: `losses.preference.LOSSES`, or TRACKERS."""
    found = []
    for home, name in re.findall(r"\b([a-z_.]*?)\.?\b([A-Z]{4,})\b", meaning):
        module = f"zephyr_jax.{home}" if home else kind.__module__
        found += list(getattr(importlib.import_module(module), name, ()))
    return _values(found)


def _comment(lines: list[str], first: int, last: int) -> str:
    """The comment lines right above a statement, and what stands behind it."""
    above = first
    while lines[above - 1].strip().startswith("#"):
        above -= 1
    words = [line.strip().removeprefix("# ") for line in lines[above:first]]
    behind = lines[last].partition("  # ")[2]
    return " ".join([*words, behind]).strip()


def _allowed(kind: Any, tree: ast.ClassDef) -> dict[str, str]:
    """Field -> the values that the checks of `__post_init__` let through."""
    module = vars(sys.modules[kind.__module__])
    found: dict[str, list[str]] = {}
    words: dict[str, Any] = {}  # local names that stand for texts
    bodies = [node for node in tree.body if getattr(node, "name", "") == "__post_init__"]
    rules: list[dict[str, str]] = []
    nodes = [node for node in ast.walk(ast.Module(bodies, [])) if isinstance(node, ast.stmt)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        if isinstance(node, ast.Assign):
            words = _texts(node.targets[0], node.value, module, words)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            for values in node.iter.elts:
                own = _texts(node.target, values, module, words)
                rules += [_rule(call, module, own) for call in _calls(node)]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            rules.append(_rule(node.value, module, words))
    for field, rule in (item for each in rules for item in each.items()):
        found.setdefault(field, []).append(rule)
    return {field: "; ".join(dict.fromkeys(texts)) for field, texts in found.items()}


def _texts(target: ast.expr, value: ast.expr, module: Any, words: Any) -> dict[str, Any]:
    """The local names that stand for texts after an assignment."""
    pairs = [(target, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=True))
    after = words | {ast.unparse(name): _text(text, module, words) for name, text in pairs}
    return {name: text for name, text in after.items() if text is not None}


def _text(node: ast.expr, module: Any, words: Any) -> str | None:
    """The text of an expression, without a value behind "=" that only a config has."""
    text = ""
    for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
        value = part.value if isinstance(part, ast.FormattedValue) else part
        try:
            found = eval(ast.unparse(value), module, words)
        except NameError:
            if not text.endswith("="):
                return None
            text = text.removesuffix("=")
            continue
        if not isinstance(found, str):
            return None
        text += found
    return text


def _values(values: Iterable[str]) -> str:
    return ", ".join(f"`{value!r}`" for value in values)


def _calls(node: ast.AST) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


def _rule(call: ast.Call, module: dict[str, Any], words: dict[str, Any]) -> dict[str, str]:
    """What one call of `zephyr_jax.config` says of which fields; {} for other calls."""
    name = ast.unparse(call.func)
    if name == "positive":
        starred = [each.value if isinstance(each, ast.Starred) else each for each in call.args[1:]]
        names = [ast.literal_eval(each) for each in starred]
        flat = [one for each in names for one in (each if isinstance(each, tuple) else (each,))]
        return dict.fromkeys(flat, "above 0")
    if name not in ("choose", "require"):
        return {}
    field = _text(call.args[0 if name == "choose" else 1], module, words)
    if not field:  # of a loop over all fields
        return {}
    field = field.split(".")[-1]
    if name == "require":
        rule = _text(call.args[3], module, words)
        return {field: rule} if rule else {}
    options = call.args[2]
    either = [options.body, options.orelse] if isinstance(options, ast.IfExp) else [options]
    values = [_values(eval(ast.unparse(each), module)) for each in either]
    return {field: "; or a tuple of ".join(values)}


def notebook_cells(path: Path) -> list[tuple[str, str]]:
    """The cells of a notebook in the percent format: "markdown" or "code", and the text."""
    parts = re.split(r"^# %%(.*)\n", path.read_text("utf-8"), flags=re.MULTILINE)[1:]
    cells = []
    for kind, text in zip(parts[0::2], parts[1::2], strict=True):
        if kind.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", text.strip()))
    return cells


def code_digest(path: Path) -> str:
    """A digest of a notebook's code, which changes when its outputs may."""
    code = [text for kind, text in notebook_cells(path) if kind == "code"]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def notebook_page(path: Path) -> str:
    """A notebook as a Markdown page, with the outputs that were stored of it."""
    file = OUTPUTS / f"{path.stem}.json"
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {"cells": {}, "code": ""}
    if stored["code"] != code_digest(path):
        logging.getLogger("mkdocs.site_pages").warning(
            f"the outputs of {path.name} are not those of its code; run "
            f"python scripts/dev/render_notebooks.py {path.stem}"
        )
    lines = []
    for number, (kind, text) in enumerate(notebook_cells(path)):
        if kind == "markdown":
            lines += [_with_math(text), ""]
            if not number:
                source = f"`notebooks/{path.name}`"
                lines += [
                    f"*{source} in the repository: as a script, or as a notebook by jupytext.*",
                    "",
                ]
            continue
        lines += ["```python", text, "```", ""]
        output = stored["cells"].get(str(number), {})
        if output.get("text"):
            lines += ["```text", output["text"], "```", ""]
        for figure in output.get("figures", []):
            lines += [f"![figure of the cell above]({figure})", ""]
    return "\n".join(lines)


def _with_math(text: str) -> str:
    """Formulas between dollars as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]

    def formula(found: re.Match[str]) -> str:
        text = " ".join((found[1] or found[2]).split())
        if found[1]:
            return convert(text, display="block")
        return f"<span>{convert(text)}</span>"  # at the start of a line, too, inside a paragraph

    return re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", formula, text, flags=re.DOTALL)
