import json
from pathlib import Path

import numpy as np
import pytest
from test_chat import OURS

from zephyr_jax.data.packing import packing
from zephyr_jax.data.text.chat import render_pair

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # not in this repository


def test_best_fit_leaves_little_room():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 40, 500)]
    bins = packing.best_fit(lengths, 64)
    assert len(bins) <= 1.02 * sum(lengths) / 64 + 1
    assert bins == packing.best_fit(lengths, 64)
    assert packing.best_fit([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]  # the tightest room
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        packing.best_fit([9], 8)


def test_dialogues_end_at_their_last_target():
    document = packing.dialogue_document([1, 5, 6, 2, 9, 9], [0, 0, 1, 1, 0, 0], 10)
    assert list(document.tokens) == [1, 5, 6, 2]
    assert list(document.loss_mask) == [False, False, True, True]
    cut = packing.dialogue_document([1, 5, 6, 2], [0, 0, 1, 1], 3)
    assert list(cut.tokens) == [1, 5, 6]
    assert len(packing.dialogue_document([1, 5, 6], [0, 0, 1], 2).tokens) == 0
    assert not packing.dialogue_document([1, 5], [1, 1], 2).loss_mask[0]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((6, 5, 2), (4, 4, 2)),  # prompt first, then both answers to the same cap
        ((3, 4, 1), (3, 4, 1)),  # fits
        ((6, 2, 1), (6, 2, 1)),  # fits exactly: nothing is cut
        ((6, 3, 1), (4, 3, 1)),  # the prompt alone suffices
        ((2, 9, 9), (2, 4, 4)),  # a short prompt does not lend its room, as published
    ],
)
def test_cut_pair(lengths, kept):
    parts = [list(range(k, k + n)) for k, n in zip((1, 20, 40), lengths, strict=True)]
    prompt, chosen, rejected = parts
    cut = packing.cut_pair(*parts, 8, 4, bos=True)
    assert tuple(map(len, cut)) == kept
    assert cut[0][0] == 1  # the BOS stays
    assert cut[0][-1] == prompt[-1]
    assert cut[1] == chosen[: kept[1]]
    assert cut[2] == rejected[: kept[2]]
    without_bos, *_ = packing.cut_pair(*parts, 8, 4, bos=False)
    assert without_bos == prompt[-kept[0] :]


def test_pair_document_layout():
    document = packing.pair_document([1, 7], [8, 2], [9, 2], 5)
    assert list(document.tokens) == [1, 7, 8, 2, 7, 9, 2]
    assert list(document.positions) == [0, 1, 2, 3, 1, 2, 3]
    assert list(document.branches) == [0, 1, 1, 1, 2, 2, 2]
    assert list(document.loss_mask) == [False, False, True, True, False, True, True]


def test_batches_of_an_epoch_are_exact_level_and_shuffled_again():
    lengths = [int(n) for n in np.random.default_rng(3).gamma(2, 150, 1030)]
    first = packing.level_batches(lengths, 64, 0, 0)
    assert [len(b) for b in first] == [64] * 16 + [6]
    assert sorted(i for b in first for i in b) == list(range(1030))
    totals = np.array([sum(lengths[i] for i in b) for b in first[:-1]])
    dealt_blindly = np.array([sum(lengths[i * 64 : i * 64 + 64]) for i in range(16)])
    assert totals.std() < dealt_blindly.std() / 3
    assert first == packing.level_batches(lengths, 64, 0, 0)
    second = packing.level_batches(lengths, 64, 0, 1)
    assert not {frozenset(b) for b in first} & {frozenset(b) for b in second}


def test_a_stream_is_cut_into_full_rows_and_loses_only_its_end():
    rng = np.random.default_rng(4)
    for n, seq_len in ((1, 5), (40, 8), (40, 64), (3, 200)):
        lengths = rng.integers(1, 30, n)
        documents = [np.stack([np.full(k, i), np.arange(k)], 1) for i, k in enumerate(lengths)]
        plan, skips = packing.cut_stream(lengths, seq_len, 7)
        assert len(plan) == lengths.sum() // seq_len
        stream = []
        for row, skip in zip(plan, skips, strict=True):
            tokens = np.concatenate([documents[i] for i in row])[skip:][:seq_len]
            assert len(tokens) == seq_len
            assert skip < lengths[row[0]]
            assert lengths[row[:-1]].sum() - skip < seq_len  # every document has a part in it
            stream += map(tuple, tokens.tolist())
        assert len(set(stream)) == len(stream)
        order = list(dict.fromkeys(document for document, _ in stream))
        whole = [(i, k) for i in order for k in range(lengths[i])]
        assert whole[: len(stream)] == stream  # each document from its start, to its end
        assert packing.cut_stream(lengths, seq_len, 7) == (plan, skips)
    assert packing.cut_stream(lengths, 2, 8) != packing.cut_stream(lengths, 2, 7)
    assert packing.cut_stream([], 8, 0) == ([], [])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared samples")
def test_a_pair_costs_two_fifths_of_what_padding_makes_it_cost(mistral):
    """Against eight pairs padded to their longest sequence, the mean of forty orders."""
    lines = (SHARED / "ultrafeedback_binarized_train_prefs_1000.jsonl").read_text().splitlines()
    pairs = []
    for row in map(json.loads, lines):
        answers = [row[name][-1]["content"] for name in ("chosen", "rejected")]
        if answers[0].strip() != answers[1].strip():
            ids = render_pair(mistral, row["chosen"][:-1], *answers, **OURS)
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
