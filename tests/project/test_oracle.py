"""A dozen cells of the parity matrix against the stored values of transformers and torch."""

import functools

import numpy as np
import pytest
from cells import DOZEN, ORACLE, every_cell, ours, sample
from make_parity_table import FILE as TABLE
from make_parity_table import row_of

our = functools.cache(ours)
QUICK = DOZEN[::2]  # whose gradients are compared in the quick suite


def test_the_published_table_has_every_cell():
    rows = TABLE.read_text().splitlines()
    for cell in every_cell():
        assert any(row.startswith(f"| {row_of(cell)} |") for row in rows), cell


@pytest.mark.parametrize("cell", DOZEN, ids=str)
def test_logits_equal_transformers(cell):  # pitfalls 29, 30, 32, 33, 35, 36, 37
    with np.load(ORACLE) as oracle:
        want = oracle[f"{cell}/logits"]
    assert np.abs(want).max() > 3
    np.testing.assert_allclose(our(cell, cell in QUICK).logits, want, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "cell",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in DOZEN],
    ids=str,
)
def test_loss_and_gradients_equal_torch(cell):
    with np.load(ORACLE) as oracle:
        np.testing.assert_allclose(our(cell, True).loss, oracle[f"{cell}/loss"], rtol=1e-5)
        stored = {k: v for k, v in oracle.items() if k.startswith(f"{cell}/grad/")}
    grads = our(cell, True).grads
    assert stored.keys() == {f"{cell}/grad/{name}" for name in grads}
    for name, got in grads.items():
        want = stored[f"{cell}/grad/{name}"]
        scale = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(sample(got), want, atol=scale, rtol=0, err_msg=name)
