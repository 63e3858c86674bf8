"""The run's folder: which run it belongs to, and whether all hosts agree."""

from __future__ import annotations

import json
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict

from zephyr_jax.chips import record_start
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.distributed import agree, folder_digest
from zephyr_jax.storage import read_checked, write_checked
from zephyr_jax.weights.checkpoint import saved_steps

# A resumed run may differ from its start in these fields: they do not change what is computed, or
# are places whose content the digests pin.
_FREE = {"mesh", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "remat"}
_FREE |= {"micro_batches", "offload_optimizer", "init", "data_dir", "tokenizer", "trackers"}
_FREE |= {"profile", "keep_best", "skip"}
_SEEN = 60.0  # seconds until what one host writes is seen by all, over NFS


def check_unclaimed(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Raises a ValueError where an earlier run in `workdir` had another configuration."""
    path, remedy = workdir / "run_config.json", "restore it, or take another --workdir"
    if not path.is_file():
        if saved_steps(workdir) or (workdir / "config.json").is_file():
            raise ValueError(f"{path} is missing: {remedy}; a ported model is named as config.init")
        return
    before = flatten_dict(read_checked(path, remedy), sep=".")
    now = flatten_dict(json.loads(json.dumps(config)), sep=".")
    if changed := changes(before, now, _FREE):
        raise ValueError(f"{workdir} holds another run: {changed}; take another --workdir")


def changes(before: dict[str, Any], now: dict[str, Any], ignored: Set[str] = frozenset()) -> str:
    """What each name was and is, where that differs; "" if it does nowhere."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not set(name.split(".")) & ignored
    )


def claim(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Writes the configuration of a new run; a ValueError if hosts look into other folders."""
    path = workdir / "run_config.json"
    if not jax.process_index():
        record_start(workdir / "run_info.json")
        if not path.is_file():
            write_checked(path, config)
    end = time.monotonic() + _SEEN
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.2)
    seen = f"{workdir}, which must lie on a disk that all hosts see, or in a bucket,"
    agree({seen: "there" if path.is_file() else "not the one of process 0"})


def run_facts(config: dict[str, Any], packed: PackedSet, workdir: epath.Path) -> dict[str, Any]:
    """What must be the same on every host before the first step: code, configuration and data."""
    other = (config["dpo"] or {}).get("reference_model")
    return {
        **{f"config.{name}": value for name, value in flatten_dict(config, sep=".").items()},
        "its source code": folder_digest(Path(__file__).parents[1], "*.py"),
        "jax": jax.__version__,
        f"packed set {packed.folder.name}": packed.manifest,
        "initial model": folder_digest(config["init"]) if config["init"] else None,
        "reference model": folder_digest(other) if other else None,
        f"newest checkpoint in {workdir}": (saved_steps(workdir) or [None])[-1],
    }
