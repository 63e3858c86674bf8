"""Adapters and their frozen base, merged where a model is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util

from zephyr_jax.config.run import LoraConfig
from zephyr_jax.models.lora import merge
from zephyr_jax.storage import absolute, is_remote
from zephyr_jax.types import Params
from zephyr_jax.weights.digest import params_digest


def find_base(source: str, root: epath.Path) -> str:
    """The path of a run's base: `source` as written, or relative to a folder above the run.

    A run starts where its `config.init` can be read; it may be loaded from elsewhere.
    """
    here = Path(source)
    if not (is_remote(source) or here.exists() or here.is_absolute()):
        for folder in absolute(root).parents:
            if (folder / source).exists():
                return str(folder / source)
    return source


def check_base(base: Params, digest: str, source: str, owner: str) -> None:
    """Raises a ValueError unless the adapters of `owner` were trained on these parameters.

    Args:
        base: float32, as loaded.
        digest: `params_digest` of the base at the time of the training.
        source: where `base` was loaded from.
        owner: the run or folder of the adapters.
    """
    actual = params_digest(base)
    if actual != digest:
        raise ValueError(
            f"{owner} has adapters for a base of digest {digest}, but {source} has {actual}; "
            "restore the model that they were trained on"
        )


def merge_into(params: Params, adapters: Params, lora: LoraConfig, dtype: str) -> Params:
    """The parameters with the adapters merged: summed in float32, returned in `dtype`.

    `params` is emptied on the way, so that no more than one parameter is there twice.
    """
    tree = dict(params)
    params.clear()
    for name in lora.targets:
        tree = merge(tree, adapters, dataclasses.replace(lora, targets=(name,)))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    del tree
    for path in list(flat):
        flat[path] = flat.pop(path).astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
