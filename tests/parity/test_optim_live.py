"""Updates, clipping and learning rates of every step against torch's and transformers' own."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipe_table import LENGTHS

from zephyr_jax.config.run import load_config
from zephyr_jax.training.optim import make_optimizer, make_schedule, warmup_steps

torch = pytest.importorskip("torch", reason="`make parity` installs torch")
transformers = pytest.importorskip("transformers", reason="`make parity` installs transformers")
pytestmark = pytest.mark.parity
STEPS = 10


def torchs(optim, tensors):
    """The optimizer as transformers' Trainer makes it: of RMSprop only the rate is named."""
    if optim.name == "rmsprop":
        return torch.optim.RMSprop(tensors, lr=optim.peak_lr)
    betas, decay = optim.betas, optim.weight_decay
    return torch.optim.AdamW(tensors, optim.peak_lr, betas, optim.eps, decay)


@pytest.mark.parametrize(
    "recipe", ["zephyr_7b_beta_dpo", "zephyr_7b_handbook_v020_dpo", "zephyr_7b_handbook_dpo"]
)
@pytest.mark.parametrize("size", [0.01, 3.0], ids=["below the clip", "clipped"])
def test_ten_updates(recipe, size):
    optim = dataclasses.replace(load_config(recipe).optim, peak_lr=1e-2)
    rng = np.random.default_rng(0)
    shapes = [(7, 5), (11,)]
    start, *grads = (
        [np.float32(scale * rng.normal(size=shape)) for shape in shapes]
        for scale in [1.0] + [size] * STEPS
    )
    optimizer = make_optimizer(optim, make_schedule(optim, STEPS))
    params = [jnp.asarray(x) for x in start]
    state = optimizer.init(params)
    tensors = [torch.nn.Parameter(torch.tensor(x)) for x in start]
    theirs = torchs(optim, tensors)
    scheduler = transformers.get_scheduler(optim.schedule, theirs, 1, STEPS)
    for step, grad in enumerate(grads):
        updates, state = optimizer.update([jnp.asarray(g) for g in grad], state, params)
        params = optax.apply_updates(params, updates)
        for tensor, g in zip(tensors, grad, strict=True):
            tensor.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(tensors, optim.max_grad_norm)
        theirs.step()
        scheduler.step()
        for ours, tensor in zip(params, tensors, strict=True):
            np.testing.assert_allclose(
                ours, tensor.detach(), rtol=1e-5, atol=1e-6, err_msg=f"step {step}"
            )
    assert max(np.abs(a - b).max() for a, b in zip(params, start, strict=True)) > 0.01


def their_rates(schedule, peak, steps, **options):
    """What each update is made with, by a schedule of transformers."""
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, rates = getattr(transformers.optimization, schedule)(theirs, **options), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", LENGTHS)
def test_the_rate_of_every_step_of_a_recipe(name):
    optim, length = load_config(name).optim, LENGTHS[name]
    make = f"get_{optim.schedule}_schedule_with_warmup"
    options = {"num_warmup_steps": length.warmup, "num_training_steps": length.steps}
    rates = their_rates(make, optim.peak_lr, length.steps, **options)
    assert optim.warmup_from_zero is not name.startswith(("zephyr_7b_dpo", "zephyr_7b_sft"))
    optim = dataclasses.replace(optim, warmup_from_zero=True)
    ours = jax.vmap(make_schedule(optim, length.steps))(jnp.arange(length.steps))
    np.testing.assert_allclose(ours, rates, rtol=1e-6, atol=2e-7 * optim.peak_lr)


@pytest.mark.parametrize(
    ("schedule", "name", "ratio"),
    [
        ("constant", "get_constant_schedule", 0.0),
        ("constant_with_warmup", "get_constant_schedule_with_warmup", 0.1),
        ("wsd", "get_wsd_schedule", 0.1),
        ({"wsd": 0.25}, "get_wsd_schedule", 0.05),
    ],
)
def test_the_other_schedules_are_transformers(schedule, name, ratio):
    optim = load_config("zephyr_7b_handbook_sft").optim
    optim = dataclasses.replace(optim, schedule=schedule, warmup_ratio=ratio)
    total, warmup, (_, share) = 90, warmup_steps(optim, 90), optim.schedule_and_share
    options = {} if schedule == "constant" else {"num_warmup_steps": warmup}
    if name == "get_wsd_schedule":
        options |= {"num_training_steps": total, "num_decay_steps": math.ceil(share * total)}
        options |= {"decay_type": "linear"}
    rates = their_rates(name, optim.peak_lr, total, **options)
    ours = jax.vmap(make_schedule(optim, total))(jnp.arange(total))
    np.testing.assert_allclose(ours, rates, rtol=1e-6, atol=2e-7 * optim.peak_lr)


@pytest.mark.parametrize("name", LENGTHS)
def test_the_warm_up_steps_of_a_recipe(name, tmp_path):
    pytest.importorskip("accelerate", reason="TrainingArguments needs accelerate")
    optim, length = load_config(name).optim, LENGTHS[name]
    known = inspect.signature(transformers.TrainingArguments).parameters
    field = "warmup_ratio" if "warmup_ratio" in known else "warmup_steps"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **{field: optim.warmup_ratio}
    )
    assert arguments.get_warmup_steps(length.steps) == warmup_steps(optim, length.steps)
