"""The parity matrix, live: a dozen cells always, the cells of all triples of values when slow."""

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("transformers", reason="`make parity` installs transformers")

from cells import DOZEN, every_cell
from matrix import ATTENTIONS, TOLERANCES, errors

pytestmark = pytest.mark.parity


def check(cell, attention):
    found = errors(cell, attention=attention)
    assert found.keys() >= TOLERANCES.keys() - {"packed pass"}
    assert {k: v for k, v in found.items() if not v <= TOLERANCES[k]} == {}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", DOZEN, ids=str)
def test_a_dozen_cells_equal_transformers(cell, attention):
    check(cell, attention)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", every_cell()[len(DOZEN) :], ids=str)
def test_every_three_values_together_equal_transformers(cell, attention):
    check(cell, attention)
