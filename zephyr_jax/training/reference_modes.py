"""Where the reference log-probs of a batch come from: a file, frozen parameters, or nowhere."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import HostBatch, Plan
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.models.options import ForwardOptions
from zephyr_jax.training.reference import compute_reference, load_reference
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.training.steps import move_reference
from zephyr_jax.types import Rows, TrainState


class Reference:
    """The reference of one run, as `dpo.reference` says.

    Args:
        config: of a run with a preference stage.
        packed: its rows.
        plan: its batches.
        parts: what stored log-probs depend on (`reference.reference_parts`).
        initial: gives the parameters that the run began with; called where they are needed.
    """

    def __init__(
        self,
        config: RunConfig,
        packed: PackedSet,
        plan: Plan,
        parts: dict[str, Any],
        initial: Any,
    ):
        dpo, train = config.dpo, config.train
        assert dpo is not None
        self._config, self.mode = dpo, dpo.reference
        self._stored, self._params = None, None
        if self.mode == "precomputed":
            self._stored = load_reference(packed, parts)
            if self._stored is None:
                self._stored = compute_reference(config, initial(), packed, plan, parts)
        elif self.mode == "adapter_off" or (self.mode == "synced" and config.lora):
            self._params = initial()
        elif self.mode == "in_memory":
            # A copy: the step donates the policy's buffers.
            cast = functools.partial(jnp.array, dtype=config.model.dtype, copy=True)
            self._params = jax.tree.map(cast, initial())
        score = functools.partial(
            reference_logps,
            config.model,
            n_pairs=packed.manifest["pairs_per_row"],
            n_micro=train.micro_batches,
            ld_alpha=dpo.ld_alpha,
        )
        self._options = ForwardOptions(attention=train.attention, lora=config.lora)
        self._score = jax.jit(score)
        self._move = jax.jit(
            functools.partial(move_reference, share=dpo.ref_sync_alpha), donate_argnums=0
        )

    def logps(self, host: HostBatch, rows: Rows, state: TrainState) -> np.ndarray | jax.Array:
        """The reference's log-probs of a batch, `R K 2` float32."""
        if self._stored is not None:
            return self._stored.lookup(host.pair_ids)
        if self.mode == "none":
            return np.zeros((*host.pair_ids.shape, 2), np.float32)
        if self.mode != "synced":
            return self._score(self._params, rows, options=self._options)
        if self._params is None:
            return self._score(state.reference, rows, options=self._options)
        adapted = dataclasses.replace(self._options, adapters=state.reference)
        return self._score(self._params, rows, options=adapted)

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state behind step `step`, its reference moved where that is due."""
        if self.mode != "synced" or step % self._config.ref_sync_steps:
            return state
        return state._replace(reference=self._move(state.reference, state.params))
