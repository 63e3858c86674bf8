"""How many tokens a step computes for a pair, on real UltraFeedback pairs, where they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from sample_tokenizers import mistral_tokenizer

from zephyr_jax.data.packing import packing
from zephyr_jax.data.text.chat import render_pair

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CHAT = {"bos": True, "append_eos": False, "empty_system": False, "parse_special": False}


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared samples")
def test_a_pair_costs_two_fifths_of_what_padding_makes_it_cost():
    """Against eight pairs padded to their longest sequence, the mean of forty orders."""
    lines = (SHARED / "ultrafeedback_binarized_train_prefs_1000.jsonl").read_text().splitlines()
    tok, pairs = mistral_tokenizer(), []
    for row in map(json.loads, lines):
        answers = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        if answers[0].strip() != answers[1].strip():
            ids = render_pair(tok, row["chosen"][:-1], *answers, **CHAT)
            pairs.append(packing.cut_pair(*ids, 1024, 512, True))
    longest = np.array([len(p) + max(len(c), len(r)) for p, c, r in pairs])
    full, padded = len(pairs) // 8 * 8, []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(len(pairs))[:full].reshape(-1, 8)
        padded.append(16 * longest[order].max(axis=1).sum() / full)
    lengths = [len(p) + len(c) + len(r) + 1 for p, c, r in pairs]
    batches = [packing.level_batches(lengths, 128, 0, epoch) for epoch in range(3)]
    plan = [[packing.rows_of(lengths, batch, 2048) for batch in epoch] for epoch in batches]
    assert {len(batch) for epoch in plan for batch in epoch[:-1]} <= {45, 46}
    needed = max(len(batch) for epoch in plan for batch in epoch)
    for shards, bound in ((1, 0.415), (8, 0.435), (16, 0.435)):
        packed = packing.round_up(needed, shards) * 2048 / 128
        assert packed / np.mean(padded) <= bound, shards
