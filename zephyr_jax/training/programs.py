"""The programs of a run before any array is there: the state by shapes, the steps under `jax.jit`.

`fit` restores into this state and runs these steps; `plan` compiles them for machines elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from zephyr_jax.config.run import RunConfig
from zephyr_jax.losses.pairs import RewardShift
from zephyr_jax.models.lora import abstract_adapters
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.models.quantized import freeze
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.training.steps import LossSums, eval_step, train_step
from zephyr_jax.types import Params, PreferenceBatch, Rows, TrainState


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a run's state on the ambient mesh; nothing is allocated."""
    dpo = config.dpo
    if config.lora:
        params = abstract_adapters(config.model, config.lora)
    else:
        params = abstract_params(config.model)
    opt_state = _placed(jax.eval_shape(optimizer.init, params), config.optim.offload_optimizer)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=named_sharding(spec("")))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=named_sharding(spec("")))
    return TrainState(
        step,  # type: ignore[arg-type]  # shapes of arrays
        params,
        opt_state,
        params if dpo and dpo.reference == "synced" else None,
        RewardShift(number, number) if dpo and dpo.bco_decay is not None else None,  # type: ignore[arg-type]
    )


def abstract_batch(config: RunConfig, n_rows: int, documents: int = 0) -> Rows | PreferenceBatch:
    """A batch of the run by shapes: rows `B T`, and of pairs what is known of `B K` documents.

    Args:
        config: of the run.
        n_rows: B.
        documents: K, the most pairs in a row.
    """

    def of(shape: tuple[int, ...], letters: str, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(spec(letters)))

    shape = (n_rows, config.data.seq_len)
    ids, mask = of(shape, "BT", jnp.int32), of(shape, "BT", jnp.bool_)
    rows = Rows(ids, ids, ids, ids, mask)
    if not config.dpo:
        return rows
    pairs = (n_rows, documents)
    logps = of((*pairs, 2), "B..", jnp.float32)
    return PreferenceBatch(rows, of(pairs, "B.", jnp.bool_), logps)


def jitted_steps(
    config: RunConfig, sums: LossSums, optimizer: optax.GradientTransformation
) -> tuple[Any, Any]:
    """The training step `(state, batch, base) -> (state, sums)`, state donated; the evaluation."""
    drops = config.lora and config.lora.dropout
    decay = config.dpo.bco_decay if config.dpo else None
    n_micro = config.train.micro_batches
    step = train_step(
        *(sums, optimizer, n_micro),
        dropout_seed=config.seed + 1 if drops else None,
        shift_decay=1.0 if decay is None else decay,
    )
    return jax.jit(step, donate_argnums=0), jax.jit(eval_step(sums, n_micro))


def abstract_base(config: RunConfig) -> Params | None:
    """The frozen parameters beside which adapters are trained, by shapes; else None."""
    lora, model = config.lora, config.model
    if not lora:
        return None
    held = jax.eval_shape(lambda x: freeze(x, lora.base, model.dtype), abstract_params(model))
    return _placed(held)


def _placed(shapes: Any, offload: bool = False) -> Any:
    """Shapes with their places on the mesh; a counter, which has none of its own, is whole."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        place = named_sharding(x.sharding.spec if x.sharding else spec(""))
        if offload and x.ndim:
            place = place.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, shapes)
