"""Evaluation inside training: the whole held-out set, exact whatever the batch or process count."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import HostBatch
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.evaluation.pairs import PairTable, by_source, pair_metrics, pair_table, save_table
from zephyr_jax.training.metrics import Meter
from zephyr_jax.training.steps import BatchSums

_BY_SOURCE = ("pairs", "loss", "rewards/accuracies", "rewards/margins")


class Heldout:
    """Collects what the evaluation step says of each batch: sums of dialogues, a table of pairs."""

    def __init__(self, config: RunConfig, packed: PackedSet):
        self._beta = config.dpo.beta if config.dpo else None
        self._packed, self._meter = packed, Meter()
        self._parts: list[PairTable] = []

    def add(self, host: HostBatch, batch: Any, out: BatchSums) -> None:
        """Takes a batch; waits for the devices, and for the other processes."""
        if out.pairs is None:
            self._meter.add(out.sums)
            return
        losses, logps, tokens = (_whole(x) for x in out.pairs)
        self._parts.append(PairTable(host.pair_ids, losses, logps, _whole(batch.ref_logps), tokens))

    def means(self) -> dict[str, float]:
        """The metrics, named `eval_...`; where pairs have several sources, `eval_source/...` too.

        The mean of dialogues is over target tokens, that of pairs over pairs.
        """
        if self._beta is None:
            return {f"eval_{name}": value for name, value in self._meter.means().items()}
        table = pair_table(self._parts)
        said = {f"eval_{name}": x for name, x in pair_metrics(table, self._beta).items()}
        sources = by_source(table, self._packed.sources("eval"), self._beta)
        if len(sources) > 1:
            for source, means in sources.items():
                said |= {f"eval_source/{source}/{name}": means[name] for name in _BY_SOURCE}
        return said

    def save(self, path: epath.Path) -> None:
        """Writes the table of pairs, if there is one; only process 0 does."""
        if self._parts and not jax.process_index():
            save_table(pair_table(self._parts), path)


def _whole(array: jax.Array) -> np.ndarray:
    """All of an array that is divided over processes."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
