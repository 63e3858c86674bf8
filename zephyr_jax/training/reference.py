"""The reference of preference training: log-probs from a file, from parameters, or none.

A folder holds those of every pair of a data set, joined by pair id, under a digest of all that they
depend on; runs that differ in anything else (loss, learning rate, batch, packing, mesh) share it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from tqdm import tqdm

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import HostBatch, Plan, device_rows, read_batches
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.distributed import first_decides
from zephyr_jax.models.mistral import ForwardOptions
from zephyr_jax.sharding import step_options
from zephyr_jax.storage import MANIFEST, seal, verify, write_atomic
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.types import Params, Rows, TrainState

_FILE = "logps.npz"
# (params, reference, share) -> share params + (1 - share) reference, the soft update of TR-DPO,
# Gorbatovski et al. 2024, arXiv:2404.09656; a share of 1 is the hard one.
_moved = jax.jit(optax.incremental_update, donate_argnums=1, static_argnums=2)
# What shapes a pair's tokens, of all that shapes a packed set with its rows and batches
_SHAPING = ("format", "dataset", "splits", "tokenizer", "chat", "max_length", "max_prompt_length")
_MISMATCHING = ("stage", "batch_size", "seed")  # and what chooses the answer to another prompt


class Reference:
    """The reference of a run, as `dpo.reference` says.

    `initial` returns its parameters before the first step, and is called where they are needed.
    """

    def __init__(
        self,
        config: RunConfig,
        packed: PackedSet,
        plan: Plan,
        parts: dict[str, Any],
        initial: Callable[[], Params],
    ):
        dpo, train = config.dpo, config.train
        assert dpo is not None
        self._dpo, self._stored, self._params = dpo, None, None
        self._options = ForwardOptions(attention=train.attention, lora=config.lora)
        fixed = {"n_pairs": packed.manifest["pairs_per_row"], "n_micro": train.micro_batches}
        fixed["ld_alpha"] = dpo.option("ld_alpha")
        score = functools.partial(reference_logps, config.model, **fixed)
        self._score = jax.jit(score, compiler_options=step_options(train.compiler_options))
        if dpo.reference == "precomputed":
            self._stored = load_reference(packed, parts)
            if self._stored is None:
                score = functools.partial(self._score, initial(), options=self._options)
                self._stored = compute_reference(score, packed, plan, parts, config.seed)
        elif config.lora and dpo.reference != "none":
            self._params = initial()
        elif dpo.reference == "in_memory":
            # A copy: the step donates the policy's buffers.
            cast = functools.partial(jnp.array, dtype=config.model.dtype, copy=True)
            self._params = jax.tree.map(cast, initial())

    def logps(self, host: HostBatch, rows: Rows, state: TrainState) -> np.ndarray | jax.Array:
        """The reference's log-probs of a batch, `R K 2` float32."""
        if self._stored is not None:
            return self._stored.lookup(host.pair_ids)
        if self._dpo.reference == "none":
            return np.zeros((*host.pair_ids.shape, 2), np.float32)
        params, options = self._params, self._options
        if self._dpo.reference == "synced" and params is None:
            params = state.reference
        elif self._dpo.reference == "synced":
            options = dataclasses.replace(options, adapters=state.reference)
        return self._score(params, rows, options=options)

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state after step `step`, with its reference moved where that is due."""
        share, period = map(self._dpo.option, ("ref_sync_alpha", "ref_sync_steps"))
        if state.reference is None or step % period:
            return state
        return state._replace(reference=_moved(state.params, state.reference, share))


def reference_parts(
    packed: PackedSet, parameters: str, dtype: str, ld_alpha: float
) -> dict[str, Any]:
    """Everything that stored log-probs depend on, by name; `parameters` is their digest."""
    made_from = packed.manifest["made_from"]
    names = _SHAPING + (_MISMATCHING if made_from.get("stage") == "kto" else ())
    parts = {name: made_from[name] for name in names}
    return parts | {"parameters": parameters, "dtype": dtype, "ld_alpha": ld_alpha}


def reference_digest(parts: dict[str, Any]) -> str:
    """The sha256 of `reference_parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ReferenceLogps:
    """Stored log-probs, looked up by pair id."""

    def __init__(self, pair_ids: np.ndarray, logps: np.ndarray):
        order = np.argsort(pair_ids)
        self.pair_ids, self.logps = pair_ids[order], logps[order]
        if (wrong := self.pair_ids[~np.isfinite(self.logps).all(axis=-1)]).size:
            names = f"{wrong.size} pairs, first ids {wrong[:5].tolist()}"
            raise ValueError(f"the reference's log-probs are not finite of {names}")

    def lookup(self, pair_ids: np.ndarray) -> np.ndarray:
        """Chosen and rejected log-probs `R K 2` float32 of ids `R K`; zeros where the id is 0."""
        present = pair_ids != 0
        if (missing := present & ~np.isin(pair_ids, self.pair_ids)).any():
            first = pair_ids[missing][0]
            raise ValueError(f"{missing.sum()} pairs have no stored log-probs, first id {first}")
        out = np.zeros((*pair_ids.shape, 2), np.float32)
        out[present] = self.logps[np.searchsorted(self.pair_ids, pair_ids[present])]
        return out


def reference_path(packed: PackedSet, digest: str) -> epath.Path:
    """The folder of this digest: in the folder `reference` next to `packed`, also behind a URL."""
    return epath.Path(packed.home or packed.folder).parents[1] / "reference" / digest[:16]


def load_reference(packed: PackedSet, parts: dict[str, Any]) -> ReferenceLogps | None:
    """The stored log-probs that belong to these parts, verified; None where none were computed."""
    folder = reference_path(packed, reference_digest(parts))

    def size() -> int | None:
        if not (folder / MANIFEST).is_file():
            return None
        verify(folder, remedy=f"remove {folder}, which the next start computes again")
        return (folder / _FILE).stat().length

    n_bytes = first_decides(size)
    if n_bytes is None:
        return None
    content = bytes(n_bytes) if jax.process_index() else (folder / _FILE).read_bytes()
    if jax.process_count() > 1:
        content = np.asarray(broadcast_one_to_all(np.frombuffer(content, np.uint8))).tobytes()
    with np.load(io.BytesIO(content)) as file:
        stored = ReferenceLogps(file["pair_ids"], file["logps"])
    logging.info("reference log-probs of %d pairs from %s", len(stored.pair_ids), folder)
    return stored


def compute_reference(
    score: Callable[[Rows], jax.Array], packed: PackedSet, plan: Plan, parts: dict, seed: int
) -> ReferenceLogps:
    """Computes and stores all pairs' log-probs; `score` maps global rows to theirs, `R K 2`."""
    folder, first = reference_path(packed, reference_digest(parts)), jax.process_index() == 0
    ids, values, stops = [], [], {"train": plan.steps_per_epoch, "eval": plan.eval_steps}
    for split in packed.manifest["splits"]:
        stop = stops[split]
        batches = read_batches(packed, plan, split, 0, stop, seed)
        for batch in tqdm(batches, desc=f"reference {split}", total=stop, disable=not first):
            logps = process_allgather(score(device_rows(batch)), tiled=True)
            values.append(logps.reshape(-1, 2))
            ids.append(batch.pair_ids.reshape(-1))
    # A pair that occurs several times is stored once, id 0 never.
    pair_ids, firsts = np.unique(np.concatenate(ids), return_index=True)
    present = pair_ids != 0
    table = ReferenceLogps(pair_ids[present], np.concatenate(values)[firsts[present]])
    if first:
        arrays: dict[str, Any] = {"pair_ids": table.pair_ids, "logps": table.logps}
        write_atomic(folder / _FILE, lambda file: np.savez(file, **arrays))
        write_atomic(folder / "parts.json", json.dumps(parts, indent=1))
        seal(folder)
    logging.info("reference log-probs of %d pairs: %s", len(table.pair_ids), folder)
    return table
