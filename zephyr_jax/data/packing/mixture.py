"""Which prepared sets a run takes its documents from, and how often each record of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
from etils import epath

from zephyr_jax.config.run import DataConfig
from zephyr_jax.data.prepare import prepare


@dataclasses.dataclass(frozen=True)
class Member:
    """A set of a mixture: its name, how many times its training records are taken, its folder."""

    name: str
    weight: float
    folder: epath.Path
    digest: str  # of its records


def members(config: DataConfig) -> list[Member]:
    """The sets of a run in their configured order; a FileNotFoundError if one is not prepared."""
    folders = {name: set_folder(config.data_dir, name) for name in config.dataset_weights}
    return [
        Member(name, float(config.dataset_weights[name]), folder, prepare.dataset_digest(folder))
        for name, folder in folders.items()
    ]


def identity(sets: list[Member], seed: int) -> dict[str, object]:
    """What identifies the records and how often they are taken: `dataset`, a digest of all.

    One set taken once is its own digest. The seed counts where a fraction is drawn by it.
    """
    if len(sets) == 1 and sets[0].weight == 1:
        return {"dataset": sets[0].digest}
    mixed = [[member.name, member.weight, member.digest] for member in sets]
    out: dict[str, object] = {"mixture": mixed}
    if any(member.weight % 1 for member in sets):
        out["mixture_seed"] = seed
    return {"dataset": hashlib.sha256(json.dumps(out).encode()).hexdigest()} | out


def times_taken(n_records: int, member: Member, seed: int) -> np.ndarray:
    """How often each of a set's training records is taken, `N` int64.

    The fraction of a weight is drawn by the seed and the set's name: weight 1.5 of 4 records takes
    two of them twice and two once.
    """
    times = np.full(n_records, int(member.weight), np.int64)
    name = int.from_bytes(hashlib.sha256(member.name.encode()).digest()[:8], "big")
    drawn = np.random.default_rng([seed, name]).permutation(n_records)
    times[drawn[: round(member.weight % 1 * n_records)]] += 1
    return times


def set_folder(data_dir: str, name: str) -> epath.Path:
    """The folder of the newest version of a prepared set; a FileNotFoundError without any."""
    base = epath.Path(data_dir) / name
    versions = sorted(path.parent for path in base.glob("*/dataset_info.json"))
    if not versions:
        dataset, _, variant = name.partition("/")
        raise FileNotFoundError(
            f"no prepared set in {base}; make it with: python scripts/prepare_data.py {dataset} "
            f"--source=FOLDER --data_dir={data_dir} --config_name={variant or 'raw'}"
        )
    return versions[-1]
