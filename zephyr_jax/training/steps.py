"""The training and the evaluation step, pure functions, and their programs.

Gradients of sums are added over micro-batches in float32 and divided once by the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.run import LoraConfig, RunConfig
from zephyr_jax.losses.pairs import RewardShift, kl_estimate
from zephyr_jax.models.lora import abstract_adapters, freeze
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.sharding import named_sharding, spec, step_options
from zephyr_jax.training import scores as scoring
from zephyr_jax.training.optim import is_spike
from zephyr_jax.training.scores import BatchSums, LossSums, StepInputs, Sums, loss_sums
from zephyr_jax.types import Params, PreferenceBatch, Rows, TrainState

_WINDOW = 32  # losses that a spike is compared with


def train_step(
    sums: LossSums,
    optimizer: optax.GradientTransformation,
    n_micro: int,
    *,
    dropout_seed: int | None = None,
    shift_decay: float | None = None,
    estimates_kl: bool = False,
    spike: float | None = None,
) -> Callable[..., tuple[TrainState, Sums]]:
    """The step `(state, batch, base=None, hold=0) -> (state, sums)`, to be jitted, state donated.

    A step is `bad` (a sum of 0 or 1) if its loss or gradient is not finite, or its loss `is_spike`.
    Its gradient, and that of any step with `hold`, becomes nan: `guarded` optimizers let it pass.
    Dropout of adapters is drawn per step and micro-batch. `shift_decay` is that of the state's mean
    reward. A loss that `estimates_kl` needs that of the whole batch first, by a forward pass more.
    """
    grad = jax.value_and_grad(sums, has_aux=True)

    def step(
        state: TrainState, batch: Any, base: Params | None = None, hold: Array | float = 0.0
    ) -> tuple[TrainState, Sums]:
        shift = 0.0 if state.shift is None else state.shift.delta
        parts = scoring.micro_batches(batch, n_micro)

        def inputs(number: Array) -> StepInputs:
            key = None
            if dropout_seed is not None:
                key = jax.random.key(dropout_seed)
                key = jax.random.fold_in(jax.random.fold_in(key, state.step), number)
            return StepInputs(base, key, shift)

        def add(carry, numbered):
            number, part = numbered
            (_, aux), grads = grad(state.params, part, inputs(number))
            return jax.tree.map(jnp.add, carry, (grads, aux.sums)), None

        shift = None if estimates_kl else shift
        if estimates_kl and n_micro > 1:
            each = jax.lax.map(
                lambda numbered: sums(state.params, numbered[1], inputs(numbered[0]))[1].sums,
                (jnp.arange(n_micro), parts),
            )
            shift = kl_estimate(each["kl"].sum(), each["weight"].sum())
        first = jax.tree.map(lambda x: x[0], parts)
        info = jax.eval_shape(sums, state.params, first, StepInputs(base))[1].sums
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, info))
        (grads, info), _ = jax.lax.scan(add, zeros, (jnp.arange(n_micro), parts))
        return _applied(optimizer, state, grads, info, hold, spike, shift_decay)

    return step


def _applied(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    info: Sums,
    hold: Array | float,
    spike: float | None,
    shift_decay: float | None,
) -> tuple[TrainState, Sums]:
    """The state after a step with these summed gradients and metrics, and the metrics."""
    weight = jnp.maximum(info["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)
    norm, loss = optax.tree.norm(grads), info["loss"] / weight
    bad = ~jnp.isfinite(norm + loss) | is_spike(loss, state.recent, spike)
    info |= {"grad_norm": norm * info["weight"], "bad": bad.astype(jnp.float32)}
    held = bad | (jnp.asarray(hold) > 0)
    grads = jax.tree.map(lambda g: jnp.where(held, jnp.nan, g), grads)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
    before = shift, recent = state.shift, state.recent
    if shift is not None and shift_decay is not None:
        rewards = info["rewards/chosen"] + info["rewards/rejected"]
        shift = shift.after(rewards, info["weight"], shift_decay)
    if recent is not None:
        recent = jnp.roll(recent, 1).at[0].set(loss)
    rest = jax.tree.map(lambda x, old: jnp.where(held, old, x), (shift, recent), before)
    return TrainState(state.step + 1, params, opt_state, state.reference, *rest), info


def eval_step(sums: LossSums, n_micro: int) -> Callable[..., BatchSums]:
    """The evaluation `(params, batch, inputs) -> BatchSums`, in the step's micro-batches."""

    def step(params: Params, batch: Any, inputs: StepInputs = scoring.NO_INPUTS) -> BatchSums:
        parts = scoring.micro_batches(batch, n_micro)
        each = jax.lax.map(lambda part: sums(params, part, inputs)[1], parts)
        total = jax.tree.map(lambda x: x.sum(axis=0), each.sums)
        return BatchSums(total, scoring.in_order(each.pairs))

    return step


def jitted_steps(config: RunConfig, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """The jitted `train_step`, its state donated, and the jitted `eval_step` of a run."""
    sums, n_micro, dpo = loss_sums(config), config.train.micro_batches, config.dpo
    step = train_step(
        *(sums, optimizer, n_micro),
        dropout_seed=config.seed + 1 if config.lora and config.lora.dropout else None,
        shift_decay=dpo.option("bco_decay") if dpo else None,
        estimates_kl=dpo is not None and dpo.labeled,
        spike=config.train.bad_steps.get("spike"),
    )
    options = step_options(config.train.compiler_options)
    evaluate = jax.jit(eval_step(sums, n_micro), compiler_options=options)
    return jax.jit(step, donate_argnums=0, compiler_options=options), evaluate


def initial_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    reference: Params | None = None,
) -> TrainState:
    """The state of step 0 with these parameters, on the ambient mesh.

    `reference` are those of a synced reference, if it begins with others.
    """
    dpo, first = config.dpo, None
    if dpo and dpo.reference == "synced":
        first = params if reference is None else reference

    @jax.jit
    def rest(params: Params, first: Params | None) -> tuple[Any, ...]:
        copy = jax.tree.map(jnp.copy, first)
        shift = recent = None
        if dpo and dpo.option("bco_decay") is not None:
            shift = RewardShift(jnp.float32(0), jnp.float32(0))
        if "spike" in config.train.bad_steps:
            recent = jnp.full(_WINDOW, jnp.nan)
        return jnp.int32(0), optimizer.init(params), copy, shift, recent

    step, *others = rest(params, first)
    return TrainState(step, params, *others)


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a run's state on the ambient mesh; nothing is allocated."""
    model, lora = config.model, config.lora
    params = abstract_adapters(model, lora) if lora else abstract_params(model)
    state = jax.eval_shape(lambda params: initial_state(config, optimizer, params), params)
    moments = _with_shardings(state.opt_state, config.optim.offload_optimizer)
    return _with_shardings(state)._replace(opt_state=moments)


def abstract_batch(
    n_rows: int, seq_len: int, documents: int | None = None
) -> Rows | PreferenceBatch:
    """The shapes of a batch of rows `B T`, or of pairs, at most `documents` a row."""

    def shape(axes: str, dtype: Any, *sizes: int) -> Any:
        sharding = named_sharding(spec(axes))
        return jax.ShapeDtypeStruct((n_rows, *sizes), dtype, sharding=sharding)

    ids = shape("BT", jnp.int32, seq_len)
    rows = Rows(ids, ids, ids, ids, shape("BT", jnp.bool_, seq_len))
    if documents is None:
        return rows
    logps, mask = shape("B..", jnp.float32, documents, 2), shape("B.", jnp.bool_, documents)
    return PreferenceBatch(rows, mask, logps, desirable=mask)


def abstract_base(model: MistralConfig, lora: LoraConfig) -> Params:
    """The shapes of the frozen parameters of adapters."""
    frozen = jax.eval_shape(lambda x: freeze(x, lora.base, model.dtype), abstract_params(model))
    return _with_shardings(frozen)


def _with_shardings(shapes: Any, offload: bool = False) -> Any:
    """Shapes with concrete shardings; scalars, which have none of their own, are replicated."""

    def with_sharding(x: Any) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(x.sharding.spec if x.sharding else spec(""))
        if offload and x.ndim:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, shapes)
