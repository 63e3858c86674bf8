"""docs/pitfalls.md, the table of mutations and the sources agree; `mutants.py` does the rest."""

import ast
import re
from pathlib import Path

from mutant_table import MUTANTS
from mutants import misfits

TESTS = Path(__file__).parents[1]
REQUIRED = {1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 14, 15, 16, 19, 22, 24, 25, 26, 27, 29, 32, 33, 34}
REQUIRED |= {35, 36, 37, 39, 43, 47}


def rows_of(heading):
    """The cells of each row of the table that follows a heading of docs/pitfalls.md."""
    text = (TESTS.parent / "docs" / "pitfalls.md").read_text()
    part = re.split(r"^#+ ", text.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if re.match(r"\| \d", line)]


def test_every_mutation_fits_its_source_once():
    assert misfits(MUTANTS) == []
    assert not [m for m in MUTANTS if "\n" in m.old + m.new or "|" in m.old + m.new]


def test_every_named_test_exists():
    places = [mutant.test.split("::") for mutant in MUTANTS]
    trees = {file: ast.parse((TESTS / file).read_text()) for file in {file for file, _ in places}}
    for file, name in places:
        functions = {node.name for node in trees[file].body if isinstance(node, ast.FunctionDef)}
        assert name.split("[")[0] in functions, f"{file}::{name}"


def test_the_page_shows_every_mutation():
    shown = [(int(cells[0]), *cells[-2:]) for cells in rows_of("Pitfalls")]
    assert shown == [(m.pitfall, f"`{m.test}`", m.as_markdown()) for m in MUTANTS]
    for cells, mutant in zip(rows_of("Pitfalls"), MUTANTS, strict=True):
        assert len(cells) == 5
        assert cells[2].startswith(f"`{mutant.file}`: ")


def test_no_pitfall_is_left_out():
    with_mutation = {m.pitfall for m in MUTANTS}
    assert with_mutation >= REQUIRED
    without = [int(cells[0]) for cells in rows_of("Without a mutation")]
    assert sorted([*with_mutation, *without]) == list(range(1, 51))
