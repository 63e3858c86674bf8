"""The parity matrix, live: a dozen cells always, the cells of all triples of values when slow."""

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("transformers", reason="`make parity` installs transformers")

from cells import DOZEN, every_cell
from matrix import ATTENTIONS, TOLERANCES, errors

pytestmark = pytest.mark.parity


CELLS = [pytest.param(x, marks=[] if x in DOZEN else pytest.mark.slow) for x in every_cell()]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_three_values_together_equal_transformers(cell, attention):
    largest = errors(cell, attention=attention)
    assert largest.keys() >= TOLERANCES.keys() - {"packed pass"}
    assert {k: v for k, v in largest.items() if not v <= TOLERANCES[k]} == {}
