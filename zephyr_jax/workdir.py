"""A run's folder: which run it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from zephyr_jax.checkpoint import saved_steps
from zephyr_jax.config import RunConfig

# A resumed run may differ from its start in these fields: they do not change what is computed, or
# are places whose content the digests pin.
_FREE = {"mesh", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "remat"}
_FREE |= {"init", "data_dir", "tokenizer", "workers"}


def check_unclaimed(workdir: Path, config: RunConfig) -> None:
    """Raises a ValueError where an earlier run in `workdir` had another configuration."""
    path = workdir / "run_config.json"
    if not path.is_file():
        if saved_steps(workdir):
            raise ValueError(f"{workdir} is a ported model, not a run; name it as config.init")
        return
    before, now = _flat(json.loads(path.read_text())), _flat(config.to_dict())
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not set(name.split(".")) & _FREE
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(differing)}; take another --workdir"
        )


def claim(workdir: Path, config: RunConfig) -> None:
    """Writes the resolved configuration of a new run."""
    path = workdir / "run_config.json"
    if jax.process_index() or path.is_file():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=1))
    os.replace(temporary, path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        whole = f"{prefix}{name}"
        out |= _flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}
    return out
