"""Makes the tables of docs/parity.md: the largest error of every cell, and the comparison of ids.

    PYTHONPATH=. python tests/make_parity_table.py

Run where `make parity` installed its packages; takes several minutes. ZEPHYR_HF4_PYTHON names the
Python that has transformers 4.57 (default: that of .venv-hf4, which make slow makes).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from cells import FACTORS, Cell, every_cell

TESTS = Path(__file__).parent
FILE = TESTS.parent / "docs" / "parity.md"


def main() -> None:
    """Writes the tables and the packages' versions into the page, whose text stays."""
    import token_ids

    cells, cases, page = every_cell(), token_ids.cases(), FILE.read_text()
    counts = f"{len(cells)} cells", f"{len(cases.texts):,} texts", f"{len(cases.chats)} chats"
    absent = [count for count in counts if count not in page]
    assert not absent, f"{FILE} should speak of {absent}"
    page = with_table(page, "The same ids", _ids(cases))  # may find that something is missing
    page = with_table(page, "The same function", _table(cells))
    packages = ", ".join(map(_version, ("jax", "torch", "transformers", "tokenizers")))
    FILE.write_text(re.sub("^Packages: .*$", f"Packages: {packages}.", page, flags=re.MULTILINE))


def with_table(page: str, heading: str, table: str) -> str:
    """The page with this table in place of the first one under a heading."""
    old = rf"(?<=^## {heading}\n)((?:(?!\|).*\n)*)(?:\|.*\n)+"
    return re.sub(old, lambda found: f"{found[1]}{table}\n", page, count=1, flags=re.MULTILINE)


def row_of(cell: Cell) -> str:
    """How the table names a cell."""
    return " | ".join(_shown(getattr(cell, name)) for name in FACTORS)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0e}".replace("e+0", "e")
    words = {"None": "none", "False": "no", "True": "yes"}
    return words.get(str(value), str(value))


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


def _ids(cases: Any) -> str:
    import token_ids
    from sample_tokenizers import mistral_tokenizer, train_model

    from zephyr_jax.data.text.tokenizer import SentencePieceTokenizer

    python = token_ids.python_of_transformers_4()
    if not python:
        sys.exit("no transformers 4.57: run make slow first, or set ZEPHYR_HF4_PYTHON")
    program = "import transformers; print(transformers.__version__)"
    version = subprocess.check_output([python, "-c", program], text=True).strip()
    readers = {
        _version("transformers"): token_ids.transformers_ids,
        f"transformers {version}": functools.partial(token_ids.transformers_ids, python=python),
        f"llama.cpp ({_version('xllamacpp')})": token_ids.llama_cpp_ids,
    }
    small = SentencePieceTokenizer(train_model())
    tokenizers = {"Mistral's tokenizer": mistral_tokenizer(), "one of 420 tokens": small}
    lines = [f"| differing | {' | '.join(tokenizers)} |", "|---" * (len(tokenizers) + 1) + "|"]
    for name, reader in readers.items():
        counts = []
        for tok in tokenizers.values():
            with tempfile.TemporaryDirectory() as folder:
                theirs = reader(tok, cases, Path(folder) / "export.gguf")
            ours = token_ids.our_ids(tok, cases)
            counts.append(len(token_ids.differing(cases, ours, theirs)))
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS / "parity"))
    # As in conftest.py: a cell takes seconds to compile, and nothing to run.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
