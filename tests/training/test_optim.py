"""The optimizers against their papers' and torch's updates in float64, and what saves memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from conftest import device_mesh

import zephyr_jax as zj
from zephyr_jax.config.run import load_config
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import abstract_state

STEPS = 10
SHAPES = {"first": (3, 4), "norm": (5,)}
LARGE = {"first": (3, 160, 192), "norm": (5,)}  # Adafactor factors axes of 128 and more


def optim_of(name, **changes):
    """A recipe's optimizer, at a rate that moves the parameters visibly in ten steps."""
    recipe = "zephyr_7b_handbook_v020_dpo" if name == "rmsprop" else "zephyr_7b_handbook_dpo"
    return dataclasses.replace(load_config(recipe).optim, name=name, peak_lr=1e-2, **changes)


def gradients(shapes=SHAPES):
    """One tree a step, float64; their norms lie on both sides of 1."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(0.05, 3.0, STEPS)
    return [{k: rng.normal(0.5, size=s) * size for k, s in shapes.items()} for size in sizes]


def begun(shapes=SHAPES):
    return {k: np.random.default_rng(1).normal(size=s) for k, s in shapes.items()}


def clipped(grads, limit):
    """torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm."""
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {k: g * min(1.0, limit / (norm + 1e-6)) for k, g in grads.items()}


def rate(optim, step):
    """One warm-up step of ten, at 0 or the peak, then down to 0 at step 10."""
    if step < 1:
        return 0.0 if optim.warmup_from_zero else optim.peak_lr
    done = (step - 1) / (STEPS - 1)
    if optim.schedule == "linear":
        return optim.peak_lr * (1 - done)
    return optim.peak_lr * np.cos(np.pi * done / 2) ** 2


class RMSprop:
    """torch.optim.RMSprop: v = a v + (1 - a) g^2, then p -= lr g / (sqrt(v) + eps)."""

    def __init__(self, optim, param):
        self.optim, self.square = optim, np.zeros_like(param)

    def update(self, step, grad):
        b2 = self.optim.betas[1]
        self.square = b2 * self.square + (1 - b2) * grad**2
        return grad / (np.sqrt(self.square) + self.optim.eps)


class AdamW(RMSprop):
    """torch.optim.AdamW: decay by lr w p, then the bias-corrected step."""

    def __init__(self, optim, param):
        super().__init__(optim, param)
        self.mean = np.zeros_like(param)

    def update(self, step, grad):
        b1, b2 = self.optim.betas
        self.mean = b1 * self.mean + (1 - b1) * grad
        self.square = b2 * self.square + (1 - b2) * grad**2
        corrected = np.sqrt(self.square / (1 - b2 ** (step + 1)))
        return self.mean / (1 - b1 ** (step + 1)) / (corrected + self.optim.eps)


class Lion(RMSprop):
    """Chen et al. 2023, arXiv:2302.06675, Algorithm 2."""

    def update(self, step, grad):
        b1, b2 = self.optim.betas
        move = np.sign(b1 * self.square + (1 - b1) * grad)
        self.square = b2 * self.square + (1 - b2) * grad
        return move


class Sgd(RMSprop):
    """torch.optim.SGD with momentum: b = m b + g, then p -= lr b."""

    def update(self, step, grad):
        self.square = self.optim.betas[0] * self.square + grad
        return self.square


class Nadamw(AdamW):
    """AdamW whose mean looks one step ahead (Dozat 2016)."""

    def ahead(self, step, grad):
        b1 = self.optim.betas[0]
        self.mean = b1 * self.mean + (1 - b1) * grad
        return b1 * self.mean / (1 - b1 ** (step + 2)) + (1 - b1) * grad / (1 - b1 ** (step + 1))

    def update(self, step, grad):
        b2 = self.optim.betas[1]
        self.square = b2 * self.square + (1 - b2) * grad**2
        root = np.sqrt(self.square / (1 - b2 ** (step + 1)))
        return self.ahead(step, grad) / (root + self.optim.eps)


class Adam(AdamW):
    """AdamW that has no decay."""


class Muon(Nadamw):
    """Jordan 2024: Nesterov's mean, five Newton-Schulz steps a layer; lengths of arXiv:2502.16982.

    NAdam takes what is no matrix of a layer.
    """

    def update(self, step, grad):
        if grad.ndim < 3:
            return super().update(step, grad)
        out = np.empty_like(grad)
        for layer, matrix in enumerate(self.ahead(step, grad)):
            x = matrix.reshape(len(matrix), -1)
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / (np.linalg.norm(x) + self.optim.eps)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if matrix.shape[0] > matrix[0].size else x
            out[layer] = 0.2 * np.sqrt(max(x.shape)) * x.reshape(matrix.shape)
        return out


class Adafactor(AdamW):
    """Adafactor (Algorithms 4 and 5 of the paper) with a mean of its updates."""

    row, column = 0.0, 0.0

    def update(self, step, grad):
        b1, share = self.optim.betas[0], 1 - (step + 1.0) ** -self.optim.betas[1]
        square = grad**2 + self.optim.eps
        if grad.ndim == 3:
            self.row = share * self.row + (1 - share) * square.mean(axis=2)
            self.column = share * self.column + (1 - share) * square.mean(axis=1)
            mean = self.row.mean(axis=1)[:, None, None]
            self.square = self.row[:, :, None] * self.column[:, None] / mean
        else:
            self.square = share * self.square + (1 - share) * square
        update = grad / np.sqrt(self.square)
        update /= max(1, np.sqrt((update**2).mean()))
        self.mean = b1 * self.mean + (1 - b1) * update
        return self.mean


def oracle(kind, optim, shapes):
    """The parameters after every step; weight decay spares norm scales."""
    params, path = begun(shapes), []
    states = {k: kind(optim, param) for k, param in params.items()}
    for step, grad in enumerate(gradients(shapes)):
        for k, g in clipped(grad, optim.max_grad_norm).items():
            decay = 0.0 if k == "norm" else optim.weight_decay
            move = states[k].update(step, g) + decay * params[k]
            params[k] = params[k] - rate(optim, step) * move
        path.append(dict(params))
    return path


def ours(optim, shapes=SHAPES, start=None, grads=None):
    """The parameters after every step, and the last state."""
    optimizer = make_optimizer(optim, make_schedule(optim, STEPS))
    narrow = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    params, path = narrow(start or begun(shapes)), []
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for grad in grads or gradients(shapes):
        updates, state = update(narrow(grad), state, params)
        params = optax.apply_updates(params, updates)
        path.append(jax.device_get(params))
    return path, state


ADAMW = {"betas": (0.5, 0.999), "eps": 0.1, "weight_decay": 0.3, "max_grad_norm": 0.2}
LIVELY = {"betas": (0.9, 0.95), "weight_decay": 0.1, "warmup_from_zero": False}
STILL = {"betas": (0.9, 0.95), "warmup_from_zero": False}
OTHERWISE = {"betas": (0.0, 0.9), "eps": 0.1, "max_grad_norm": float("inf")}
ADAFACTOR = {"betas": (0.9, 0.8), "eps": 1e-30}


@pytest.mark.parametrize(
    ("kind", "shapes", "changes"),
    [
        pytest.param(RMSprop, SHAPES, {}, id="rmsprop"),
        pytest.param(RMSprop, SHAPES, OTHERWISE, id="rmsprop otherwise"),
        pytest.param(AdamW, SHAPES, {}, id="adamw"),
        pytest.param(AdamW, SHAPES, ADAMW, id="adamw otherwise"),
        pytest.param(Adafactor, LARGE, ADAFACTOR, id="adafactor"),
        pytest.param(AdamW, SHAPES, LIVELY, id="adamw from the first step"),
        pytest.param(Lion, SHAPES, LIVELY, id="lion"),
        pytest.param(Nadamw, SHAPES, LIVELY, id="nadamw"),
        pytest.param(Adam, SHAPES, STILL, id="adam"),
        pytest.param(Sgd, SHAPES, STILL, id="sgd"),
    ],
)
def test_ten_updates_equal_float64(kind, shapes, changes):  # pitfall 26
    optim = optim_of(kind.__name__.lower(), **changes)
    wanted, (path, _) = oracle(kind, optim, shapes), ours(optim, shapes)
    start = begun(shapes)["first"]
    still = np.abs(wanted[0]["first"] - start).max() == 0
    assert still == optim.warmup_from_zero
    assert np.abs(wanted[-1]["first"] - start).max() > 1e-2
    for want, got in zip(wanted, path, strict=True):
        for k in shapes:
            np.testing.assert_allclose(got[k], want[k], rtol=1e-5, atol=2e-6)


def test_bfloat16_masters_would_not_move(params):  # pitfall 27
    """At DPO's learning rate an update is below half a bfloat16 step of nearly every weight."""
    optim = dataclasses.replace(load_config("demo_sft").optim, peak_lr=5e-7, warmup_ratio=0.0)
    optimizer = make_optimizer(optim, make_schedule(optim, 10))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Weights that are not tiny, as in a trained model
    weights = jnp.where(jnp.abs(params["head"]) < 1e-2, 1e-2, params["head"])

    @jax.jit
    def moved(weights):
        params = {"head": weights}
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return (optax.apply_updates(params, updates)["head"] != weights).mean()

    assert moved(weights) > 0.6  # weights near 4 do not move in float32 either: half a step is 2e-7
    assert moved(weights.astype(jnp.bfloat16)) == 0


def test_moments_in_host_memory_change_no_bit():
    optim = optim_of("adamw")
    path, state = ours(optim)
    hosted, host_state = ours(dataclasses.replace(optim, offload_optimizer=True))
    runs.assert_equal((path, state), (hosted, host_state))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(host_state) if x.ndim}
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"device"}


def test_a_bfloat16_mean_stays_near():
    path, _ = ours(optim_of("adamw"))
    halved, state = ours(optim_of("adamw", mu_dtype="bfloat16"))
    assert sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state)) == 2
    moved = np.abs(path[-1]["first"] - begun()["first"]).max()
    assert 0 < np.abs(path[-1]["first"] - halved[-1]["first"]).max() < 0.02 * moved


def test_muon_takes_each_layers_matrices_whole_and_nadam_the_rest():
    shapes = {"q": (2, 6, 2, 2, 3), "o": (2, 2, 2, 3, 6), "down": (2, 9, 6), "norm": (2, 6)}
    optim = optim_of("muon", **STILL)
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    grads = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(3)]
    # The oracle's matrices are inner x outer
    flat = {"q": (2, 6, 12), "o": (2, 12, 6), "down": (2, 9, 6), "norm": (2, 6)}
    states, params = {k: Muon(optim, np.zeros(flat[k])) for k in shapes}, dict(start)
    tree = lambda x: {"layers": {"attention": x, "mlp": {}}, "embed": jnp.ones((4, 6))}  # noqa: E731
    path, _ = ours(optim, start=tree(start), grads=[tree(grad) for grad in grads])
    everything = [grad | {"embed": np.ones((4, 6))} for grad in grads]
    for step, grad in enumerate(everything):
        cut = clipped(grad, optim.max_grad_norm)
        for k in shapes:
            move = states[k].update(step, cut[k].reshape(flat[k])).reshape(shapes[k])
            params[k] = params[k] - rate(optim, step) * move
            got = path[step]["layers"]["attention"][k]
            np.testing.assert_allclose(got, params[k], rtol=1e-4, atol=1e-5, err_msg=k)


@pytest.mark.parametrize("name", ["muon", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_state_and_updates_are_those_of_one_device_on_a_mesh(name):
    optim = optim_of(name, **(ADAFACTOR if name == "adafactor" else STILL))
    cfg = zj.MistralConfig.tiny()
    optimizer = make_optimizer(optim, make_schedule(optim, STEPS))

    def two_steps():
        params = zj.init_params(cfg, jax.random.key(0))
        state = jax.jit(optimizer.init)(params)

        @jax.jit
        def step(params, state):
            grads = jax.tree.map(lambda x: jnp.sin(100 * x), params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step(*step(params, state))

    alone, _ = two_steps()
    with jax.set_mesh(device_mesh(1, 2, 2)):
        params, state = two_steps()
        config = dataclasses.replace(load_config("demo_sft"), model=cfg, optim=optim)
        abstract = abstract_state(config, optimizer)
    # atol: sums of another order, before a sign or a root
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, params)
    got, planned = (jax.tree.map(lambda x: x.sharding, x) for x in (state, abstract.opt_state))
    assert jax.tree.map(lambda a, b: a.spec == b.spec, got, planned)
    largest = max(jax.tree.leaves(state), key=lambda x: x.size)
    assert largest.addressable_shards[0].data.size == largest.size / 4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rmsprop", {"betas": (0.1, 0.9)}, "betas.0.=0.1 must be 0: rmsprop has none"),
        ("rmsprop", {"weight_decay": 0.1}, "weight_decay=0.1 must be 0: rmsprop has none"),
        ("rmsprop", {"mu_dtype": "bfloat16"}, "mu_dtype=bfloat16 must be float32"),
        ("adafactor", {}, "1e-30 or so"),
        ("sophia", {}, "optim.name='sophia' is not known; use one of adamw, adam, "),
        ("sgd", {"weight_decay": 0.1}, "optim.weight_decay=0.1 must be 0: sgd has none"),
        ("adamw", {"schedule": "constant"}, "optim.warmup_ratio=0.1 must be 0 under"),
        ("adamw", {"schedule": {"cosine": 0.5}}, "must be a name, or {'wsd': SHARE <= 1}"),
        ("adamw", {"schedule": {"wsd": 1.5}}, "must be a name, or {'wsd': SHARE <= 1}"),
    ],
)
def test_what_an_optimizer_lacks_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        optim_of(name, **changes)
