"""50 steps of SFT and 50 of DPO beside TRL's own trainers, live: every curve within 1e-4."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trajectory_modules import curves, ours

pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is first imported
    import theirs

    root = tmp_path_factory.mktemp("trajectory")
    return ours.train(root), theirs.train(root)


@pytest.mark.parametrize("stage", curves.NAMES)
def test_every_curve_is_theirs(both, stage):
    one, other = both
    for gap in curves.gaps({stage: one[stage]}, other):
        assert gap.share <= curves.BOUND, gap


def test_their_loss_falls_too(both):
    assert min(curves.falls(both[1]).values()) >= curves.FALL
