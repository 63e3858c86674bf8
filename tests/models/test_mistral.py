import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NO_MESH, device_mesh

import zephyr_jax as zj
from zephyr_jax.models import layers
from zephyr_jax.models.attention import attend
from zephyr_jax.models.cache import init_cache
from zephyr_jax.models.layers import rms_norm, rope, rope_tables
from zephyr_jax.models.masks import row_layout, visible
from zephyr_jax.models.mistral import forward_cached, segment_positions
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import named_sharding, spec

forward = jax.jit(zj.forward, static_argnums=0)


def tokens_of(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 104)


def test_the_7b_has_7241732096_parameters():
    assert zj.count_params(zj.MistralConfig.mistral_7b()) == 7_241_732_096


def test_causality_and_window_by_gradient(cfg, params):  # pitfalls 29, 30
    """One layer: the logits at t depend on exactly the W last inputs, t included."""
    cfg = dataclasses.replace(cfg, num_hidden_layers=1, sliding_window=3)
    params = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    tokens = jnp.arange(9)[None] + 3

    def logits(embed):
        return forward(cfg, params | {"embed": embed}, tokens)[0].sum(-1)

    influence = np.abs(jax.jacobian(logits)(params["embed"])).sum(-1)[:, 3:12]
    seen = influence > 1e-7
    want = np.array([[0 <= t - s < 3 for s in range(9)] for t in range(9)])
    np.testing.assert_array_equal(seen, want)


def test_window_of_three_shows_three_keys():  # pitfall 29
    layout = row_layout(jnp.ones((1, 6), jnp.int32), None, jnp.arange(6)[None])
    mask = visible(layout.queries, layout.keys, 3)
    np.testing.assert_array_equal(mask.sum(-1)[0], [1, 2, 3, 3, 3, 3])


def test_query_head_h_uses_key_head_h_over_group():  # pitfall 35
    rng = np.random.default_rng(0)
    shapes = (1, 2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)
    q, k, v = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    got = attend(q, k, v, jnp.tril(jnp.ones((1, 3, 3), bool))).reshape(4, 3, 4)
    for head in range(4):
        scores = np.einsum("th,sh->ts", q.reshape(4, 3, 4)[head], k[0, head // 2]) / 2
        scores = np.where(np.tril(np.ones((3, 3))), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(got[head], weights @ v[0, head // 2], atol=1e-6)


def test_tensor_axis_must_divide_the_key_heads(cfg):  # pitfall 35
    with (
        jax.set_mesh(device_mesh(1, 1, 8)),
        pytest.raises(ValueError, match="axis K=4 .* tensor=8"),
    ):
        zj.init_params(cfg, jax.random.key(0))


@pytest.mark.parametrize("machine", ["cpu", "tpu"])
def test_rope_pairs_halves_and_is_relative(machine, monkeypatch):  # pitfall 32
    monkeypatch.setattr(layers, "platform", lambda: machine)
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
    cos, sin = rope_tables(jnp.asarray([[5, 9]]), 8, 100.0)
    got = np.asarray(rope(x, cos, sin))
    for t, p in enumerate((5, 9)):
        for i in range(4):
            angle = p * 100.0 ** (-i / 4)
            a, b = float(x[0, 0, t, i]), float(x[0, 0, t, i + 4])
            np.testing.assert_allclose(
                got[0, 0, t, [i, i + 4]],
                [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)],
                atol=1e-5,
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_and_its_gradient_have_the_same_bits_on_every_machine(dtype, monkeypatch):
    x, grad = jax.random.normal(jax.random.key(0), (2, 2, 3, 2, 5, 16)).astype(dtype)
    tables = rope_tables(jnp.asarray([[0, 1, 2, 7, 4000], [3, 4, 5, 6, 7]]), 16, 1e4)

    def halves(x, cos, sin):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[:, None, None], sin[:, None, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    def both(function):
        out, pull = jax.vjp(lambda x: function(x, *tables), x)
        return out, *pull(grad)

    want = both(halves)
    for machine in ("cpu", "tpu"):
        monkeypatch.setattr(layers, "platform", lambda machine=machine: machine)
        for got, expected in zip(both(rope), want, strict=True):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, expected)


def test_theta_is_read(cfg, params):  # pitfall 33
    other = dataclasses.replace(cfg, rope_theta=1e6)
    tokens = tokens_of((1, 9))
    assert abs(forward(cfg, params, tokens) - forward(other, params, tokens)).max() > 1e-2


def test_angles_and_norms_are_float32_under_bfloat16():  # pitfall 34
    cos, sin = rope_tables(jnp.asarray([[4095]]), 8, 10000.0)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(4095.0), atol=1e-4)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(4095.0), atol=1e-4)
    x = (1 + jnp.arange(512) / 512).astype(jnp.bfloat16)[None]
    got = rms_norm(x, jnp.ones(512), 1e-5).astype(jnp.float32)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean() + 1e-5)
    np.testing.assert_allclose(got, want, rtol=2**-8)  # one rounding to bfloat16, no more


def test_documents_of_a_row_do_not_see_each_other(cfg, params):  # pitfalls 36, 37
    segments = jnp.asarray([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    tokens = tokens_of((1, 11))
    a = forward(cfg, params, tokens, segments)
    b = forward(cfg, params, tokens.at[0, :5].add(1), segments)
    np.testing.assert_array_equal(a[:, 5:10], b[:, 5:10])
    assert abs(a[:, 1:5] - b[:, 1:5]).max() > 0.1
    for first, last in ((1, 5), (5, 10)):
        alone = forward(cfg, params, tokens[:, first:last])
        np.testing.assert_allclose(a[:, first:last], alone, atol=1e-5)


def test_segment_positions():
    got = segment_positions(jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]]))
    np.testing.assert_array_equal(got, [[0, 1, 0, 1, 2, 0, 1], list(range(7))])


def test_rows_of_padding_alone_have_finite_gradients(cfg, params):  # pitfall 36
    tokens = jnp.zeros((1, 5), jnp.int32)

    def loss(params):
        return (forward(cfg, params, tokens, 0 * tokens) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_equals_the_full_forward(cfg, params, window):  # pitfall 31
    """Unequal left-padded prompts, the longer one past the window; decode past three windows."""
    cfg = dataclasses.replace(cfg, sliding_window=window)
    lengths, total = (7, 3), 16
    tokens = np.asarray(tokens_of((2, total)))
    prompt, positions = np.zeros((2, 7), np.int32), np.full((2, 7), -1, np.int32)
    for i, n in enumerate(lengths):
        prompt[i, 7 - n :], positions[i, 7 - n :] = tokens[i, :n], np.arange(n)
    full = forward(cfg, params, jnp.asarray(tokens))
    cache = init_cache(cfg, 2, 64)
    assert cache.positions.shape[1] == (window or 64)
    step = jax.jit(forward_cached, static_argnums=0)
    logits, cache = step(cfg, params, prompt, positions, cache)
    for made in range(total - 7):
        at = np.asarray([n + made for n in lengths])
        want = np.stack([full[i, at[i] - 1] for i in range(2)])
        np.testing.assert_allclose(logits, want, atol=2e-5)
        new = np.asarray([[tokens[i, at[i]]] for i in range(2)])
        logits, cache = step(cfg, params, new, at[:, None].astype(np.int32), cache)


def test_the_loop_over_layers_only_reads_the_cache(cfg, params):
    """Written in the loop, each layer would be copied out of the stack, at every token."""
    cache, ids = init_cache(cfg, 2, 64), jnp.ones((2, 1), jnp.int32)
    program = jax.make_jaxpr(forward_cached, static_argnums=0)(cfg, params, ids, ids, cache)
    (loop,) = [one for one in program.jaxpr.eqns if one.primitive.name == "scan"]
    assert cache.k.shape not in [out.aval.shape for out in loop.outvars]


@pytest.mark.usefixtures("sharded_mesh")
def test_logits_are_the_same_on_every_mesh(cfg, params):
    tokens = np.asarray(tokens_of((4, 8)))
    with jax.set_mesh(NO_MESH):
        want = forward(cfg, params, tokens)
    sharded = jax.device_put(jax.device_get(params), param_shardings(cfg))
    tokens = jax.device_put(tokens, named_sharding(spec("BT")))
    got = forward(cfg, sharded, tokens)
    np.testing.assert_allclose(jax.device_get(got), want, rtol=1e-4, atol=1e-5)


def test_no_two_parameters_share_their_random_numbers(cfg):  # pitfall 39
    drawn = zj.init_params(cfg, jax.random.key(0))
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(drawn)[0]
        if "norm" not in jax.tree_util.keystr(path)
    }
    assert len(leaves) == 9
    for (a, x), (b, y) in itertools.combinations(leaves.items(), 2):
        for other in (y.ravel(), y.T.ravel()):
            n = min(x.size, other.size)
            correlation = np.corrcoef(x.ravel()[:n], other[:n])[0, 1]
            assert abs(correlation) < 0.1, (a, b)  # at least 4,992 numbers: seven deviations
    layers = leaves["['layers']['mlp']['gate']"]
    assert abs(np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]) < 0.05


def test_logits_of_a_bfloat16_model_have_float32_steps(cfg, params):  # pitfall 13
    """The last matmul is accumulated and kept in float32; log-probs drift by bf16 inputs alone."""
    narrow = dataclasses.replace(cfg, dtype="bfloat16")
    tokens = tokens_of((2, 24))
    logits = forward(narrow, params, tokens)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (logits != rounded).mean() > 0.9
    mask = jnp.ones_like(tokens, bool)
    small = jax.tree.map(lambda x: 0.2 * x, params)
    fine, coarse = (
        zj.token_logps(forward(c, small, tokens), tokens, mask).sum(axis=1) for c in (cfg, narrow)
    )
    np.testing.assert_allclose(coarse, fine, atol=1e-3 * float(jnp.abs(fine).max()))


def test_the_norms_scale_multiplies_what_was_cast_back():  # pitfall 34
    x = jax.random.normal(jax.random.key(2), (4, 96)).astype(jnp.bfloat16)
    scale = 1 + jax.random.normal(jax.random.key(3), (96,))
    wide = x.astype(jnp.float32)
    normed = wide / jnp.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)
    got = rms_norm(x, scale, 1e-5)
    assert got.dtype == jnp.bfloat16
    want = normed.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
    assert (got == want).mean() > 0.99  # one rounding of the reciprocal root may differ
    assert (got == (normed * scale[None]).astype(jnp.bfloat16)).mean() < 0.9
