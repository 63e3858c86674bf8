"""The learning rate of every step of every recipe beside transformers' own schedules."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe_table import LENGTHS

from zephyr_jax.config.run import load_config
from zephyr_jax.training.optim import make_schedule, warmup_steps

torch = pytest.importorskip("torch", reason="`make parity` installs torch")
transformers = pytest.importorskip("transformers", reason="`make parity` installs transformers")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", LENGTHS)
def test_every_step(name):
    optim, length = load_config(name).optim, LENGTHS[name]
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.peak_lr)
    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }[optim.schedule]
    scheduler, rates = make(theirs, length.warmup, length.steps), []
    for _ in range(length.steps):
        rates.append(scheduler.get_last_lr()[0])  # what this update is made with
        theirs.step()
        scheduler.step()
    ours = jax.vmap(make_schedule(optim, length.steps))(jnp.arange(length.steps))
    np.testing.assert_allclose(ours, rates, rtol=1e-6, atol=2e-7 * optim.peak_lr)


@pytest.mark.parametrize("name", LENGTHS)
def test_warm_up_steps(name, tmp_path):
    pytest.importorskip("accelerate", reason="TrainingArguments needs accelerate")
    optim, length = load_config(name).optim, LENGTHS[name]
    known = inspect.signature(transformers.TrainingArguments).parameters
    field = "warmup_ratio" if "warmup_ratio" in known else "warmup_steps"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, **{field: optim.warmup_ratio}
    )
    assert arguments.get_warmup_steps(length.steps) == warmup_steps(optim, length.steps)
