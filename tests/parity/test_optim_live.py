"""Ten updates of each optimizer beside torch's own, clipping and schedule included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zephyr_jax.config.run import load_config
from zephyr_jax.training.optim import make_optimizer, make_schedule

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
    start = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    grads = [
        [(size * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
        for _ in range(STEPS)
    ]
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
                ours, tensor.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=f"step {step}"
            )
    assert (
        max(np.abs(a - b).max() for a, b in zip(jax.device_get(params), start, strict=True)) > 0.01
    )
