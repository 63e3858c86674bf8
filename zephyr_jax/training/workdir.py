"""What a run's folder says: which run it is, whether all hosts are at the same, its model card."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from etils import epath

from zephyr_jax._version import __version__
from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.distributed import agree
from zephyr_jax.storage import files_below, is_remote, write_atomic
from zephyr_jax.training.metrics import read_metrics
from zephyr_jax.weights.checksums import saved_steps, workdir_and_steps

# A resumed run may differ from its start in these fields: they do not change what is computed, or
# are places whose content the digests pin.
_FREE = {"mesh", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "remat"}
_FREE |= {"micro_batches", "offload_optimizer", "init", "data_dir", "tokenizer", "workers"}
_FREE |= {"trackers", "profile"}
_SMALL = 1 << 20  # bytes of a file whose content counts in a digest, and not its size alone
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


def run_facts(config: RunConfig, packed: PackedSet, workdir: epath.Path) -> dict[str, Any]:
    """What must be the same on every host before the first step: code, configuration and data.

    Raises:
        ValueError: if a file of the packed set is missing or has another size.
    """
    check_sizes(packed)
    facts = {f"config.{name}": value for name, value in flat(config.to_dict()).items()}
    return facts | {
        "zephyr_jax": __version__,
        "its source code": folder_digest(Path(__file__).parents[1], "*.py"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        f"packed set {packed.folder.name}": packed.manifest,
        "initial model": folder_digest(config.init) if config.init else None,
        f"newest checkpoint in {workdir}": (saved_steps(workdir) or [None])[-1],
    }


def folder_digest(folder: str | os.PathLike[str], pattern: str = "*") -> str | None:
    """A digest of a local folder: names and sizes of its files, and contents of the small ones."""
    if is_remote(folder) or not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    for path in files_below(epath.Path(folder)):
        if path.match(pattern):
            size = path.stat().length
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            digest.update(path.read_bytes() if size < _SMALL else b"")
    return digest.hexdigest()[:16]


def check_sizes(packed: PackedSet) -> None:
    """Raises a ValueError if a copy of a packed set is not complete."""
    for name, info in packed.manifest["files"].items():
        path = packed.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != info["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{path} {problem}, its manifest says {info['bytes']}; copy the folder again from "
                "the host that packed it, as by rsync --archive"
            )


def model_card_fields(source: str | Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """The card (`weights.exports.CARD_FIELDS`) of the model that was loaded from `source`."""
    card: dict[str, Any] = {"lineage": lineage["lineage"]}
    base = re.search(r"^ported from ([^/@ ]+/[^/@ ]+)@[0-9a-f]{40}$", lineage["lineage"][0])
    if base:
        card["base_model"] = base[1]
    config = lineage.get("config")
    if not config:
        return card
    data = config["data"]
    digests = {f"{data['dataset']} {data['splits'][0]}": lineage["dataset_digest"]}
    digests["packed set"] = lineage["packed"]
    if "reference_digest" in lineage:
        digests["reference"] = lineage["reference_digest"]
    card |= {"recipe": config, "data": digests}
    workdir, _ = workdir_and_steps(epath.Path(source))
    here = {"split": "eval", "step": lineage["step"]}
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if here.items() <= row.items()]
    if rows:
        card["metrics"] = {k: v for k, v in rows[-1].items() if k not in ("split", "step")}
    return card
