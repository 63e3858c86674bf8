"""PEFT adapters on disk: adapter_config.json and adapter_model.safetensors, written and read."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import reading
from zephyr_jax.hub import ID, check_name
from zephyr_jax.models.lora import abstract_adapters, adapter_axes
from zephyr_jax.storage import read_json
from zephyr_jax.types import Params
from zephyr_jax.weights import safetensors
from zephyr_jax.weights.exports import new_export, write_card, write_json, write_tokenizer
from zephyr_jax.weights.huggingface import TABLE
from zephyr_jax.weights.layouts import Layout, Rule, check_tensors
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_TENSOR = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)_proj\.lora_[AB]\.weight")
# Keys of adapter_config.json that may have any value; the others are off, or have one of these.
# PiSSA and other initializations take a part out of the base, so the adapter alone is wrong.
_ANY = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "auto_mapping"}
_ANY |= {"base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
_ANY |= {"megatron_core", "qalora_group_size", "eva_config"}
_ANY |= {"exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform"}
_OFF = (None, False, {}, [])
_RANK = -1  # stands for the rank in the shape of a tensor
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class PeftAdapter(NamedTuple):
    """The content of a PEFT folder."""

    lora: LoraConfig
    adapters: Params
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
    tok: Tokenizer | None = None,
    card: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes adapters as a folder that peft loads on top of its base; returns the folder's path.

    `cfg` is the base's architecture; `base_name` is its folder, or a hub id that may end in
    `@REVISION`; `base_digest`, its `params_digest`, is checked where the folder is read again.
    The rest is as of `export_hf`.
    """
    safetensors.check_dtype(dtype)
    layout = _layout(cfg, lora)
    tensors = layout.write(adapters, dtype)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return Path(folder)
    metadata = {"base_digest": base_digest} if base_digest else {}
    modules = ", ".join(f"{name}_proj" for name in lora.targets)
    about = f"A LoRA adapter of rank {lora.rank} and alpha {lora.alpha:g} on {modules}."
    usage = f"It fits that base alone, whose digest is `{base_digest}`." if base_digest else ""
    with new_export(folder, overwrite, needed=0) as temporary:  # adapters are small
        write_json(temporary, {ADAPTER_CONFIG: _config(lora, base_name)})
        if tok is not None:
            write_tokenizer(temporary, cfg, tok)
        hub_id = base_name.split("@")[0]
        fields = ({"base_model": hub_id} if ID.fullmatch(hub_id) else {}) | (card or {})
        front = {"tags": ["lora"], "library_name": "peft", "pipeline_tag": "text-generation"}
        write_card(temporary, fields, Path(folder).name, about, usage, **front)
        safetensors.write_file(temporary / ADAPTER_WEIGHTS, layout.shapes, dtype, tensors, metadata)
    return Path(folder)


def load_peft(folder: str | os.PathLike[str], cfg: MistralConfig) -> PeftAdapter:
    """The adapters in a PEFT folder, float32, created with their sharding on the ambient mesh.

    `cfg` is the base's. The matrices that it adapts are those that the file has tensors for.
    Modules of a lower rank than others are filled up with zeros, and what scales them otherwise is
    in their matrix B, so that their products are the same. A ValueError names what does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / ADAPTER_CONFIG)
    reader = safetensors.SafetensorsReader(folder / ADAPTER_WEIGHTS)
    targets = {match[1] for name in reader.shapes if (match := _TENSOR.fullmatch(name))}
    adapted = {_module(name) for name in reader.shapes}
    with reading(folder / ADAPTER_CONFIG):
        r, alpha = config["r"], float(config["lora_alpha"])
        ranks = {name: _pattern(config.get("rank_pattern"), name, r) for name in adapted}
        default = alpha / _divisor(config, r)
        factors = {}  # of every module's product, next to the default
        for name, rank in ranks.items():
            own = float(_pattern(config.get("alpha_pattern"), name, alpha))
            factors[name] = own / _divisor(config, rank) / default
        rank = max([r, *ranks.values()])
        dropout = float(config.get("lora_dropout", 0.0))
        lora = LoraConfig(rank, default * rank, dropout=dropout, targets=tuple(targets))
    layout = _layout(cfg, lora)
    expected = {
        name: tuple(ranks[_module(name)] if n == _RANK else n for n in shape)
        for name, shape in layout._replace(sizes=layout.sizes | {"R": _RANK}).shapes.items()
        if _module(name) in adapted
    }
    where = f"{folder}: its tensors, its {ADAPTER_CONFIG} and the base"
    check_tensors(expected, reader.shapes, where)
    reader.check_dtypes(reader.shapes)
    every = {_module(name) for name in layout.shapes}
    if every != adapted:
        logging.info("%s adapts %d of %d matrices", folder, len(adapted), len(every))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_adapters(cfg, lora))
    adapters = layout.read(_Padded(reader, layout.shapes, factors), "float32", shardings)
    return PeftAdapter(lora, adapters, reader.metadata.get("base_digest", ""))


def _module(tensor: str) -> str:
    """The module that a tensor of an adapter belongs to: `model.layers.0.self_attn.q_proj`."""
    return tensor.removeprefix("base_model.model.").rsplit(".", 2)[0]


def _divisor(config: dict[str, Any], rank: int) -> float:
    """What alpha is divided by: for stabilized adapters the root of the rank."""
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _pattern(values: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    found = (value for key, value in (values or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


class _Padded(NamedTuple):
    """Reads the tensors of a file as ones of a higher rank: of more rows of A, columns of B."""

    reader: safetensors.SafetensorsReader
    shapes: dict[str, tuple[int, ...]]
    factors: dict[str, float]  # module -> what its product is multiplied by

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A tensor in float32, or the part that a slice for each axis selects."""
        out = np.zeros(self.shapes[name], np.float32)
        if name in self.reader.shapes:
            stored = self.reader.read(name).astype(np.float32)
            factor = self.factors[_module(name)] if ".lora_B." in name else 1.0
            out[tuple(slice(n) for n in stored.shape)] = stored * np.float32(factor)
        return out[tuple(index)]


def usable_base(*names: str) -> str:
    """The first name by which peft finds a base: a folder's, made absolute, or a hub id."""
    for name in names:
        if Path(name, "config.json").is_file():
            return str(Path(name).resolve())
        with contextlib.suppress(FileNotFoundError):
            check_name(name, "")
            return name
    why = f"peft cannot load {names[0]}, the base of these adapters: it is no Hugging Face model"
    raise ValueError(f"{why}; export it, and name that folder, or a hub id, as --base")


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
    name, revision = base_name, None
    if "@" in base_name and not Path(base_name).exists():
        name, revision = base_name.split("@", 1)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    config |= {"base_model_name_or_path": name, "revision": revision, "inference_mode": True}
    config |= {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout}
    return config | {"target_modules": [f"{x}_proj" for x in lora.targets], "bias": "none"}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {path.parent} is not a PEFT adapter")
    config = {"peft_type": None, **read_json(path, "copy it again")}
    wrong = [
        f"{name}={value!r}"
        for name, value in config.items()
        if name not in _ANY and value not in _ONLY.get(name, _OFF)
    ]
    if wrong:
        advice = "merge the adapter with peft (merge_and_unload, save_pretrained)"
        raise ValueError(f"{path} says {', '.join(wrong)}; only plain LoRA is supported: {advice}")
    return config
