"""PEFT adapters on disk: adapter_config.json and adapter_model.safetensors, written and read."""

from __future__ import annotations

import collections
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.models.lora import abstract_adapters, adapter_axes
from zephyr_jax.storage import write_atomic
from zephyr_jax.types import Params
from zephyr_jax.weights.exports import new_export, numbered
from zephyr_jax.weights.huggingface import TABLE
from zephyr_jax.weights.layouts import Layout, Rule, check_tensors
from zephyr_jax.weights.safetensors import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SafetensorsReader,
    check_dtype,
    write_file,
)

_TENSOR = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)_proj\.lora_[AB]\.weight")
# Keys of adapter_config.json that may have any value; the others are off, or have one of these.
# PiSSA and other initializations take a part out of the base, so the adapter alone is wrong.
_ANY = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "auto_mapping"}
_ANY |= {"base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
_ANY |= {"megatron_core", "qalora_group_size", "eva_config"}
_OFF = (None, False, {}, [])
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class PeftAdapter(NamedTuple):
    """The content of a PEFT folder."""

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
    """Writes adapters as a folder that peft loads on top of its base; returns the folder's path.

    `cfg` is the base's architecture; `base_name` is its folder, or a hub id that may end in
    `@REVISION`; `base_digest`, its `params_digest`, is checked where the folder is read again.
    `lineage` are lines for the model card, oldest first. Memory, processes, dtypes and errors are
    as of `export_hf`.
    """
    check_dtype(dtype)
    layout = _layout(cfg, lora)
    tensors = layout.write(adapters, dtype)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return Path(folder)
    metadata = {"base_digest": base_digest} if base_digest else {}
    with new_export(folder) as temporary:
        config = json.dumps(_config(lora, base_name), indent=2) + "\n"
        write_atomic(temporary / ADAPTER_CONFIG, config)
        card = _card(lora, base_name, base_digest, lineage, Path(folder).name)
        write_atomic(temporary / "README.md", card)
        write_file(temporary / ADAPTER_WEIGHTS, layout.shapes, dtype, tensors, metadata)
    return Path(folder)


def load_peft(folder: str | os.PathLike[str], cfg: MistralConfig) -> PeftAdapter:
    """The adapters in a PEFT folder, float32, created with their sharding on the ambient mesh.

    `cfg` is the base's. The projections that it adapts are those that the file has tensors for. A
    ValueError says that it is another kind of adapter, or names every tensor that does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {ADAPTER_WEIGHTS}; save the adapter as safetensors "
            "(peft: model.save_pretrained(FOLDER))"
        )
    reader = SafetensorsReader(path)
    modules = {match[1] for name in reader.shapes if (match := _TENSOR.fullmatch(name))}
    try:
        rank, alpha = config["r"], float(config["lora_alpha"])
        lora = LoraConfig(
            rank=rank,
            # Stabilized adapters divide alpha by the root of the rank.
            alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=tuple(modules),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    layout = _layout(cfg, lora)
    where = f"{folder}: its tensors, its {ADAPTER_CONFIG} and the base"
    check_tensors(layout.shapes, reader.shapes, where)
    reader.check_dtypes(reader.shapes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_adapters(cfg, lora))
    adapters = layout.read(reader, "float32", shardings)
    digest = reader.metadata.get("base_digest", "")
    return PeftAdapter(lora, adapters, str(config.get("base_model_name_or_path") or ""), digest)


def _layout(cfg: MistralConfig, lora: LoraConfig) -> Layout:
    """The layout of adapters: A takes the inputs of the matrix that it adapts, B its outputs."""
    table, rules = {rule.ours: rule for rule in TABLE}, []
    for path, axes in adapter_axes(lora).items():
        matrix, part = path.rsplit("/", 1)
        outputs, inputs = re.findall(r"\([^)]*\)|\w", table[matrix].axes.split("->")[0])
        theirs = f"R {inputs}" if part == "a" else f"{outputs} R"
        module = table[matrix].theirs.removesuffix(".weight")
        name = f"base_model.model.{module}.lora_{part.upper()}.weight"
        rules.append(Rule(name, path, f"{theirs} -> {axes.removeprefix('L ')}"))
    return Layout(rules, Layout.of(cfg, TABLE).sizes | {"R": lora.rank})


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
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _card(
    lora: LoraConfig, base_name: str, digest: str, lineage: tuple[str, ...], title: str
) -> str:
    modules = ", ".join(f"{name}_proj" for name in lora.targets)
    text = f"""---
base_model: {json.dumps(base_name, ensure_ascii=False)}
library_name: peft
tags: ["zephyr_jax", "lora"]
---

# {title}

A LoRA adapter of rank {lora.rank} and alpha {lora.alpha:g} for {base_name}, on {modules}.
Trained and exported by zephyr_jax. It fits that base alone.
"""
    if digest:
        text += f"\nDigest of the base: `{digest}`\n"
    if lineage:
        text += f"\n## Lineage\n\n{numbered(lineage)}\n"
    return text


def _read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json of plain LoRA."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {path.parent} is not a PEFT adapter")
    try:
        config = {"peft_type": None, **json.loads(path.read_bytes())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of an adapter ({error}); copy it again") from error
    wrong = [
        f"{name}={value!r}"
        for name, value in config.items()
        if name not in _ANY and value not in _ONLY.get(name, _OFF)
    ]
    if wrong:
        raise ValueError(
            f"{path} says {', '.join(wrong)}; only plain LoRA is supported: merge the adapter with "
            "peft (merge_and_unload, save_pretrained) and import the model"
        )
    return config
