"""The types of batches and states, and the logical axes.

Axes: B rows of a batch (R in preference training), T tokens of a row (queries), S keys, L layers,
D model, F feed-forward, V vocabulary, K key-value heads (in preference batches: documents of a
row), G query heads per key-value head, H head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
AnyArray = jax.Array | np.ndarray  # what public functions take


class Rows(NamedTuple):
    """Packed rows, the one layout of every stage."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0: padding; k: the k-th document of the row
    positions: Int[Array, "B T"]
    branches: Int[Array, "B T"]  # 0: shared prefix; 1: chosen answer; 2: rejected answer
    loss_mask: Bool[Array, "B T"]  # token t is a target, which token t-1 predicts


class PreferenceBatch(NamedTuple):
    """Rows of preference pairs; document k of a row (segment k+1) is a pair where `pair_mask`.

    In place of a pair, KTO has an answer (as chosen) and that to another prompt (as rejected).
    """

    rows: Rows
    pair_mask: Bool[Array, "R K"]
    ref_logps: Float[Array, "R K 2"]  # of the frozen reference; chosen, rejected
    desirable: Bool[Array, "R K"] | None = None  # the label of the first answer


class TrainState(NamedTuple):
    """What a training step maps to itself. Parameters and moments are float32."""

    step: Int[Array, ""]
    params: Params  # those that are trained: all, or adapters
    opt_state: Any
    reference: Params | None = None  # like params, where the reference moves too
    shift: Any = None  # a RewardShift, where the loss subtracts the mean reward
    recent: Float[Array, " W"] | None = None  # the last losses, where spikes are looked for
