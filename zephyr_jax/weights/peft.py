"""PEFT adapters on disk: adapter_config.json and adapter_model.safetensors, written and read.

Which of our axes are which of theirs follows from the table of `zephyr_jax.weights.huggingface`:
lora_A takes the inputs of the matrix beside which it stands, lora_B gives its outputs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from zephyr_jax.config.run import PROJECTIONS, LoraConfig, MistralConfig
from zephyr_jax.models.lora import abstract_adapters, adapter_axes, adapter_shapes
from zephyr_jax.types import Params
from zephyr_jax.weights.host_arrays import from_parts
from zephyr_jax.weights.huggingface import (
    TABLE,
    Rule,
    axis_sizes,
    one_tensor,
    read_slice,
    tensor_shape,
)
from zephyr_jax.weights.huggingface_files import new_export
from zephyr_jax.weights.safetensors import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPES,
    SINGLE,
    SafetensorsReader,
    TensorSpec,
    write_atomically,
    write_safetensors,
)
from zephyr_jax.weights.tensor_check import check_tensors

_MODULES = {name: f"{name}_proj" for name in PROJECTIONS}
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)_proj\.lora_[AB]\.weight")
# What else adapter_config.json may say without changing what a plain adapter computes. PiSSA and
# other ways to begin take a part out of the base, so that the adapter does not fit what is there.
_FREE = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
_FREE |= {"peft_version", "megatron_core", "qalora_group_size", "eva_config"}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
_ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class PeftAdapter(NamedTuple):
    """What a PEFT folder holds."""

    lora: LoraConfig
    adapters: Params
    base_name: str  # as its writer called the base; may be a path on another machine
    base_digest: str  # `params_digest` of the base; "" where its writer noted none


def export_peft(
    folder: str | os.PathLike[str],
    cfg: MistralConfig,
    lora: LoraConfig,
    adapters: Params,
    base_name: str,
    *,
    base_digest: str = "",
    dtype: str = "float32",
    lineage: tuple[str, ...] = (),
) -> Path:
    """Writes adapters as a folder that peft loads beside its base; the folder's path.

    On several processes all must call it; the first writes. The folder appears when it is whole.

    Args:
        folder: the destination.
        cfg: the architecture of the base.
        lora: what the adapters are.
        adapters: as of `init_adapters`.
        base_name: hub id, which may end in `@REVISION`, or folder of the base.
        base_digest: `params_digest` of the base, for the check where the folder is read again.
        dtype: of the matrices in the file: float32, bfloat16 or float16.
        lineage: lines for the model card, oldest first.

    Raises:
        FileExistsError: if something that is not an export stands at `folder`.
        ValueError: if the tree is not that of `lora`, or float16 cannot hold a number.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(adapters, sep="/"))
    found = {path: tuple(x.shape) for path, x in flat.items()}
    check_tensors(adapter_shapes(cfg, lora), found, "adapters and their configuration")
    tensors = _tensors(cfg, lora, flat, dtype)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return Path(folder)
    specs = {name: TensorSpec(dtype, shape) for name, shape in _shapes(cfg, lora).items()}
    meta = {"writer": "zephyr_jax"} | ({"base_digest": base_digest} if base_digest else {})
    with new_export(folder) as temporary:
        config = json.dumps(_config(lora, base_name), indent=2) + "\n"
        write_atomically(temporary / ADAPTER_CONFIG, config.encode())
        card = _card(lora, base_name, base_digest, lineage, Path(folder).name)
        write_atomically(temporary / "README.md", card.encode())
        write_safetensors(temporary, specs, tensors, max_shard_bytes=sys.maxsize, metadata=meta)
        os.rename(temporary / SINGLE, temporary / ADAPTER_WEIGHTS)
    return Path(folder)


def load_peft(folder: str | os.PathLike[str], cfg: MistralConfig) -> PeftAdapter:
    """The adapters in a PEFT folder, float32, born with their sharding on the ambient mesh.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        cfg: the architecture of the base.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if the adapter is of a kind that is not supported, or naming every tensor that
            is missing, that has no place, or that has another shape.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {ADAPTER_WEIGHTS}; save the adapter as safetensors "
            "(peft: model.save_pretrained(FOLDER))"
        )
    with SafetensorsReader(path) as reader, safetensors.safe_open(path, framework="np") as file:
        lora = _lora_of(config, reader.names, folder)
        found = {name: reader.shape(name) for name in reader.names}
        where = f"{folder}: its tensors, its {ADAPTER_CONFIG} and the base"
        check_tensors(_shapes(cfg, lora), found, where)
        for name in found:
            reader.spec(name)  # raises for a dtype that cannot be read
        sizes, rules, adapters = _sizes(cfg, lora), _rules(lora), {}
        wanted: dict[str, Any] = dict(
            traverse_util.flatten_dict(abstract_adapters(cfg, lora), sep="/")
        )
        for ours, leaf in wanted.items():
            read = functools.partial(read_slice, reader, rules[ours], sizes, "float32")
            adapters[ours] = from_parts(leaf.shape, leaf.sharding, read)
        digest = (file.metadata() or {}).get("base_digest", "")
    name = str(config.get("base_model_name_or_path") or "")
    return PeftAdapter(lora, traverse_util.unflatten_dict(adapters, sep="/"), name, digest)


def _rules(lora: LoraConfig) -> dict[str, Rule]:
    """Our path -> how it and one of their tensors are the same numbers."""
    rules, out = {rule.ours: rule for rule in TABLE}, {}
    for path, axes in adapter_axes(lora).items():
        beside, part = path.rsplit("/", 1)
        rule = rules[beside]
        outputs, inputs = re.findall(r"\([^)]*\)|\w", rule.axes.split("->")[0])
        theirs = f"R {inputs}" if part == "a" else f"{outputs} R"
        module = rule.theirs.removesuffix(".weight")
        name = f"base_model.model.{module}.lora_{part.upper()}.weight"
        out[path] = Rule(name, path, f"{theirs} -> {axes.removeprefix('L ')}")
    return out


def _sizes(cfg: MistralConfig, lora: LoraConfig) -> dict[str, int]:
    return axis_sizes(cfg) | {"R": lora.rank}


def _shapes(cfg: MistralConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, layer by layer."""
    sizes, rules = _sizes(cfg, lora), _rules(lora).values()
    layers = range(cfg.num_hidden_layers)
    return {rule.theirs.format(i): tensor_shape(rule, sizes) for i in layers for rule in rules}


def _tensors(
    cfg: MistralConfig, lora: LoraConfig, flat: dict[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name, in the order of `_shapes`."""
    sizes, kind = _sizes(cfg, lora), jnp.dtype(dtype)
    for layer in range(cfg.num_hidden_layers):
        for path, rule in _rules(lora).items():
            name = rule.theirs.format(layer)
            yield name, one_tensor(name, flat[path], layer, rule, sizes, kind)


def _config(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    name, revision = base_name, None
    if "@" in base_name and not Path(base_name).exists():
        name, revision = base_name.split("@", 1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [_MODULES[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _card(
    lora: LoraConfig, base_name: str, digest: str, lineage: tuple[str, ...], title: str
) -> str:
    front = [f"base_model: {json.dumps(base_name, ensure_ascii=False)}", "library_name: peft"]
    lines = ["---", *front, 'tags: ["zephyr_jax", "lora"]', "---", "", f"# {title}", ""]
    lines += [
        f"A LoRA adapter of rank {lora.rank} and alpha {lora.alpha:g} for {base_name}, beside "
        f"{', '.join(_MODULES[name] for name in lora.targets)}.",
        "Trained and exported by zephyr_jax. It fits that base alone.",
    ]
    lines += ["", f"Digest of the base: `{digest}`"] * bool(digest)
    if lineage:
        lines += ["", "## Lineage", "", *(f"{i}. {line}" for i, line in enumerate(lineage, 1))]
    return "\n".join(lines) + "\n"


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a PEFT adapter")
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of an adapter ({error}); copy it again") from error
    wrong = [f"peft_type={config.get('peft_type')!r}"] * (config.get("peft_type") != "LORA")
    for name, value in config.items():
        fits = name in _FREE | _READ or value in _ONLY.get(name, (None, False, {}, []))
        wrong += [] if fits else [f"{name}={value!r}"]
    if wrong:
        raise ValueError(
            f"{path} says {', '.join(wrong)}; only plain LoRA is supported: merge the adapter with "
            "peft (merge_and_unload, save_pretrained) and import the model"
        )
    return config


def _lora_of(config: dict[str, Any], names: list[str], folder: Path) -> LoraConfig:
    """The adapter that adapter_config.json describes; a pattern of modules is what it matched."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        modules = set(targets)
    else:
        modules = {f"{found[1]}_proj" for name in names if (found := _TENSOR.fullmatch(name))}
    strange = sorted(map(str, modules - set(_MODULES.values())))
    if strange or not modules:
        raise ValueError(
            f"{folder} adapts {', '.join(strange) or 'nothing that is known'}; only adapters of "
            f"{', '.join(_MODULES.values())} are supported"
        )
    try:
        rank, alpha = config["r"], float(config["lora_alpha"])
        if type(rank) is not int:
            raise TypeError(f"r={rank!r} is no whole number")
        lora = LoraConfig(
            rank=rank,
            alpha=alpha,
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=tuple(name for name in PROJECTIONS if _MODULES[name] in modules),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    if config.get("use_rslora"):  # divides alpha by the root of the rank
        return dataclasses.replace(lora, alpha=alpha * math.sqrt(rank))
    return lora
