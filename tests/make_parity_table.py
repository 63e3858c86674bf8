"""Makes docs/parity.md: the largest error of every cell of the matrix, and the comparison of ids.

    PYTHONPATH=. python tests/make_parity_table.py

Run where `make parity` installed its packages; takes several minutes. ZEPHYR_HF4_PYTHON names the
Python that has transformers 4.57 (default: that of .venv-hf4, which make slow makes).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from cells import DOZEN, FACTORS, HEADS, Cell, every_cell

TESTS = Path(__file__).parent
FILE = TESTS.parent / "docs" / "parity.md"

PAGE = """\
# Parity with transformers and llama.cpp

Made by `PYTHONPATH=. python tests/make_parity_table.py` in the environment of `make parity`.
Packages: {packages}.

## The same function

`MistralForCausalLM` of transformers (torch, float32, eager attention) and `zj.forward` get the same
random weights (standard deviation 0.2, norm scales that are not 1) and the same two rows of tokens.
The model has {heads} heads, 2 layers, a hidden size of 32 and a vocabulary of 56. Its factors:

{factors}

A row is full, padded on the right or on the left, or packed with three documents; padding holds
tokens like any other. transformers gets padding by an attention mask, and left padding by positions
too; of packed rows it gets every document alone. `packed pass` is the other way: torch runs the
packed rows at once, under a mask of four axes that the test makes, and separating documents by
their positions as transformers does of itself.

There are {count} cells: every three values of different factors occur together in one at least.
The first {dozen} hold every value; `make test` compares them with stored numbers
(`tests/stored/mistral_oracle.npz`, by `tests/parity/matrix.py`), `make parity` live, and
`make slow` compares all. Each figure is the largest over {attentions} attention, in:

* `logits`, `packed pass`: logits of real tokens, absolute; `relative`: divided by 0.1 + |logit|.
* `logps`: log-probs of the targets, absolute, in nats.
* `loss`: against transformers' own, relative; one target in five is left out of it.
* `gradients`: of every parameter against torch's, relative to the largest entry of each.

{table}

## The same ids

{texts} texts (1,000 generated: every run of 1 to 40 blanks in four places, tabs, newlines, code,
digits, emoji, many scripts, combining and invisible characters, long words; and the recorded ones)
and {chats} chats made of them, all without `<s>`, `</s>` and `<unk>`. Compared are the ids of every
text without BOS, and of every chat by the template with it: `Tokenizer.encode` and `render_chat`
here, the exported folder in transformers, the exported GGUF file in llama.cpp. What differs:

{ids}

Nothing is left out. One setting of llama.cpp's server has to be known: a chat whose last message is
the assistant's is taken as the beginning of an answer, and its `</s>` and newline are left off,
unless the server runs with `--no-prefill-assistant`. The comparison sets that.
"""


def main() -> None:
    """Writes the file."""
    import token_ids
    from matrix import ATTENTIONS

    cells, cases = every_cell(), token_ids.cases()
    ids = _ids(cases)  # first: it may find that something is not installed
    factors = (f"* `{name}`: {', '.join(map(_shown, values))}" for name, values in FACTORS.items())
    page = PAGE.format(
        packages=", ".join(map(_version, ("jax", "torch", "transformers", "tokenizers"))),
        heads=HEADS,
        factors="\n".join(factors),
        count=len(cells),
        dozen=len(DOZEN),
        attentions=" and ".join(ATTENTIONS),
        table=_table(cells),
        texts=f"{len(cases.texts):,}",
        chats=len(cases.chats),
        ids=ids,
    )
    FILE.write_text(page)


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
