"""Both optimizers against torch's documented updates in float64, and the fields they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zephyr_jax.config.run import RunConfig, load_config
from zephyr_jax.training.optim import make_optimizer, make_schedule

STEPS = 10
SHAPES = {"first": (3, 4), "second": (5,)}


def optim_of(name, **changes):
    """A recipe's optimizer, at a rate that moves the parameters visibly in ten steps."""
    optim = load_config(f"zephyr_7b_handbook_{'v020_' * (name == 'rmsprop')}dpo").optim
    assert optim.name == name
    return dataclasses.replace(optim, peak_lr=1e-2, **changes)


def gradients(seed=0):
    """One tree a step, float64; their norms lie on both sides of 1."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.05, 3.0, STEPS)
    return [{k: rng.normal(size=s) * size for k, s in SHAPES.items()} for size in sizes]


def clipped(grads, limit):
    """torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm."""
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {k: g * min(1.0, limit / (norm + 1e-6)) for k, g in grads.items()}


def rate(optim, step):
    """One warm-up step of ten, then down to 0 at step 10."""
    if step < 1:
        return 0.0
    done = (step - 1) / (STEPS - 1)
    return optim.peak_lr * (
        (1 - done) if optim.schedule == "linear" else np.cos(np.pi * done / 2) ** 2
    )


def rmsprop(optim, start, grads):
    """torch.optim.RMSprop: v = a v + (1 - a) g^2, then p -= lr g / (sqrt(v) + eps)."""
    params, square = dict(start), {k: np.zeros(s) for k, s in SHAPES.items()}
    path = []
    for step, grad in enumerate(grads):
        for k, g in clipped(grad, optim.max_grad_norm).items():
            square[k] = optim.betas[1] * square[k] + (1 - optim.betas[1]) * g**2
            params[k] = params[k] - rate(optim, step) * g / (np.sqrt(square[k]) + optim.eps)
        path.append(dict(params))
    return path


def adamw(optim, start, grads):
    """torch.optim.AdamW: decay by lr w p, then the bias-corrected step."""
    params = dict(start)
    mean, square = ({k: np.zeros(s) for k, s in SHAPES.items()} for _ in range(2))
    path = []
    for step, grad in enumerate(grads):
        lr = rate(optim, step)
        for k, g in clipped(grad, optim.max_grad_norm).items():
            mean[k] = optim.betas[0] * mean[k] + (1 - optim.betas[0]) * g
            square[k] = optim.betas[1] * square[k] + (1 - optim.betas[1]) * g**2
            corrected = np.sqrt(square[k] / (1 - optim.betas[1] ** (step + 1)))
            params[k] = params[k] * (1 - lr * optim.weight_decay) - lr * (
                mean[k] / (1 - optim.betas[0] ** (step + 1)) / (corrected + optim.eps)
            )
        path.append(dict(params))
    return path


def ours(optim, start, grads):
    optimizer = make_optimizer(optim, make_schedule(optim, STEPS))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state, path = optimizer.init(params), []
    for grad in grads:
        grad = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad)
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        path.append(jax.tree.map(np.asarray, params))
    return path


@pytest.mark.parametrize(
    ("name", "update", "changes"),
    [
        ("rmsprop", rmsprop, {}),
        ("rmsprop", rmsprop, {"betas": (0.0, 0.9), "eps": 0.1, "max_grad_norm": float("inf")}),
        ("adamw", adamw, {}),
        (
            "adamw",
            adamw,
            {"betas": (0.5, 0.999), "eps": 0.1, "weight_decay": 0.3, "max_grad_norm": 0.2},
        ),
    ],
    ids=["rmsprop", "rmsprop otherwise", "adamw", "adamw otherwise"],
)
def test_ten_updates_equal_float64(name, update, changes):
    optim = optim_of(name, **changes)
    start = {k: np.random.default_rng(1).normal(size=s) for k, s in SHAPES.items()}
    wanted, found = update(optim, start, gradients()), ours(optim, start, gradients())
    assert np.abs(wanted[0]["first"] - start["first"]).max() == 0  # the warm-up begins at 0
    assert np.abs(wanted[-1]["first"] - start["first"]).max() > 1e-2
    for want, got in zip(wanted, found, strict=True):
        for k in SHAPES:
            np.testing.assert_allclose(got[k], want[k], rtol=1e-5, atol=2e-6)


def test_the_first_update_of_rmsprop_is_ten_rates_long():
    optim = optim_of("rmsprop", warmup_ratio=0.0)
    one = [{k: np.full(s, -2.0) for k, s in SHAPES.items()}]
    start = {k: np.zeros(s) for k, s in SHAPES.items()}
    np.testing.assert_allclose(ours(optim, start, one)[0]["second"], 10 * optim.peak_lr, rtol=1e-5)


@pytest.mark.parametrize("field", [{"betas": (0.1, 0.9)}, {"weight_decay": 0.1}])
def test_rmsprop_refuses_momentum_and_weight_decay(field):
    with pytest.raises(ValueError, match="rmsprop has neither .*=0.1 .*must be 0"):
        optim_of("rmsprop", **field)


def test_an_optimizer_is_named_in_every_config():
    good = load_config("demo_sft").to_dict()
    less = {k: v for k, v in good["optim"].items() if k != "name"}
    with pytest.raises(ValueError, match=r"config.optim .*missing: name"):
        RunConfig.from_config_dict(good | {"optim": less})
    with pytest.raises(
        ValueError, match="optim.name='sgd' is not known; use one of adamw, rmsprop"
    ):
        RunConfig.from_config_dict(good | {"optim": good["optim"] | {"name": "sgd"}})
