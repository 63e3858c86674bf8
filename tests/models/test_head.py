"""The head in blocks against the plain form: logits of everything, then log-softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_MESH, device_mesh

from zephyr_jax.losses.tokens import token_logps
from zephyr_jax.models import head
from zephyr_jax.models.head import head_scores
from zephyr_jax.models.layers import linear
from zephyr_jax.sharding import named_sharding, spec, weight_spec

B, T, D, V = 8, 11, 6, 46


def plain_logits(hidden, weight, tied):
    return linear("BTD,VD->BTV" if tied else "BTD,DV->BTV", hidden, weight, "float32", "float32")


def plain(hidden, weight, tokens, mask, tied=False):
    return token_logps(plain_logits(hidden, weight, tied), tokens, mask)


def blocked(hidden, weight, tokens, mask, tied=False):
    return head_scores(hidden, weight, tokens, mask, tied=tied).logps


def case(share=0.5, tied=False, dtype=jnp.float32, v=V):
    """Hidden states, weight, tokens, a mask of some targets, and what the log-probs are worth."""
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(v, D) if tied else (D, v)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, v, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < share) & (jnp.arange(B)[:, None] != 2)
    return hidden, weight, tokens, mask, jnp.asarray(rng.normal(size=(B, T)), jnp.float32)


def value_and_grads(form, worth, tied=False):
    def total(hidden, weight, tokens, mask, worth):
        logps = form(hidden, weight, tokens, mask, tied)
        return (worth * logps).sum(), logps

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of tokens and cuts of the vocabulary, the last ones smaller."""
    monkeypatch.setattr(head, "block_size", lambda tokens: min(7, tokens))
    monkeypatch.setattr(head, "VOCAB_AT_ONCE", 10)


def assert_same(got, want, rtol=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=rtol * max(np.abs(b).max(), 1e-30), rtol=rtol)


@pytest.mark.parametrize("kept", [B * T * V, B * T * V - 1])
@pytest.mark.parametrize(("share", "tied"), [(0.0, False), (0.4, True), (1.0, False)])
def test_log_probs_and_gradients_are_those_of_the_plain_form(share, tied, kept, monkeypatch):
    monkeypatch.setattr(head, "KEPT_LOGITS", kept)
    *inputs, worth = case(share, tied)
    (_, want), want_grads = value_and_grads(plain, worth, tied)(*inputs, worth)
    (_, got), grads = value_and_grads(blocked, worth, tied)(*inputs, worth)
    assert_same((got, grads), (want, want_grads))
    alone = jax.jit(blocked, static_argnums=4)(*inputs, tied)
    np.testing.assert_array_equal(got, alone)  # the same to the bit without a gradient


def test_bfloat16_factors_are_multiplied_as_in_the_plain_form():
    *inputs, worth = case(0.6, dtype=jnp.bfloat16)
    (_, want), want_grads = value_and_grads(plain, worth)(*inputs, worth)
    (_, got), grads = value_and_grads(blocked, worth)(*inputs, worth)
    assert got.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    assert_same(got, want, 1e-5)
    wide = [[g.astype(jnp.float32) for g in pair] for pair in (grads, want_grads)]
    assert_same(*wide, 2**-7)


def on_mesh(arrays, weight_axes="DV"):
    """Hidden states, weight, tokens, mask and worth on the ambient mesh."""
    over = [spec("BTD"), weight_spec(weight_axes), *[spec("BT")] * 3]
    return [
        jax.device_put(x, named_sharding(partition))
        for x, partition in zip(jax.device_get(arrays), over, strict=True)
    ]


@pytest.mark.usefixtures("sharded_mesh")
@pytest.mark.parametrize("tied", [False, True])
def test_every_mesh_has_the_same_log_probs_and_gradients(tied, monkeypatch):
    monkeypatch.setattr(head, "KEPT_LOGITS", 0 if tied else 1 << 27)
    *inputs, worth = case(0.5, tied)
    with jax.set_mesh(NO_MESH):
        (_, want), want_grads = value_and_grads(plain, worth, tied)(*inputs, worth)
    sharded = on_mesh((*inputs, worth), "VD" if tied else "DV")
    (_, got), grads = value_and_grads(blocked, worth, tied)(*sharded)
    assert_same(jax.device_get((got, grads)), (want, want_grads))
    assert jax.typeof(grads[1]).sharding.spec == weight_spec("VD" if tied else "DV")


def test_a_sharded_vocabulary_is_never_gathered():
    *inputs, worth = case(0.5)
    with jax.set_mesh(device_mesh(1, 1, 2)):
        sharded = on_mesh((*inputs, worth))
        text = value_and_grads(blocked, worth).lower(*sharded).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_squares_are_those_of_the_logits():
    hidden, weight, tokens, mask, worth = case(0.3)
    logps = jax.nn.log_softmax(plain_logits(hidden, weight, False))
    both = jax.nn.logsumexp(2 * logps, axis=-1)[:, :-1]
    want = np.where(mask, np.pad(both, ((0, 0), (1, 0))), 0)
    want[:, 0] = 0
    scores = head_scores(hidden, weight, tokens, mask, squares=True)
    assert_same(scores.squares, want, 2e-6)
    assert_same(scores.logps, blocked(hidden, weight, tokens, mask))

    def total(hidden):
        return (worth * head_scores(hidden, weight, tokens, mask, squares=True).squares).sum()

    np.testing.assert_array_equal(jax.grad(total)(hidden), 0)


def test_prompts_and_padding_are_not_read():
    """What no target needs may be anything; here it would spoil every sum that it entered."""
    *inputs, worth = case(0.4)
    hidden, weight, tokens, mask = inputs
    predicts = np.pad(np.asarray(mask)[:, 1:], ((0, 0), (0, 1)))
    spoiled = jnp.where(predicts[..., None], hidden, jnp.nan)
    want = value_and_grads(blocked, worth)(*inputs, worth)
    assert_same(value_and_grads(blocked, worth)(spoiled, weight, tokens, mask, worth), want)
    full = (np.arange(B * T) < 14).reshape(B, T)  # two whole blocks of predictors
    mask = jnp.pad(jnp.asarray(full)[:, :-1], ((0, 0), (1, 0)))
    spoiled = jnp.where(jnp.asarray(full)[..., None], hidden, jnp.nan)
    assert np.isfinite(blocked(spoiled, weight, tokens, mask)).all()


def test_it_needs_a_quarter_of_the_memory(monkeypatch):
    """With T = 2,048 and V = 32,000, more logits than are kept; what is compiled is not run."""
    monkeypatch.undo()
    shapes = [((3, 2048, 1024), "bfloat16"), ((1024, 32000), "float32")]
    shapes += [((3, 2048), "int32"), ((3, 2048), "bool"), ((3, 2048), "float32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def temporaries(form):
        compiled = value_and_grads(form, None).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(blocked) <= temporaries(plain) / 4
