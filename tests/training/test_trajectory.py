"""50 steps of SFT and 50 of DPO by `fit` give the stored curves, which agree with TRL's.

tests/parity/test_trajectory_live.py compares with TRL itself. Stored again, after a change that is
meant to change them, by `python benchmarks/trajectory/run.py --store`.
"""

from pathlib import Path

import pytest
from trajectory_modules import FOLDER, curves, ours, sets

import zephyr_jax as zj
from zephyr_jax.data.text.chat import render_chat, render_pair

STORED = Path(__file__).parents[1] / "stored" / "trajectory.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("trajectory")
    return root, ours.train(root)


@pytest.mark.slow
@pytest.mark.parametrize("stage", curves.NAMES)
def test_the_curves_are_the_stored_ones(run, stage):
    stored = curves.read(STORED)["zephyr_jax"]
    assert tuple(stored[stage]) == curves.NAMES[stage]
    for gap in curves.gaps({stage: stored[stage]}, run[1]):
        assert gap.share <= curves.BOUND, gap


def test_the_stored_curves_are_theirs_too():
    """What is stored here, and what was committed of both sides, are the same run."""
    results = curves.read(FOLDER / "results.json")
    for who in ("zephyr_jax", "transformers + TRL"):
        for gap in curves.gaps(curves.read(STORED)["zephyr_jax"], results[who]):
            assert gap.share <= curves.BOUND, (who, gap)


@pytest.mark.slow
def test_the_losses_fall_far_enough_for_the_comparison_to_mean_something(run):
    falls = curves.falls(run[1])
    assert set(falls) == set(curves.NAMES)
    assert min(falls.values()) >= curves.FALL


@pytest.mark.slow
def test_what_the_other_side_is_fed_is_what_the_texts_render_to(run):
    """Independently of rows and segments: rendered once more, as documents."""
    root = run[0]
    tok = zj.Tokenizer.from_file(root / "tokenizer.model")
    how = {"bos": True, "parse_special": False, "append_eos": False, "empty_system": False}
    rendered = [render_chat(tok, row["messages"], **how) for row in sets.dialogues(ours.DIALOGUES)]
    ends = {tuple(ids[: len(mask) - mask[::-1].index(1)]): mask for ids, mask in rendered}
    steps = ours.batches("sft", root)
    for dialogue in (dialogue for step in steps for dialogue in step):
        mask = ends[tuple(dialogue.ids)]
        assert [int(target) for target in dialogue.targets] == mask[: len(dialogue.ids)]
    pairs = {
        tuple(map(tuple, render_pair(tok, [prompt], row["chosen"], row["rejected"], **how)))
        for row in sets.pairs(ours.PAIRS)
        for prompt in [{"role": "user", "content": row["prompt"]}]
    }
    found = [tuple(map(tuple, pair)) for step in ours.batches("dpo", root) for pair in step]
    assert set(found) <= pairs
    assert len(set(found)) > 0.9 * ours.PAIRS  # the rest is held out, or left at the end


@pytest.mark.slow
def test_packing_and_sharing_are_at_work(run):
    """Otherwise equal curves would say nothing of them."""
    steps = ours.batches("sft", run[0])
    rows = ours.config_of("sft", run[0]).train.batch_size
    assert len({len(step) for step in steps}) > 1
    assert all(len(step) > rows for step in steps)
    assert ours.config_of("dpo", run[0]).dpo.reference == "precomputed"
    assert len({len(step) for step in ours.batches("dpo", run[0])}) > 1  # an epoch's last is short
