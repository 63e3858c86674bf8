"""Continuations of contexts: computed once where they begin alike, scored as if each were alone."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_MESH, device_mesh, random_params
from test_evaluate import alone

import zephyr_jax as zj
from zephyr_jax.evaluation import scoring
from zephyr_jax.evaluation.lm_harness import score_continuations
from zephyr_jax.evaluation.scoring import SequenceTargets, attention_for, share_prefixes
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.weights.checkpoint import Model

LENGTH = 32  # the model's positions


@pytest.fixture(scope="module")
def model(tok):
    """Its window is shorter than most contexts."""
    sizes = {"sliding_window": 7, "initializer_range": 0.2, "max_position_embeddings": LENGTH}
    cfg = dataclasses.replace(zj.MistralConfig.tiny(), vocab_size=380, **sizes)
    return Model(cfg, random_params(cfg), tok, {})


@pytest.fixture(scope="module")
def requests():
    """Questions behind two sets of examples, with 2 to 5 choices each; some are too long."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, 380, n).tolist()  # noqa: E731
    examples, out = [draw(9), draw(14)], []
    for i in range(12):
        begin = [*examples[i % 2], *draw(rng.integers(1, 9))] if i < 9 else []
        question = begin or draw(1 + 20 * (i % 2))
        out += [(question, draw(rng.integers(1, 7))) for _ in range(rng.integers(2, 6))]
    out += [(draw(40), draw(5)), (draw(3), draw(LENGTH)), out[3], (out[0][0], out[0][1][:1])]
    return out


def one_by_one(model, requests):
    """The sum of each request's log-probs, and whether all are likeliest."""
    rows = [[*context, *continuation][-LENGTH - 1 :] for context, continuation in requests]
    sizes = [len(row) - len(own) for row, (_, own) in zip(rows, requests, strict=True)]
    masks = [np.arange(len(row)) >= n for row, n in zip(rows, sizes, strict=True)]
    logps, mask, likeliest = alone(model, rows, masks, LENGTH + 1)
    return logps.sum(axis=1), (likeliest | ~mask[:, 1:]).all(axis=1)


@pytest.mark.parametrize("shape", [None, (1, 2, 2)])
def test_scores_are_those_of_each_request_alone(model, requests, shape):
    context = jnp.asarray([requests[0][0]])
    last = np.asarray(zj.forward(model.cfg, model.params, context))[0, -1]
    greedy = [[int(x)] for x in np.argsort(-last)[:2]]
    every = [*requests, *((requests[0][0], ids) for ids in greedy)]
    logps, likeliest = one_by_one(model, every)
    usage = collections.Counter()
    with jax.set_mesh(device_mesh(*shape) if shape else NO_MESH):
        if shape:
            model = model._replace(params=jax.device_put(model.params, param_shardings(model.cfg)))
        found = score_continuations(model, every, seq_len=48, n_rows=4, usage=usage)
    np.testing.assert_allclose([x for x, _ in found], logps, rtol=1e-5)
    assert [x for _, x in found] == likeliest.tolist()
    assert [x for _, x in found][-2:] == [True, False]
    separately = sum(min(LENGTH, len(a) + len(b) - 1) for a, b in every)
    assert usage["tokens"] < separately / 2


def test_examples_longer_than_a_row_are_computed_once(model):
    requests = [([*range(3, 27), 30 + i], [40, 41]) for i in range(4)]
    usage = collections.Counter()
    found = score_continuations(model, requests, seq_len=16, n_rows=2, usage=usage)
    np.testing.assert_allclose([x for x, _ in found], one_by_one(model, requests)[0], rtol=1e-5)
    assert usage["tokens"] == 24 + 4 * 2


def test_questions_behind_the_same_examples_are_branches_of_them():
    examples = tuple(range(20))
    sequences = [SequenceTargets((*examples, 50 + i, 60), [(1,)]) for i in range(6)]
    (document,) = share_prefixes(sequences, 64)
    assert (document.prefix, document.length) == (20, 32)
    row = document.document()
    assert row.branches.tolist() == [0] * 20 + [1 + i // 2 for i in range(12)]
    assert row.positions.tolist() == [*range(20), *([20, 21] * 6)]
    two = share_prefixes(sequences, 30)  # as many as fit into one
    assert [len(x.members) for x in two] == [5, 1]
    (joined,) = share_prefixes([SequenceTargets((0, i, *range(9)), [(1,)]) for i in (3, 4)], 64)
    assert joined.length == 21  # one token saved is one token saved
    (one,) = share_prefixes([SequenceTargets((1, 2, 3), [(7,), (8,), (9,)])], 10)
    assert one.length == 3  # choices of one token cost no more than their question
    assert [(at, token) for _, at, token in one.targets()] == [(2, 7), (2, 8), (2, 9)]


def test_a_document_has_no_more_branches_than_a_byte_counts():
    sequences = [SequenceTargets((1, 2, 3, i), [(1,)]) for i in range(600)]
    documents = share_prefixes(sequences, 4096)
    assert [len(x.members) for x in documents] == [255, 255, 90]
    assert documents[0].document().branches.max() == 255


def test_splash_never_runs_twice_over_more_than_two_branches(monkeypatch):
    assert attention_for(True, 4096, None) == "auto"
    monkeypatch.setattr(scoring, "platform", lambda: "tpu")
    rows = ((2049, None), (2048, 2047), (2048, None), (2048, 2048), (100, 4096))
    assert [attention_for(True, *row) for row in rows] == ["tiled"] * 2 + ["auto"] * 3
    assert attention_for(False, 4096, 100) == "auto"


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1] * (LENGTH + 1))])
def test_requests_without_an_answer_are_refused(model, request_):
    with pytest.raises(ValueError, match="it needs at least 1 of both, and at most 32"):
        score_continuations(model, [request_], seq_len=64, n_rows=1, usage=collections.Counter())
