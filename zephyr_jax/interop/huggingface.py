"""Hugging Face folders in and out: one table of weights, from which both directions follow.

Our parameters are the nested dict of `zephyr_jax.models.mistral`, layers stacked on a leading
axis; Hugging Face has one matrix per layer, outputs first. RoPE is half-split in both, so nothing
is permuted. The files around the weights are written by `zephyr_jax.interop.huggingface_files`.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from zephyr_jax.config import MistralConfig
from zephyr_jax.data.tokenizer import Tokenizer
from zephyr_jax.interop.huggingface_files import new_export, write_files
from zephyr_jax.interop.safetensors_io import (
    DTYPES,
    MAX_SHARD_BYTES,
    SafetensorsReader,
    TensorSpec,
    write_safetensors,
)
from zephyr_jax.models.mistral import param_axes, param_shapes, param_shardings
from zephyr_jax.types import Params


class Rule(NamedTuple):
    """How one of their tensors and one layer of ours are the same numbers.

    `axes` reads "theirs -> ours" in the letters of zephyr_jax.types; letters in brackets are one
    axis there, the first varying slowest.
    """

    theirs: str  # `{}` stands for the layer
    ours: str
    axes: str


_LAYER = "model.layers.{}."
TABLE = (
    Rule("model.embed_tokens.weight", "embed", "V D -> V D"),
    Rule(_LAYER + "input_layernorm.weight", "layers/attention_norm", "D -> D"),
    Rule(_LAYER + "self_attn.q_proj.weight", "layers/attention/q", "(K G H) D -> D K G H"),
    Rule(_LAYER + "self_attn.k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
    Rule(_LAYER + "self_attn.v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
    Rule(_LAYER + "self_attn.o_proj.weight", "layers/attention/o", "D (K G H) -> K G H D"),
    Rule(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm", "D -> D"),
    Rule(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate", "F D -> D F"),
    Rule(_LAYER + "mlp.up_proj.weight", "layers/mlp/up", "F D -> D F"),
    Rule(_LAYER + "mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
    Rule("model.norm.weight", "final_norm", "D -> D"),
    Rule("lm_head.weight", "head", "V D -> D V"),
)
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_BUFFER = re.compile(r".*rotary_emb\.inv_freq")


def load_hf(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shardings: dict[str, Any] | None = None,
) -> tuple[MistralConfig, Params]:
    """The configuration and the parameters of a Mistral (or Llama) model in a local folder.

    Arrays are born with their sharding: each process reads the slices of its own devices, one
    tensor at a time. Widening bfloat16 or float16 to float32 is exact.

    Args:
        folder: config.json and safetensors, one file or shards with an index.
        dtype: of the parameters.
        shardings: the tree of the parameters with a `jax.sharding.Sharding` for each; None: what
            `param_shardings` says on the ambient mesh.

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if the model has another architecture, or naming every tensor that is missing,
            that has no place, or that has another shape.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    chosen = shardings or param_shardings(cfg)
    tree: dict[str, Any] = dict(traverse_util.flatten_dict(chosen, sep="/"))
    shapes = param_shapes(cfg)
    params = {}
    with SafetensorsReader(folder) as reader:
        _check_tensors(cfg, reader, folder)
        for rule in _rules(cfg):
            read = functools.partial(_read_slice, reader, rule, axis_sizes(cfg), dtype)
            params[rule.ours] = jax.make_array_from_callback(
                shapes[rule.ours], tree[rule.ours], read
            )
    return cfg, traverse_util.unflatten_dict(params, sep="/")


def export_hf(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: dict[str, Any] | None = None,
) -> Path:
    """Writes a complete Hugging Face folder that transformers 4 and 5 load; its path.

    One tensor at a time is in host memory. On several processes all must call it; the first
    writes. The folder appears when it is complete, in place of an earlier export if there is one.

    Args:
        cfg: the architecture.
        params: the tree of `init_params`, of jax or NumPy arrays.
        tok: the tokenizer that the model was trained with.
        folder: the destination.
        dtype: of the weights in the files: float32, bfloat16 or float16.
        max_shard_bytes: of weights in one file.
        card: what the model card tells, see `huggingface_files.CARD_FIELDS`.

    Raises:
        FileExistsError: if something that is not an export stands at `folder`.
        ValueError: if parameters, tokenizer or card do not fit, or float16 cannot hold a weight.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    tensors = hf_tensors(cfg, params, dtype)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return Path(folder)
    with new_export(folder) as temporary:
        write_files(temporary, cfg, tok, dtype, card or {}, Path(folder).name)
        write_safetensors(
            temporary,
            hf_specs(cfg, dtype),
            tensors,
            max_shard_bytes=max_shard_bytes,
            metadata={"writer": "zephyr_jax"},
        )
    return Path(folder)


def read_config(folder: str | os.PathLike[str]) -> MistralConfig:
    """The configuration in `folder/config.json`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON, incomplete, quantised, or of another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a Hugging Face model")
    try:
        config = json.loads(path.read_bytes())
        if config.get("quantization_config"):
            raise ValueError("the model is quantised; use the unquantised one")
        return MistralConfig.from_hf(config)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; copy it again") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def axis_sizes(cfg: MistralConfig) -> dict[str, int]:
    """The size of every axis letter of the parameters."""
    shapes = param_shapes(cfg)
    letters = ((path, axes.split()) for path, axes in param_axes(cfg).items())
    return {a: n for path, axes in letters for a, n in zip(axes, shapes[path], strict=True)}


def hf_specs(cfg: MistralConfig, dtype: str) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor of a Hugging Face checkpoint, in writing order."""
    sizes = axis_sizes(cfg)

    def shape(rule: Rule) -> tuple[int, ...]:
        groups, _ = _parse(rule.axes)
        return tuple(math.prod(sizes[a] for a in group) for group in groups)

    return {name: TensorSpec(dtype, shape(rule)) for name, rule, _ in _tensors(cfg)}


def hf_tensors(
    cfg: MistralConfig, params: Params, dtype: str
) -> Iterator[tuple[str, Float[np.ndarray, "*shape"]]]:
    """Yields every tensor in Hugging Face's name and layout, in the order of `hf_specs`.

    One layer of one stacked array at a time comes to the host, gathered from all processes.

    Raises:
        ValueError: at the call, if the tree is not that of `cfg`; at a tensor that overflows
            float16.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    wanted, found = param_shapes(cfg), {path: tuple(x.shape) for path, x in flat.items()}
    if wanted != found:
        wrong = [
            f"{path} is {found.get(path, 'missing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(wanted.keys() | found.keys())
            if wanted.get(path) != found.get(path)
        ]
        raise ValueError(f"parameters do not fit the configuration: {'; '.join(wrong)}")
    return _hf_tensors(cfg, flat, jnp.dtype(dtype))


def _hf_tensors(cfg: MistralConfig, flat: dict[str, Any], dtype: np.dtype) -> Iterator[Any]:
    for name, rule, layer in _tensors(cfg):
        groups, ours = _parse(rule.axes)
        whole = _on_host(flat[rule.ours], layer)
        order = [ours.index(a) for group in groups for a in group]
        shape = [math.prod(whole.shape[ours.index(a)] for a in group) for group in groups]
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(whole.transpose(order), dtype).reshape(shape)
        if dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"{name} has weights above 65504, float16's largest; use bfloat16")
        yield name, array


def _on_host(array: Any, layer: int | None) -> np.ndarray:
    """The array, or one layer of a stacked one, gathered from wherever its parts are."""
    if isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    if layer is not None:  # the index is an operand: one program for all layers
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    if not array.is_fully_addressable:
        whole = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.device_put(array, whole).addressable_data(0)
    return np.asarray(array)


def _rules(cfg: MistralConfig) -> list[Rule]:
    return [rule for rule in TABLE if rule.ours in param_axes(cfg)]


def _tensors(cfg: MistralConfig) -> Iterator[tuple[str, Rule, int | None]]:
    """Every tensor's name, rule and layer: embedding, layer by layer, last norm, head."""
    rules = _rules(cfg)
    stacked = [rule for rule in rules if "{}" in rule.theirs]
    before = rules[: rules.index(stacked[0])]
    for rule in before:
        yield rule.theirs, rule, None
    for layer in range(cfg.num_hidden_layers):
        for rule in stacked:
            yield rule.theirs.format(layer), rule, layer
    for rule in rules[len(before) + len(stacked) :]:
        yield rule.theirs, rule, None


@functools.cache
def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """`"(K H) D -> D K H"` as `((("K", "H"), ("D",)), ("D", "K", "H"))`."""
    theirs, ours = axes.split("->")
    groups = (tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w", theirs))
    return tuple(groups), tuple(ours.split())


def _read_slice(
    reader: SafetensorsReader,
    rule: Rule,
    sizes: dict[str, int],
    dtype: str,
    index: Any,
) -> np.ndarray:
    """The part of one of our arrays that `index` selects, layer by layer from disk."""
    if "{}" not in rule.theirs:
        return _read_layer(reader, rule.theirs, rule.axes, sizes, index).astype(jnp.dtype(dtype))
    layers = range(*index[0].indices(sizes["L"]))
    out = None
    for i, layer in enumerate(layers):
        part = _read_layer(reader, rule.theirs.format(layer), rule.axes, sizes, index[1:])
        if out is None:
            out = np.empty((len(layers), *part.shape), jnp.dtype(dtype))
        out[i] = part
    assert out is not None, "a device without layers"
    return out


def _read_layer(
    reader: SafetensorsReader,
    name: str,
    axes: str,
    sizes: dict[str, int],
    index: tuple[slice, ...],
) -> np.ndarray:
    groups, ours = _parse(axes)
    bounds = {a: part.indices(sizes[a])[:2] for a, part in zip(ours, index, strict=True)}
    rows, split, cut = [], [], []
    for first, *rest in groups:
        # A range of a group's first letter is one range of rows; the other letters are cut later.
        (start, stop), inner = bounds[first], math.prod(sizes[a] for a in rest)
        rows.append(slice(start * inner, stop * inner))
        split += [stop - start, *(sizes[a] for a in rest)]
        cut += [slice(None), *(slice(*bounds[a]) for a in rest)]
    array = reader.read(name, rows).reshape(split)[tuple(cut)]
    order = [a for group in groups for a in group]
    return array.transpose([order.index(a) for a in ours])


def _check_tensors(cfg: MistralConfig, reader: SafetensorsReader, folder: Path) -> None:
    wanted = {name: spec.shape for name, spec in hf_specs(cfg, "float32").items()}
    found = {name: reader.spec(name).shape for name in reader.names if not _BUFFER.fullmatch(name)}
    if cfg.tie_word_embeddings and found.get(_HEAD) == wanted[_EMBED] == found.get(_EMBED):
        if not np.array_equal(reader.read(_HEAD), reader.read(_EMBED)):
            raise ValueError(
                f"{folder}: config.json says tie_word_embeddings, but {_HEAD} differs from "
                f"{_EMBED}; set tie_word_embeddings to false to keep both"
            )
        del found[_HEAD]
    said = [f"missing: {_listed(wanted.keys() - found.keys())}"] * bool(
        wanted.keys() - found.keys()
    )
    said += [f"extra: {_listed(found.keys() - wanted.keys())}"] * bool(found.keys() - wanted.keys())
    shapes = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    said += [f"shapes: {', '.join(shapes)}"] * bool(shapes)
    if said:
        raise ValueError(f"{folder}: tensors and config.json do not fit; {'; '.join(said)}")


def _listed(names: set[str]) -> str:
    """The names in order, those that differ in the layer alone as one: `layers.{0,1}.x`."""
    grouped = collections.defaultdict(list)
    for name in names:
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
        grouped[pattern].append("" if layer is None else int(layer.group()))
    return ", ".join(
        pattern.replace(
            "{}",
            str(layers[0]) if len(layers) == 1 else f"{{{','.join(map(str, sorted(layers)))}}}",
        )
        for pattern, layers in sorted(grouped.items())
    )
