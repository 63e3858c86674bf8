"""A dozen cells of the parity matrix against the stored values of transformers and torch."""

import numpy as np
import pytest
from cells import DOZEN, ORACLE, every_cell, ours, sample
from make_parity_table import FILE as TABLE
from make_parity_table import row_of

CELLS = [*DOZEN[::2], *(pytest.param(c, marks=pytest.mark.slow) for c in DOZEN[1::2])]


def test_the_published_table_has_every_cell():
    rows = TABLE.read_text().splitlines()
    for cell in every_cell():
        assert any(row.startswith(f"| {row_of(cell)} |") for row in rows), cell


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_logits_loss_and_gradients_equal_transformers(cell):  # pitfalls 29, 30, 32, 33, 35, 36, 37
    our = ours(cell)
    with np.load(ORACLE) as oracle:
        names = [name for name in oracle if name.startswith(f"{cell}/")]
        stored = {name.removeprefix(f"{cell}/"): oracle[name] for name in names}
    assert np.abs(stored["logits"]).max() > 3
    np.testing.assert_allclose(our.logits, stored["logits"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(our.loss, stored["loss"], rtol=1e-5)
    assert {f"grad/{name}" for name in our.grads} == stored.keys() - {"logits", "loss"}
    for name, got in our.grads.items():
        want = stored[f"grad/{name}"]
        scale = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(sample(got), want, atol=scale, rtol=0, err_msg=name)
