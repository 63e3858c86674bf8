"""The frozen reference of preference training: its log-probs, computed once and stored.

One file holds them for every pair of a data set, joined by pair id. It names all that they depend
on, and runs that differ in anything else (loss, learning rate, batch, packing, mesh) share it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing import remote
from zephyr_jax.data.packing.batches import Plan, device_rows, read_batches
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.models.options import ForwardOptions
from zephyr_jax.training.scores import reference_logps
from zephyr_jax.types import Params

_SECONDS_BETWEEN_PARTS = 30.0
# Of what shaped the packed set, all that shapes a pair's tokens; the rest shapes rows and batches.
_SHAPING = ("format", "dataset", "splits", "tokenizer", "chat", "max_length", "max_prompt_length")


def reference_parts(config: RunConfig, parameters: str, packed: PackedSet) -> dict[str, Any]:
    """Everything that stored log-probs depend on, by name.

    The digest of the parameters, the pairs, their tokenizer, template and truncation, the dtype
    of the computation, and how tokens are weighted in a sum.
    """
    assert config.dpo is not None
    made_from = packed.manifest["made_from"]
    return {
        "parameters": parameters,
        **{name: made_from[name] for name in _SHAPING},
        "dtype": config.model.dtype,
        "ld_alpha": config.dpo.ld_alpha,
    }


def reference_digest(parts: dict[str, Any]) -> str:
    """The sha256 of `reference_parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ReferenceLogps:
    """Stored log-probs, looked up by pair id."""

    def __init__(self, pair_ids: np.ndarray, logps: np.ndarray):
        order = np.argsort(pair_ids)
        self.pair_ids, self.logps = pair_ids[order], logps[order]

    def lookup(self, pair_ids: np.ndarray) -> np.ndarray:
        """Chosen and rejected log-probs `R K 2` float32 of ids `R K`; zeros where the id is 0.

        Raises:
            ValueError: if a pair has none.
        """
        missing = ~self.has(pair_ids)
        if missing.any():
            raise ValueError(
                f"{missing.sum()} pairs have no stored reference log-probs, first id "
                f"{pair_ids[missing][0]}; delete the file of the reference"
            )
        if not len(self.pair_ids):
            return np.zeros((*pair_ids.shape, 2), np.float32)
        at = np.minimum(np.searchsorted(self.pair_ids, pair_ids), len(self.pair_ids) - 1)
        return np.where((pair_ids != 0)[..., None], self.logps[at], np.float32(0))

    def has(self, pair_ids: np.ndarray) -> np.ndarray:
        """Which ids have log-probs; 0, which stands for no pair, always."""
        return np.isin(pair_ids, self.pair_ids) | (pair_ids == 0)

    @property
    def sha256(self) -> str:
        """Of all ids and values, whatever order they were given in."""
        return hashlib.sha256(self.pair_ids.tobytes() + self.logps.tobytes()).hexdigest()


def reference_path(packed: PackedSet, digest: str) -> Path:
    """The file with the log-probs of this digest, in the folder `reference` next to `packed`."""
    return packed.folder.parent.parent / "reference" / f"{digest[:16]}.npz"


def _home(packed: PackedSet) -> str:
    """The folder behind a URL that has the file too; "" where there is none."""
    return str(epath.Path(packed.home).parent.parent / "reference") if packed.home else ""


def load_reference(packed: PackedSet, parts: dict[str, Any]) -> ReferenceLogps | None:
    """The stored log-probs that belong to these parts, or None where there is no such file.

    With several processes the first one reads, and tells the others.

    Raises:
        ValueError: if the file is damaged or belongs to another reference.
    """
    digest = reference_digest(parts)
    path = reference_path(packed, digest)
    found = None
    if not jax.process_index():
        if not path.is_file() and (home := _home(packed)):
            path.parent.mkdir(parents=True, exist_ok=True)
            remote.fetch_file(home, path)
        if path.is_file():
            found = _read(path, parts, packed)
    return _agreed(found)


def _read(path: Path, parts: dict[str, Any], packed: PackedSet) -> ReferenceLogps:
    try:
        with np.load(path) as stored:
            theirs, layout, promised = (
                json.loads(str(stored["parts"])),
                str(stored["layout"]),
                str(stored["sha256"]),
            )
            found = ReferenceLogps(stored["pair_ids"], stored["logps"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no whole file of reference log-probs ({error}); delete it, or copy it again"
        ) from error
    if theirs != parts:
        differing = [
            f"{name} was {theirs.get(name)}, is {parts.get(name)}"
            for name in sorted(theirs.keys() | parts.keys())
            if theirs.get(name) != parts.get(name)
        ]
        raise ValueError(
            f"{path} belongs to reference {reference_digest(theirs)}, this run's is "
            f"{reference_digest(parts)}: {'; '.join(differing)}; delete the file"
        )
    if found.sha256 != promised:
        raise ValueError(
            f"{path} is not as it was written: {len(found.pair_ids)} pairs of digest "
            f"{found.sha256}, it says {promised}; delete it, or copy it again"
        )
    if layout != packed.folder.name:
        logging.info(
            "reference log-probs were computed on %s, this run packs %s: rewards at step 0 are 0 "
            "but for rounding",
            layout,
            packed.folder.name,
        )
    logging.info("reference log-probs of %d pairs from %s", len(found.pair_ids), path)
    return found


def _write(path: Path, found: ReferenceLogps, parts: dict[str, Any], packed: PackedSet) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(
            file,
            pair_ids=found.pair_ids,
            logps=found.logps,
            parts=json.dumps(parts, sort_keys=True),
            layout=packed.folder.name,
            sha256=found.sha256,
        )
    os.replace(temporary, path)


def _agreed(found: ReferenceLogps | None) -> ReferenceLogps | None:
    """What the first process found, on every process."""
    if jax.process_count() == 1:
        return found
    size = np.int32(-1 if found is None else len(found.pair_ids))
    size = int(multihost_utils.broadcast_one_to_all(size))
    if size < 0:
        return None
    # As 32-bit words: JAX would cut an id to its lower half.
    words = np.zeros((2, size, 2), np.uint32)
    if found is not None:
        words[0] = found.pair_ids.reshape(-1, 1).view(np.uint32)
        words[1] = found.logps.view(np.uint32)
    words = np.asarray(multihost_utils.broadcast_one_to_all(words))
    ids, logps = (np.ascontiguousarray(part) for part in words)
    return ReferenceLogps(ids.view(np.int64).reshape(-1), logps.view(np.float32))


def compute_reference(
    config: RunConfig, params: Params, packed: PackedSet, plan: Plan, parts: dict[str, Any]
) -> ReferenceLogps:
    """Computes and stores the log-probs of every training and held-out pair under `params`.

    What is known so far is kept beside the file every half minute; a run that is killed goes on
    from there.
    """
    assert config.dpo is not None
    path = reference_path(packed, reference_digest(parts))
    part = path.with_name(f"{path.name}.part")
    train, first = config.train, jax.process_index() == 0
    score = jax.jit(
        functools.partial(
            reference_logps,
            config.model,
            n_pairs=packed.manifest["pairs_per_row"],
            n_micro=train.micro_batches,
            ld_alpha=config.dpo.ld_alpha,
            options=ForwardOptions(attention=train.attention),
        )
    )
    known = _agreed(_known(part, parts, packed) if first else None)
    known = known or ReferenceLogps(np.zeros(0, np.int64), np.zeros((0, 2), np.float32))
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
    ids, values, written = [known.pair_ids], [known.logps], time.monotonic()
    for split, stop in (("train", plan.steps_per_epoch), ("eval", plan.eval_steps)):
        batches = read_batches(packed, plan, split, 0, stop, config.seed)
        for batch in tqdm(batches, desc=f"reference {split}", total=stop, disable=not first):
            if known.has(batch.pair_ids).all():
                continue
            logps = score(params, device_rows(batch))
            values.append(
                np.asarray(multihost_utils.process_allgather(logps, tiled=True)).reshape(-1, 2)
            )
            ids.append(batch.pair_ids.reshape(-1))
            if first and time.monotonic() - written > _SECONDS_BETWEEN_PARTS:
                _write(part, _joined(ids, values), parts, packed)
                written = time.monotonic()
    found = _joined(ids, values)
    if first:
        _write(path, found, parts, packed)
        part.unlink(missing_ok=True)
        if home := _home(packed):
            remote.publish_file(path, home)
    logging.info("reference log-probs of %d pairs: %s", len(found.pair_ids), path)
    return found


def _known(part: Path, parts: dict[str, Any], packed: PackedSet) -> ReferenceLogps | None:
    """What an earlier run got done; None where that was nothing, or of another reference."""
    try:
        return _read(part, parts, packed) if part.is_file() else None
    except ValueError as error:
        logging.warning("%s; beginning anew", error)
        return None


def _joined(ids: list[np.ndarray], values: list[np.ndarray]) -> ReferenceLogps:
    """A pair that is taken several times has one value; 0 stands for none."""
    pair_ids, logps = np.concatenate(ids), np.concatenate(values)
    pair_ids, firsts = np.unique(pair_ids, return_index=True)
    return ReferenceLogps(pair_ids[pair_ids != 0], logps[firsts[pair_ids != 0]])
