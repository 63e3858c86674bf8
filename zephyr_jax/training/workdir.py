"""A run's folder: which run it belongs to."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
from etils import epath

from zephyr_jax.agreement import agree
from zephyr_jax.config.run import RunConfig
from zephyr_jax.storage import write_atomic
from zephyr_jax.weights.checkpoint import saved_steps

# A resumed run may differ from its start in these fields: they do not change what is computed, or
# are places whose content the digests pin.
_FREE = {"mesh", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "remat"}
_FREE |= {"micro_batches", "offload_optimizer", "init", "data_dir", "tokenizer", "workers"}
_FREE |= {"trackers", "profile"}
_SEEN = 60.0  # seconds until what one host writes is seen by all, over NFS


def check_unclaimed(workdir: epath.Path, config: RunConfig) -> None:
    """Raises a ValueError where an earlier run in `workdir` had another configuration."""
    path = workdir / "run_config.json"
    if not path.is_file():
        if saved_steps(workdir):
            raise ValueError(f"{workdir} is a ported model, not a run; name it as config.init")
        return
    # Read as a config, so that words it had not yet have their defaults.
    before = flat(RunConfig.from_config_dict(json.loads(path.read_text())).to_dict())
    now = flat(config.to_dict())
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not set(name.split(".")) & _FREE
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(differing)}; take another --workdir"
        )


def claim(workdir: epath.Path, config: RunConfig) -> None:
    """Writes the resolved configuration of a new run, which every process must then see.

    Raises:
        ValueError: on every process, if some look into another folder of the same name.
    """
    path = workdir / "run_config.json"
    if not jax.process_index() and not path.is_file():
        write_atomic(path, json.dumps(config.to_dict(), indent=1))
    end = time.monotonic() + _SEEN
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.2)
    seen = f"{workdir}, which must lie on a disk that all hosts see, or in a bucket,"
    agree({seen: "there" if path.is_file() else "not the one of process 0"})


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict with its names joined by dots."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        whole = f"{prefix}{name}"
        out |= flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}
    return out
