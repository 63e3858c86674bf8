"""The optimizers and the learning-rate schedules of the published recipes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zephyr_jax.config.run import OptimConfig


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """The number of warm-up steps: the ratio's share of all steps, rounded up."""
    return math.ceil(config.warmup_ratio * total_steps)


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then down to 0 at `total_steps`.

    The first update has learning rate 0 where there is a warm-up, as in Hugging Face's schedules.
    """
    warmup = warmup_steps(config, total_steps)
    rest = max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.peak_lr, rest)
    else:
        decay = optax.linear_schedule(config.peak_lr, 0.0, rest)
    if not warmup:
        return decay
    rise = optax.linear_schedule(0.0, config.peak_lr, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping of the averaged gradient by its global norm, then AdamW, RMSprop or Adafactor.

    AdamW and RMSprop are torch's. Weight decay spares norm scales. RMSprop's running mean square
    begins at 0 and is not corrected, so its first updates are `lr / sqrt(1 - b2)` long, ten times
    the rate at 0.99. Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) has momentum and no
    relative step sizes.
    """
    b1, b2 = config.betas
    dtype, decay = jnp.dtype(config.mu_dtype), config.weight_decay

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)

    if config.name == "rmsprop":
        updates = [optax.rmsprop(schedule, b2, config.eps, eps_in_sqrt=False)]
    elif config.name == "adafactor":
        updates = [
            optax.scale_by_factored_rms(decay_rate=b2, epsilon=config.eps),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False, accumulator_dtype=dtype),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(schedule),
        ]
    else:
        adamw = optax.adamw(
            schedule, b1, b2, eps=config.eps, weight_decay=decay, mask=decayed, mu_dtype=dtype
        )
        updates = [adamw]
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), *updates)
    return in_host_memory(optimizer) if config.offload_optimizer else optimizer


def in_host_memory(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same updates, with all moments in pinned host memory between them."""

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)

    def init(params: Any) -> Any:
        return moved(inner.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(init, update)
