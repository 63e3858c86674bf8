"""Makes tests/stored/mistral_oracle.npz: what transformers and torch compute in a dozen cells.

    PYTHONPATH=. python tests/make_oracles.py

Run where torch and transformers are installed (`make parity` installs them); the file is committed,
so that `make test` needs neither. Weights and tokens are drawn by NumPy (cells.py) and not stored;
of each parameter's gradient every seventh entry is, which leaves no row, head or layer out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from cells import DOZEN

TESTS = Path(__file__).parent
FILE = TESTS / "stored" / "mistral_oracle.npz"


def sample(gradient: np.ndarray) -> np.ndarray:
    """The entries of a parameter's gradient that are stored."""
    return gradient.reshape(-1)[::7]


def main() -> None:
    """Writes the file."""
    sys.path.insert(0, str(TESTS / "parity"))
    from matrix import theirs

    arrays: dict[str, np.ndarray | float] = {}
    for cell in DOZEN:
        out = theirs(cell)
        arrays |= {f"{cell}/logits": out.logits, f"{cell}/loss": out.loss}
        arrays |= {f"{cell}/grad/{name}": sample(grad) for name, grad in out.grads.items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
