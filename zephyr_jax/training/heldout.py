"""Evaluation inside training: the whole held-out set, exact whatever the batch or process count."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.data.packing.batches import HostBatch
from zephyr_jax.evaluation.pairs import PairTable, by_source, pair_means, pair_table, save_table
from zephyr_jax.training.metrics import Meter
from zephyr_jax.training.steps import BatchSums

_BY_SOURCE = ("pairs", "loss", "rewards/accuracies", "rewards/margins")


class Heldout:
    """Collects the evaluation of each batch: sums of dialogues, a table of pairs.

    `beta` is that of the implicit rewards, None for dialogues; `sources` maps pair ids.
    """

    def __init__(self, beta: float | None, sources: dict[int, str]):
        self._beta, self._sources, self._meter = beta, sources, Meter()
        self._parts: list[PairTable] = []

    def add(self, host: HostBatch, batch: Any, out: BatchSums) -> None:
        """Adds a batch; waits for the devices, and for the other processes."""
        if out.pairs is None:
            self._meter.add(out.sums)
            return
        losses, logps, tokens = (_gather(x) for x in out.pairs)
        ref_logps = _gather(batch.ref_logps)
        self._parts.append(PairTable(host.pair_ids, losses, logps, ref_logps, tokens))

    def means(self) -> dict[str, float]:
        """The metrics, named `eval_...`; of pairs with several sources `eval_source/...` too.

        The mean of dialogues is over target tokens, that of pairs over pairs.
        """
        if self._beta is None:
            return {f"eval_{name}": value for name, value in self._meter.means().items()}
        table = pair_table(self._parts)
        means = {f"eval_{name}": x for name, x in pair_means(table, self._beta).items()}
        sources = by_source(table, self._sources, self._beta)
        if len(sources) > 1:
            for source, values in sources.items():
                means |= {f"eval_source/{source}/{name}": values[name] for name in _BY_SOURCE}
        return means

    def save(self, path: epath.Path) -> None:
        """Writes the table of pairs, if there is one; only process 0 does."""
        if self._parts and not jax.process_index():
            save_table(pair_table(self._parts), path)


def _gather(array: jax.Array) -> np.ndarray:
    """All of an array that is sharded over processes."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
