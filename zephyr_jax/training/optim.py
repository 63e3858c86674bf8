"""The optimizers and the learning-rate schedules."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax import contrib

from zephyr_jax.config.run import OptimConfig


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """The number of warm-up steps: the ratio's share of all steps, rounded up."""
    return math.ceil(config.warmup_ratio * total_steps)


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: linear warm-up to the peak, then the schedule's fall.

    The first of `w` warm-up steps has `peak / w`, or 0 as in Hugging Face's schedules. Cosine,
    linear and the last share of wsd end at 0 at `total_steps`.
    """
    warmup, peak = warmup_steps(config, total_steps), config.peak_lr
    rest = max(total_steps - warmup, 1)
    name, share = config.schedule_and_share
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif name in ("linear", "wsd"):
        fall = rest if name == "linear" else min(math.ceil(share * total_steps), rest)
        after = optax.linear_schedule(peak, 0.0, fall, rest - fall)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    first, rises = (0.0, warmup) if config.warmup_from_zero else (peak / warmup, warmup - 1)
    return optax.join_schedules([optax.linear_schedule(first, peak, rises), after], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping of the averaged gradient by its global norm, then optax's optimizer of that name.

    AdamW and RMSprop are torch's. Weight decay spares norm scales. RMSprop's mean square begins at
    0 and is not corrected, so its first updates are up to ten times the rate at 0.99. Adafactor
    (arXiv:1804.04235) has momentum and no relative step sizes. Muon orthogonalizes each layer's
    matrices, scaled to the length of AdamW's updates (arXiv:2502.16982); NAdam takes the rest.
    """
    b1, b2 = config.betas
    dtype, decay = jnp.dtype(config.mu_dtype), config.weight_decay

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)

    if config.name == "adafactor":
        updates = [
            optax.scale_by_factored_rms(decay_rate=b2, epsilon=config.eps),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False, accumulator_dtype=dtype),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(schedule),
        ]
    else:
        factory = getattr(contrib if config.name == "muon" else optax, config.name)
        values = dict.fromkeys(("b1", "beta", "adam_b1"), b1) | {"momentum": b1 or None}
        values |= dict.fromkeys(("b2", "decay", "adam_b2"), b2)
        values |= {"eps": config.eps, "eps_in_sqrt": False, "weight_decay": decay}
        values |= dict.fromkeys(("mask", "weight_decay_mask"), decayed)
        values |= dict.fromkeys(("mu_dtype", "accumulator_dtype"), dtype)
        values |= {"muon_weight_dimension_numbers": _matrices, "consistent_rms": 0.2}
        known = inspect.signature(factory).parameters
        optimizer = factory(schedule, **{k: x for k, x in values.items() if k in known})
        updates = [_auto_sharded(optimizer) if config.name == "muon" else optimizer]
    optimizer = guarded(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), *updates))
    return in_host_memory(optimizer) if config.offload_optimizer else optimizer


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same updates; where the gradient is not finite they are 0, and no moment changes."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        finite = jnp.isfinite(optax.tree.norm(updates))
        new, after = inner.update(updates, state, params)
        new = jax.tree.map(lambda x: jnp.where(finite, x, 0), new)
        return new, jax.tree.map(lambda x, old: jnp.where(finite, x, old), after, state)

    return optax.GradientTransformation(inner.init, update)


def is_spike(
    loss: Array, recent: Float[Array, " W"] | None, threshold: float | None
) -> Bool[Array, ""] | bool:
    """Whether a loss is above the median of recent ones by so many robust standard deviations.

    Those are 1.4826 median absolute deviations. Never while one of the recent losses is nan.
    """
    if recent is None or threshold is None:
        return False
    median = jnp.median(recent)
    deviation = 1.4826 * jnp.median(jnp.abs(recent - median))
    return loss > median + threshold * jnp.maximum(deviation, 1e-6)


def _matrices(params: Any) -> Any:
    """For Muon: which axes of a layer's parameter are summed over; None for what is no matrix."""

    def axes(path: Any, x: Any) -> contrib.MuonDimensionNumbers | None:
        names = [str(part.key) for part in path]
        if names[0] != "layers" or "norm" in names[-1]:
            return None
        inner = tuple(range(1, x.ndim - 1)) if "o" in names else (1,)
        outer = tuple(axis for axis in range(1, x.ndim) if axis not in inner)
        return contrib.MuonDimensionNumbers(inner, outer)

    return jax.tree_util.tree_map_with_path(axes, params)


def _auto_sharded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same updates, in which the compiler shards what lies between inputs and results."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        sharded: Any = jax.sharding.auto_axes(inner.update, out_sharding=specs)
        return sharded(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


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
