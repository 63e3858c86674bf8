import functools

import jax
import jax.numpy as jnp
import numpy as np
import preference_oracles as oracle
import pytest

from zephyr_jax.config.preference import DIVERGENCES, LossOptions
from zephyr_jax.losses.pairs import PairLogps
from zephyr_jax.losses.preference import LOSSES, bco_pair, combined, kto

# Float32 against float64, set before anything was measured.
VALUE = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}

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
    "simpo": ({"beta": 2.5, "simpo_gamma_ratio": 0.3}, {"beta": 2.5, "gamma": 0.75}),
    "simpo alphapo": (
        {"beta": 2.5, "simpo_gamma_ratio": 0.04, "reward_alpha": 0.25, "label_smoothing": 0.1},
        {"beta": 2.5, "gamma": 0.1, "alpha": 0.25, "epsilon": 0.1},
    ),
    "orpo": ({"beta": 0.7}, {"lam": 0.7}),
    "cpo": (
        {"beta": 0.2, "label_smoothing": 0.1},
        {"beta": 0.2, "weight": 1.0, "epsilon": 0.1},
    ),
    "sft": ({"beta": 0.1}, {}),
}
PLAIN = tuple(CASES)  # without those of other divergences, which follow
SCORED = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
for _name in SCORED:
    for _divergence in (*DIVERGENCES[1:], 0.3):
        _options, _symbols = CASES[_name]
        CASES[f"{_name} {_divergence}"] = (
            {**_options, "divergence": _divergence},
            {**_symbols, "divergence": _divergence},
        )
SMOOTHING = {"beta": 0.1, "label_smoothing": 1e-3}  # exo_pair needs some


def batch(n=9, seed=0, spread=6.0):
    """Pairs of the sizes that training sees, as float64 arrays that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    nw, nl = rng.integers(1, 60, (2, n))
    rw, rl = (-rng.uniform(0.4, 2.0, n) * tokens for tokens in (nw, nl))
    pw, pl = (np.minimum(r + rng.normal(0, spread, n), -0.05) for r in (rw, rl))
    arrays = {"pw": pw, "pl": pl, "rw": rw, "rl": rl, "nw": nw, "nl": nl}
    return {name: np.float64(np.float32(x)) for name, x in arrays.items()}


def pairs_of(b, dtype=jnp.float32):
    return PairLogps(*(jnp.asarray(b[k], dtype) for k in ("pw", "pl", "rw", "rl", "nw", "nl")))


def every(change, pairs):
    """Pairs whose arrays are all changed alike; the shift is none of them."""
    return PairLogps(*map(change, pairs[:6]))


def ours(name, options, pairs, weights=None):
    weights = jnp.ones_like(pairs.chosen) if weights is None else weights
    return LOSSES[name](pairs, LossOptions(**options), weights)


def gradients(name, options, pairs, upstream, weights=None):
    """Of sum(upstream * losses), by the four log-probs."""

    def total(logps):
        losses = ours(name, options, pairs._replace(**logps), weights)
        return (upstream * losses).sum()

    return jax.grad(total)({k: getattr(pairs, k) for k in PairLogps._fields[:4]})


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_float64(case):
    options, symbols = CASES[case]
    name = case.split()[0]
    b = batch(spread=1.5 if symbols.get("divergence") else 6.0)
    want = functools.partial(getattr(oracle, name), **symbols)
    got = ours(name, options, pairs_of(b))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want(b), **VALUE)
    upstream = np.random.default_rng(1).uniform(0.5, 1.5, got.shape)
    grads = gradients(name, options, pairs_of(b), jnp.asarray(upstream, jnp.float32))
    fields = {"pw": "chosen", "pl": "rejected", "rw": "ref_chosen", "rl": "ref_rejected"}
    for key, field in fields.items():
        slope = oracle.gradient(want, b, key, upstream)
        np.testing.assert_allclose(grads[field], slope, **GRADIENT, err_msg=field)


def test_every_loss_has_a_case():
    assert {case.split()[0] for case in CASES} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_without_another_divergence_refuse_it(name, divergence):
    options = {"divergence": divergence, **SMOOTHING}
    reads_none = name in ("simpo", "orpo", "cpo", "sft")  # no reference to be tied to
    if divergence == "reverse_kl" or name in SCORED or reads_none:
        ours(name, options, pairs_of(batch()))
    else:
        with pytest.raises(ValueError, match=rf"{divergence}.*{name}"):
            ours(name, options, pairs_of(batch()))


def extremes():
    """Pairs far apart, equal, and certain, of no, one and many tokens, under every reference."""
    chosen = np.array([1e4, -1e4, 1e4, -1e4, 0, -3, -700, 0, 0, -1e-8, -1e-6, 0])
    rejected = np.array([-1e4, 1e4, 1e4, -1e4, 0, -3, -700, 0, -1e4, 0, -1e-6, -1e-8])
    zero = np.zeros_like(chosen)
    references = (zero, zero), (chosen, rejected), (rejected, chosen)
    parts = []
    for tokens in (0.0, 1.0, 900.0):
        for reference in references:
            parts.append([chosen, rejected, *reference, zero + tokens, zero + tokens])
    names = ("pw", "pl", "rw", "rl", "nw", "nl")
    return dict(zip(names, np.concatenate(parts, axis=1), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_extremes_are_finite(case):
    options, name = CASES[case][0], case.split()[0]
    pairs = pairs_of(extremes())
    some = jnp.arange(len(pairs.chosen)) % 3 > 0
    for weights in (jnp.ones_like(pairs.chosen), jnp.zeros_like(pairs.chosen), some):
        losses = ours(name, options, pairs, weights)
        assert np.isfinite(losses).all(), losses
        for field, slope in gradients(name, options, pairs, weights, weights).items():
            assert np.isfinite(slope).all(), (field, slope)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_that_is_badly_wrong_is_still_pulled(name):
    parts = {"pw": -2e4, "pl": -1e4, "rw": -1e4, "rl": -2e4, "nw": 1, "nl": 1}
    pairs = pairs_of({k: np.float64([x]) for k, x in parts.items()})
    slope = float(gradients(name, SMOOTHING, pairs, jnp.ones(1))["chosen"][0])
    bounded = ("apo_zero", "apo_down", "exo_pair")  # losses that are flat on that side
    assert slope == 0 if name in bounded else slope < 0


@pytest.mark.parametrize("case", PLAIN)
def test_pairs_of_weight_zero_change_nothing(case):
    """Padding between the pairs, of zeros or of anything, and whole batches of padding."""
    options, name = CASES[case][0], case.split()[0]
    b, at = batch(), np.array([0, 2, 3, 5, 6, 8, 9, 10, 12])
    weights = np.zeros(13, np.float32)
    weights[at] = np.random.default_rng(2).uniform(0.5, 2, 9)
    alone = ours(name, options, pairs_of(b), jnp.asarray(weights[at]))
    slopes = gradients(name, options, pairs_of(b), jnp.asarray(weights[at]))
    for scale in (0.0, 20.0):
        fill = np.random.default_rng(4).exponential(scale, (6, 13))
        padded = dict(zip(b, -fill, strict=True))
        for key in b:
            padded[key][at] = b[key]
        got = ours(name, options, pairs_of(padded), jnp.asarray(weights))
        np.testing.assert_allclose(got[at], alone, rtol=1e-6)
        upstream = jnp.asarray(weights)
        grads = gradients(name, options, pairs_of(padded), upstream, jnp.asarray(weights))
        for key in slopes:
            np.testing.assert_allclose(grads[key][at], slopes[key], rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(np.delete(grads[key], at), 0)
    nothing = pairs_of({k: np.zeros(5) for k in b})
    assert np.isfinite(ours(name, options, nothing, jnp.zeros(5))).all()


@pytest.mark.parametrize("case", PLAIN)
def test_the_order_and_the_shape_of_the_pairs_change_nothing(case):
    options, name = CASES[case][0], case.split()[0]
    pairs, order = pairs_of(batch(12)), np.random.default_rng(3).permutation(12)
    got = ours(name, options, pairs)
    shuffled = every(lambda x: x[order], pairs)
    np.testing.assert_array_equal(ours(name, options, shuffled), got[order])
    rows = every(lambda x: x.reshape(3, 4), pairs)
    np.testing.assert_array_equal(ours(name, options, rows), got.reshape(3, 4))


@pytest.mark.parametrize("name", ["ipo", "aot", "aot_unpaired"])  # alone, and by ranks
def test_losses_are_the_same_on_a_mesh(name, mesh):
    b = batch(24)
    pairs = every(lambda x: x.reshape(8, 3), pairs_of(b))
    weights = jnp.asarray(np.arange(24).reshape(8, 3) % 5 > 0, jnp.float32)
    if mesh is not None:
        place = functools.partial(jax.reshard, out_shardings=jax.P(("data", "fsdp"), None))
        pairs, weights = every(place, pairs), place(weights)

    def total(pairs, weights):
        losses = LOSSES[name](pairs, LossOptions(**SMOOTHING), weights)
        return (losses * weights).sum(), losses

    (value, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(pairs, weights)
    if mesh is not None:
        assert jax.typeof(losses).sharding.spec == jax.typeof(pairs.chosen).sharding.spec
    flat = np.asarray(weights).ravel()
    want = np.asarray(ours(name, SMOOTHING, pairs_of(b), jnp.asarray(flat)))
    np.testing.assert_allclose(np.ravel(losses), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(value, (want * flat).sum(), rtol=1e-5)
    slopes = gradients(name, SMOOTHING, pairs_of(b), jnp.asarray(flat), jnp.asarray(flat))
    np.testing.assert_allclose(np.ravel(grads.chosen), slopes["chosen"], rtol=1e-5, atol=1e-7)


def test_losses_that_become_others():
    b, equal = batch(), functools.partial(np.testing.assert_allclose, rtol=1e-6)
    pairs, beta = pairs_of(b), {"beta": 0.3}
    sigmoid = ours("sigmoid", beta, pairs)
    equal(ours("robust", beta, pairs), sigmoid)
    ones = pairs._replace(chosen_tokens=jnp.ones(9), rejected_tokens=jnp.ones(9))
    equal(ours("sigmoid_norm", beta, ones), sigmoid)
    cpo = ours("cpo", beta, pairs) - ours("sft", beta, pairs)
    equal(cpo, ours("simpo", {**beta, "simpo_gamma_ratio": 0.0}, ones), atol=1e-6)
    no_reference = pairs._replace(ref_chosen=jnp.zeros(9), ref_rejected=jnp.zeros(9))
    equal(cpo, ours("sigmoid", beta, no_reference), atol=1e-6)
    one = every(lambda x: x[:1], pairs)  # nothing to sort
    equal(ours("aot", beta, one), sigmoid[:1])
    equal(ours("aot_unpaired", beta, one), sigmoid[:1])
    for limit, divergence in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        options = {**beta, "divergence": limit}
        equal(ours("ipo", options, pairs), ours("ipo", {**beta, "divergence": divergence}, pairs))


def test_losses_at_the_reference():
    """Where policy and reference agree every margin is 0, whatever the divergence."""
    b, two = batch(), np.log(2)
    pairs = pairs_of(dict(b, pw=b["rw"], pl=b["rl"]))
    known = dict.fromkeys(("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"), two)
    known |= {"nca_pair": 2 * two, "bco_pair": 2 * two, "discopop": (two + 1) / 2}
    known |= {"hinge": 1, "apo_zero": 1, "apo_down": 1}
    known |= {"ipo": 25, "sppo_hard": 50}  # (1 / (2 beta))^2, once and twice
    for name, want in known.items():
        for divergence in DIVERGENCES if name in SCORED else ("reverse_kl",):
            got = ours(name, {"beta": 0.1, "divergence": divergence}, pairs)
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)


def test_losses_are_least_where_they_should_be():
    def of(name, chosen, rejected, **options):
        b = {"pw": chosen, "pl": rejected, "rw": 0.0, "rl": 0.0, "nw": 1.0, "nl": 1.0}
        return float(ours(name, options, pairs_of({k: np.float64([x]) for k, x in b.items()}))[0])

    assert of("hinge", 5.0, -5.1, beta=0.1) == 0 < of("hinge", 5.0, -4.9, beta=0.1)
    assert of("ipo", 3.0, -2.0, beta=0.1) == 0 < of("ipo", 3.0, -2.5, beta=0.1)
    assert of("sppo_hard", 5.0, -5.0, beta=0.1) == 0 < of("sppo_hard", 5.0, 5.0, beta=0.1)
    kept = np.log(999)  # sigmoid of it is 1 - 1e-3
    exo = {"beta": 1.0, "label_smoothing": 1e-3}
    assert abs(of("exo_pair", kept, 0.0, **exo)) < 1e-6 < of("exo_pair", 2 * kept, 0.0, **exo)


def test_doubling_an_answer_of_repeated_tokens_leaves_the_losses_of_means():
    b = batch()
    for name in ("ipo", "sigmoid_norm", "simpo", "orpo", "sft"):
        doubled = pairs_of({k: 2 * x for k, x in b.items()})
        got, want = (ours(name, {"beta": 0.3}, pairs) for pairs in (doubled, pairs_of(b)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_orpo_is_exact_for_answers_that_are_nearly_certain():
    b = dict(batch(), nw=np.ones(9), nl=np.ones(9))
    b["pw"] = np.float64(np.float32(-np.logspace(-6, 1, 9)))
    got = ours("orpo", {"beta": 0.7}, pairs_of(b | {"pl": b["pw"][::-1]}))
    np.testing.assert_allclose(got, oracle.orpo(b | {"pl": b["pw"][::-1]}, 0.7), **VALUE)


def test_bco_subtracts_its_shift():
    b = batch()
    pairs, options = pairs_of(b), LossOptions(beta=0.2)
    got = bco_pair(pairs._replace(shift=jnp.float32(0.7)), options, jnp.ones(9))
    np.testing.assert_allclose(got, oracle.bco_pair(b, 0.2, 0.7), **VALUE)

    def total(shift):
        return bco_pair(pairs._replace(shift=shift), options, jnp.ones(9)).sum()

    slope = jax.grad(total)(jnp.float32(0.7))
    assert slope == 0


@pytest.mark.parametrize("kl", [0.0, 2.5, -1.0])
def test_kto_equals_float64(kl):
    b, good = batch(), np.arange(9) % 3 > 0
    options = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.8}

    def total(logps, kl, upstream):
        losses = kto(logps, jnp.asarray(b["rw"], jnp.float32), jnp.asarray(good), kl, **options)
        return (losses * upstream).sum(), losses

    policy, upstream = jnp.asarray(b["pw"], jnp.float32), np.linspace(0.5, 1.5, 9)
    grad = jax.grad(total, argnums=(0, 1), has_aux=True)
    (slope, of_kl), losses = grad(policy, kl, jnp.asarray(upstream, jnp.float32))

    def want(b):
        return oracle.kto(b["pw"], b["rw"], good, kl, 0.2, 1.2, 0.8)

    assert losses.dtype == jnp.float32
    assert of_kl == 0
    np.testing.assert_allclose(losses, want(b), **VALUE)
    np.testing.assert_allclose(slope, oracle.gradient(want, b, "pw", upstream), **GRADIENT)
    far = jnp.asarray([1e4, -1e4] * 5)[:9]
    (slope, _), losses = grad(far, kl, jnp.ones(9))
    assert np.isfinite(losses).all()
    assert np.isfinite(slope).all()


def test_combined_losses_are_weighted_sums():
    pairs, options = pairs_of(batch()), {"beta": 0.3, "label_smoothing": 0.1}
    loss = combined({"sigmoid": 0.8, "aot": 0.2, "sft": 1.5})
    got = loss(pairs, LossOptions(**options), jnp.ones(9))
    parts = [ours(name, options, pairs) for name in ("sigmoid", "aot", "sft")]
    np.testing.assert_allclose(got, 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2], rtol=1e-6)
