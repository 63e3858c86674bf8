"""The optimizers and the learning-rate schedules of the published recipes."""

from __future__ import annotations

import math

import jax
import optax

from zephyr_jax.config import OptimConfig


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
    """Clipping of the averaged gradient by its global norm, then torch's AdamW or RMSprop.

    AdamW is bias-corrected; its weight decay, where a recipe has any, spares norm scales (vectors,
    stacked over layers or not). RMSprop divides by the root of a running mean square that begins at
    0 and is not corrected, so that its first updates are large: the sign times
    `lr / sqrt(1 - b2)`, ten times the rate at 0.99.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    if config.name == "rmsprop":
        return optax.chain(clip, optax.rmsprop(schedule, config.b2, config.eps, eps_in_sqrt=False))

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)

    return optax.chain(
        clip,
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
