import numpy as np
import pytest

from zephyr_jax.training.metrics import Meter


@pytest.mark.parametrize("size", [1, 3, 8])
def test_means_depend_on_the_examples_alone_however_they_are_cut(size):  # pitfall 22
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 50, 10).astype(float)
    losses = rng.uniform(0, 9, 10)
    meter = Meter()
    for start in range(0, 16, size):  # the last parts lack examples, as padded batches do
        here = slice(start, start + size)
        weight = targets[here].sum()
        meter.add({"loss": losses[here] @ targets[here], "weight": weight, "tokens": 2 * weight})
    means = meter.means()
    assert list(means) == ["loss"]
    np.testing.assert_allclose(means["loss"], losses @ targets / targets.sum(), rtol=1e-12)
    assert meter.steps == -(-16 // size)
    assert meter.total("tokens") == 2 * targets.sum()
