import functools

import jax
import jax.numpy as jnp
import numpy as np
import preference_oracles as oracle
import pytest

from zephyr_jax.config import preference
from zephyr_jax.losses.pairs import PairLogps
from zephyr_jax.losses.preference import LABEL_WEIGHTS, LOSSES, balanced, bco_pair, combined

# Float32 against float64, set before anything was measured.
VALUE = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}

ALPHAPO = {"simpo_gamma_ratio": 0.04, "reward_alpha": 0.25}
# Every loss with options that are not its defaults, and its oracle with the paper's symbols.
CASES = {
    "sigmoid": ({"beta": 0.3}, {"beta": 0.3}),
    "sigmoid smoothed": ({"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "epsilon": 0.2}),
    "sigmoid_norm": ({"beta": 5.0}, {"beta": 5.0}),
    "robust": ({"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "epsilon": 0.2}),
    "hinge": ({"beta": 0.15}, {"beta": 0.15}),
    "ipo": ({"beta": 0.4}, {"tau": 0.4}),
    "exo_pair": ({"beta": 0.3, "label_smoothing": 1e-3}, {"beta": 0.3, "epsilon": 1e-3}),
    "nca_pair": ({"beta": 0.2}, {"alpha": 0.2}),
    "bco_pair": ({"beta": 0.2}, {"beta": 0.2}),
    "apo_zero": ({"beta": 0.2}, {"beta": 0.2}),
    "apo_down": ({"beta": 0.2}, {"beta": 0.2}),
    "sppo_hard": ({"beta": 0.05}, {"eta": 20.0}),
    "discopop": ({"beta": 0.3}, {"beta": 0.3, "tau": 0.05}),
    "aot": ({"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "epsilon": 0.1}),
    "aot_unpaired": ({"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "epsilon": 0.1}),
    "simpo": ({"beta": 2.5, "options": {"simpo_gamma_ratio": 0.3}}, {"beta": 2.5, "gamma": 0.75}),
    "simpo alphapo": (
        {"beta": 2.5, "label_smoothing": 0.1, "options": ALPHAPO},
        {"beta": 2.5, "gamma": 0.1, "alpha": 0.25, "epsilon": 0.1},
    ),
    "orpo": ({"beta": 0.7}, {"lam": 0.7}),
    "cpo": ({"beta": 0.2, "label_smoothing": 0.1}, {"beta": 0.2, "weight": 1.0, "epsilon": 0.1}),
    "sft": ({"beta": 0.1}, {}),
}
for _name in preference.SCORED:
    for _divergence in (*preference.DIVERGENCES[1:], 0.3):
        _other = {"divergence": _divergence}
        CASES[f"{_name} {_divergence}"] = tuple(options | _other for options in CASES[_name])
SMOOTHING = {"beta": 0.1, "label_smoothing": 1e-3}  # exo_pair needs some
NAMES = ("pw", "pl", "rw", "rl", "nw", "nl")  # the oracles' names of the arrays of PairLogps


def batch(n=9, seed=0, spread=6.0):
    """Pairs of the sizes that training sees, as float64 arrays that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    nw, nl = rng.integers(1, 60, (2, n))
    rw, rl = (-rng.uniform(0.4, 2.0, n) * tokens for tokens in (nw, nl))
    pw, pl = (np.minimum(r + rng.normal(0, spread, n), -0.05) for r in (rw, rl))
    arrays = zip(NAMES, (pw, pl, rw, rl, nw, nl), strict=True)
    return {name: np.float64(np.float32(x)) for name, x in arrays}


def extremes():
    """108 pairs: far apart, equal, certain; of no, one and many tokens; under every reference."""
    chosen = np.array([1e4, -1e4, 1e4, -1e4, 0, -3, -700, 0, 0, -1e-8, -1e-6, 0])
    rejected = np.array([-1e4, 1e4, 1e4, -1e4, 0, -3, -700, 0, -1e4, 0, -1e-6, -1e-8])
    zero = np.zeros_like(chosen)
    references = (zero, zero), (chosen, rejected), (rejected, chosen)
    parts = [
        [chosen, rejected, *reference, zero + tokens, zero + tokens]
        for tokens in (0.0, 1.0, 900.0)
        for reference in references
    ]
    return dict(zip(NAMES, np.concatenate(parts, axis=1), strict=True))


def pairs_of(b):
    return PairLogps(*(jnp.asarray(b[name], jnp.float32) for name in NAMES))


def every(change, pairs):
    """Pairs whose arrays are all changed the same way; the shift is none of them."""
    return PairLogps(*map(change, pairs[:6]))


def ours(name, options, pairs, weights=None):
    weights = jnp.ones_like(pairs.chosen) if weights is None else weights
    return LOSSES[name](pairs, preference.LossOptions(**options), weights)


@functools.cache
def graded(case):
    """`(pairs, weights) -> losses, gradients of sum(weights * losses)` of a case, jitted."""

    def total(pairs, weights):
        losses = ours(case.split()[0], CASES[case][0], pairs, weights)
        return (weights * losses).sum(), losses

    run = jax.jit(jax.grad(total, has_aux=True))
    return lambda pairs, weights: run(pairs, weights)[::-1]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_float64_whatever_the_padding_is(case):
    """Ninety pairs of a batch of 108; the others have weight 0, and hold zeros or anything."""
    name, symbols = case.split()[0], CASES[case][1]
    want = functools.partial(getattr(oracle, name), **symbols)
    b = batch(90, spread=1.5 if "divergence" in symbols else 6.0)
    at = np.sort(np.random.default_rng(1).permutation(108)[:90])
    weights = np.zeros(108, np.float32)
    weights[at] = np.random.default_rng(2).uniform(0.5, 2, 90)
    for scale in (0.0, 20.0):
        fill = -np.random.default_rng(4).exponential(scale, (6, 108))
        fill[:, at] = [b[key] for key in NAMES]
        pairs = pairs_of(dict(zip(NAMES, fill, strict=True)))
        got, grads = graded(case)(pairs, jnp.asarray(weights))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[at], want(b), **VALUE)
        for key, slopes in zip(NAMES[:4], grads[:4], strict=True):
            slope = oracle.gradient(want, b, key, weights[at])
            np.testing.assert_allclose(slopes[at], slope, **GRADIENT, err_msg=key)
            np.testing.assert_array_equal(np.delete(slopes, at), 0)
    assert np.isfinite(graded(case)(every(jnp.zeros_like, pairs), jnp.zeros(108))[0]).all()


@pytest.mark.parametrize("case", CASES)
def test_extremes_are_finite(case):
    pairs = pairs_of(extremes())
    some = jnp.asarray(np.arange(108) % 3 > 0, jnp.float32)
    for weights in (jnp.ones(108), jnp.zeros(108), some):
        losses, grads = graded(case)(pairs, weights)
        assert np.isfinite(losses).all(), losses
        assert all(np.isfinite(slope).all() for slope in grads[:4])


def test_every_loss_has_a_case():
    assert {case.split()[0] for case in CASES} == set(LOSSES) - {"kto"}  # of labeled answers


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_that_a_loss_does_not_read_change_nothing_and_are_refused(name):
    pairs = pairs_of(batch())
    lengths = {"reference": "precomputed", "max_length": 9, "max_prompt_length": 5}
    plain = {"beta": 0.1, "label_smoothing": 1e-3 if name == "exo_pair" else 0.0}
    others = [({"divergence": d}, name in preference.SCORED) for d in preference.DIVERGENCES[1:]]
    others.append(({"label_smoothing": 0.2}, name in preference.SMOOTHED))
    for other, read in others:
        same = np.array_equal(ours(name, plain, pairs), ours(name, plain | other, pairs))
        assert same != read
        if not read:
            with pytest.raises(ValueError, match=rf"dpo.{next(iter(other))}.*{name}"):
                preference.DpoConfig(loss=name, **plain | other, **lengths)
    if name in preference.REFERENCE_FREE:  # in a sum, a divergence is of the loss that reads it
        preference.DpoConfig(loss={name: 1, "hinge": 1}, beta=0.1, divergence="js", **lengths)


def test_a_pair_that_is_badly_wrong_is_still_pulled():
    pairs = pairs_of({"pw": [-2e4], "pl": [-1e4], "rw": [-1e4], "rl": [-2e4], "nw": [1], "nl": [1]})
    bounded = ("apo_zero", "apo_down", "exo_pair", "kto")  # losses that are flat on that side
    for name in LOSSES:
        run = jax.jit(jax.grad(lambda pairs, name=name: ours(name, SMOOTHING, pairs).sum()))
        slope = run(pairs).chosen
        assert slope == 0 if name in bounded else slope < 0, name
        if name == "sigmoid":
            np.testing.assert_allclose(slope, -SMOOTHING["beta"] * (1 - 1e-3), rtol=1e-6)


@pytest.mark.usefixtures("sharded_mesh")
@pytest.mark.parametrize("name", ["ipo", "aot"])  # alone, and by ranks
def test_losses_are_the_same_on_a_mesh(name):
    b = batch(24)
    weights = np.float32(np.arange(24) % 5 > 0)
    place = functools.partial(jax.reshard, out_shardings=jax.P(("data", "fsdp"), None))
    pairs = every(lambda x: place(x.reshape(8, 3)), pairs_of(b))

    def total(pairs, weights):
        losses = ours(name, SMOOTHING, pairs, weights)
        return (losses * weights).sum(), losses

    run = jax.jit(jax.grad(total, has_aux=True))
    grads, losses = run(pairs, place(jnp.asarray(weights).reshape(8, 3)))
    assert jax.typeof(losses).sharding.spec == jax.typeof(pairs.chosen).sharding.spec
    alone, want = run(pairs_of(b), jnp.asarray(weights))
    np.testing.assert_allclose(np.ravel(losses), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.ravel(grads.chosen), alone.chosen, rtol=1e-5, atol=1e-7)


def test_bco_subtracts_its_shift():
    b = batch()
    pairs, options = pairs_of(b), preference.LossOptions(beta=0.2)

    def total(shift):
        losses = bco_pair(pairs._replace(shift=shift), options, jnp.ones(9))
        return losses.sum(), losses

    slope, got = jax.grad(total, has_aux=True)(jnp.float32(0.7))
    np.testing.assert_allclose(got, oracle.bco_pair(b, 0.2, 0.7), **VALUE)
    assert slope == 0


@pytest.mark.parametrize("drift", [0.7, -0.7])  # the KL estimate is above 0, or cut to 0
@pytest.mark.parametrize("of_whole_batch", [False, True])
def test_kto_equals_float64(drift, of_whole_batch):
    """Eight labeled answers and a place of padding; the KL estimate has no gradient."""
    b, good = batch(), np.arange(9) % 3 > 0
    b["pl"] = np.float64(np.float32(b["rl"] + drift + np.linspace(-2, 2, 9)))
    weights = np.float32(np.arange(9) < 8)
    numbers = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    options = preference.LossOptions(beta=0.2, options=numbers)
    kl = (b["pl"] - b["rl"])[:8].mean()
    assert (kl > 0) == (drift > 0)
    shift = jnp.float32(max(kl, 0)) if of_whole_batch else None

    def total(pairs):
        pairs = pairs._replace(shift=shift, desirable=jnp.asarray(good))
        losses = LOSSES["kto"](pairs, options, jnp.asarray(weights))
        return (losses * weights).sum(), losses

    grads, losses = jax.jit(jax.grad(total, has_aux=True))(pairs_of(b))
    assert losses.dtype == jnp.float32

    def want(b):
        return oracle.kto(b["pw"], b["rw"], good, kl, 0.2, 1.2, 0.8)

    np.testing.assert_allclose(losses[:8], want(b)[:8], **VALUE)
    np.testing.assert_allclose(grads.chosen, oracle.gradient(want, b, "pw", weights), **GRADIENT)
    np.testing.assert_array_equal(grads.rejected, 0)
    grads, losses = jax.grad(total, has_aux=True)(every(lambda x: x[:9], pairs_of(extremes())))
    assert np.isfinite(losses).all()
    assert np.isfinite(grads.chosen).all()


@pytest.mark.parametrize(
    ("counts", "options", "weights"),
    [
        ((10, 40), {}, (4.0, 1.0)),
        ((9, 6), {}, (1.0, 1.5)),
        ((7, 7), {}, (1.0, 1.0)),
        ((10, 40), {"desirable_weight": 3.0}, (3.0, 1.0)),  # what is configured stays
    ],
)
def test_the_rarer_label_weighs_as_much_unless_configured(counts, options, weights):
    lengths = {"reference": "precomputed", "max_length": 9, "max_prompt_length": 5}
    dpo = preference.DpoConfig(loss="kto", beta=0.1, options=options, **lengths)
    found = balanced(dpo, dict(zip(("desirable", "undesirable"), counts, strict=True)))
    assert tuple(map(found.option, LABEL_WEIGHTS)) == weights
    for missing in ({"desirable": 3, "undesirable": 0}, {"desirable": 0, "undesirable": 3}):
        with pytest.raises(ValueError, match="learns from good and bad answers"):
            balanced(dpo, missing)


def test_combined_losses_are_weighted_sums():
    pairs, options = pairs_of(batch()), {"beta": 0.3, "label_smoothing": 0.1}
    loss = combined({"sigmoid": 0.8, "aot": 0.2, "sft": 1.5})
    got = loss(pairs, preference.LossOptions(**options), jnp.ones(9))
    parts = [ours(name, options, pairs) for name in ("sigmoid", "aot", "sft")]
    np.testing.assert_allclose(got, 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2], rtol=1e-6)
