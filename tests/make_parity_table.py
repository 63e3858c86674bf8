"""Makes the table of docs/parity.md: the largest error of every cell.

    PYTHONPATH=. python tests/make_parity_table.py

Run where `make parity` installed its packages; takes several minutes.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import jax
from cells import FACTORS, Cell, every_cell

TESTS = Path(__file__).parent
FILE = TESTS.parent / "docs" / "parity.md"


def main() -> None:
    """Writes the table and the packages' versions into the page, whose text stays."""
    cells, page = every_cell(), FILE.read_text()
    assert f"{len(cells)} cells" in page, f"{FILE} should speak of {len(cells)} cells"
    page = re.sub(r"^\| groups (?:.*\n\|)*.*\n", _table(cells) + "\n", page, flags=re.MULTILINE)
    packages = ", ".join(map(_version, ("jax", "torch", "transformers")))
    FILE.write_text(re.sub("^Packages: .*$", f"Packages: {packages}.", page, flags=re.MULTILINE))


def row_of(cell: Cell) -> str:
    """How the table names a cell."""
    return " | ".join(_shown(getattr(cell, name)) for name in FACTORS)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0e}".replace("e+0", "e")
    return {"None": "none", "False": "no", "True": "yes"}.get(str(value), str(value))


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _table(cells: list[Cell]) -> str:
    from matrix import ATTENTIONS, TOLERANCES, errors

    def row(name: str, figures: dict[str, float]) -> str:
        shown = (f"{figures[key]:.1e}" if key in figures else "" for key in TOLERANCES)
        return f"| {name} | {' | '.join(shown)} |"

    rows, largest = [], dict.fromkeys(TOLERANCES, 0.0)
    for i, cell in enumerate(cells):
        runs = [errors(cell, attention=attention) for attention in ATTENTIONS]
        both = {key: max(run[key] for run in runs) for key in runs[0]}
        largest |= {key: max(largest[key], error) for key, error in both.items()}
        rows.append(row(row_of(cell), both))
        sys.stderr.write(f"\r{i + 1} of {len(cells)} cells")
    blank, columns = " | " * (len(FACTORS) - 1), [*FACTORS, *TOLERANCES]
    above = row("tolerance" + blank, TOLERANCES), row("largest of all" + blank, largest)
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *above, *rows])


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS / "parity"))
    # As in conftest.py: a cell takes seconds to compile, and nothing to run.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
