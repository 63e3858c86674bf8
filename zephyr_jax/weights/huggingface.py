"""Hugging Face folders in and out: one table of weights, from which both directions follow.

Our parameters are the nested dict of `zephyr_jax.models.mistral`, layers stacked on a leading
axis; Hugging Face has one matrix per layer, outputs first. RoPE is half-split in both, so nothing
is permuted. The files around the weights are written by `zephyr_jax.weights.huggingface_files`.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from zephyr_jax.config.run import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.parameters import param_axes, param_shapes, param_shardings
from zephyr_jax.types import Params
from zephyr_jax.weights.host_arrays import aligned_empty, from_parts, to_host
from zephyr_jax.weights.huggingface_files import new_export, write_files
from zephyr_jax.weights.safetensors import (
    DTYPES,
    MAX_SHARD_BYTES,
    SafetensorsReader,
    TensorSpec,
    write_safetensors,
)
from zephyr_jax.weights.tensor_check import check_tensors


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
    dtype: str | None = "float32",
    shardings: dict[str, Any] | None = None,
) -> tuple[MistralConfig, Params]:
    """The configuration and the parameters of a Mistral (or Llama) model in a local folder.

    Arrays are born with their sharding: each process reads the slices of its own devices, one
    tensor at a time, and holds no more beside them than the part of one array that one device gets
    (on CPU not even that: the array lies where it was read). Widening to float32 is exact.

    Args:
        folder: config.json and safetensors, one file or shards with an index.
        dtype: of the parameters; None: that of config.json.
        shardings: the tree of the parameters with a `jax.sharding.Sharding` for each; None: what
            `param_shardings` says on the ambient mesh.

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if the model has another architecture, or float16 cannot hold a weight, or
            naming every tensor that is missing, that has no place, or that has another shape.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    with SafetensorsReader(folder) as reader:
        _check_tensors(cfg, reader, folder)
        return cfg, read_params(cfg, reader, dtype or cfg.dtype, shardings)


def read_params(
    cfg: MistralConfig,
    reader: Any,
    dtype: str,
    shardings: dict[str, Any] | None,
    table: Sequence[Rule] = TABLE,
) -> Params:
    """The parameters that `reader` holds, as `load_hf`; `reader.read` gives slices of tensors."""
    chosen = shardings or param_shardings(cfg)
    tree: dict[str, Any] = dict(traverse_util.flatten_dict(chosen, sep="/"))
    shapes = param_shapes(cfg)
    params = {}
    for rule in _rules(cfg, table):
        read = functools.partial(read_slice, reader, rule, axis_sizes(cfg), dtype)
        params[rule.ours] = from_parts(shapes[rule.ours], tree[rule.ours], read)
    return traverse_util.unflatten_dict(params, sep="/")


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
        ValueError: if it is no JSON, incomplete, quantized, or of another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a Hugging Face model")
    try:
        config = json.loads(path.read_bytes())
        if config.get("quantization_config"):
            raise ValueError("the model is quantized; use the unquantized one")
        return MistralConfig.from_hf(config)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; copy it again") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def axis_sizes(cfg: MistralConfig) -> dict[str, int]:
    """The size of every axis letter of the parameters."""
    shapes = param_shapes(cfg)
    letters = ((path, axes.split()) for path, axes in param_axes(cfg).items())
    return {a: n for path, axes in letters for a, n in zip(axes, shapes[path], strict=True)}


def hf_specs(
    cfg: MistralConfig, dtype: str, table: Sequence[Rule] = TABLE
) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor of a Hugging Face checkpoint, in writing order."""
    sizes = axis_sizes(cfg)
    shapes = ((name, tensor_shape(rule, sizes)) for name, rule, _ in _tensors(cfg, table))
    return {name: TensorSpec(dtype, shape) for name, shape in shapes}


def tensor_shape(rule: Rule, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of one of their tensors, where the axis letters have these sizes."""
    groups, _ = _parse(rule.axes)
    return tuple(math.prod(sizes[a] for a in group) for group in groups)


def hf_tensors(
    cfg: MistralConfig, params: Params, dtype: str, table: Sequence[Rule] = TABLE
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
    return _hf_tensors(cfg, flat, jnp.dtype(dtype), table)


def _hf_tensors(
    cfg: MistralConfig, flat: dict[str, Any], dtype: np.dtype, table: Sequence[Rule]
) -> Iterator[Any]:
    sizes = axis_sizes(cfg)
    for name, rule, layer in _tensors(cfg, table):
        yield name, one_tensor(name, flat[rule.ours], layer, rule, sizes, dtype)


def one_tensor(
    name: str, array: Any, layer: int | None, rule: Rule, sizes: dict[str, int], dtype: np.dtype
) -> Float[np.ndarray, "*shape"]:
    """One layer of one of our arrays, in their layout, gathered from all processes.

    Raises:
        ValueError: if float16 cannot hold a weight, naming the tensor.
    """
    groups, ours = _parse(rule.axes)
    letters = [a for group in groups for a in group]
    out = np.empty([sizes[a] for a in letters], dtype)
    with np.errstate(over="ignore"):
        to_host(array, layer, out.transpose([letters.index(a) for a in ours]))
    if dtype == np.float16 and not np.isfinite(out).all():
        raise ValueError(f"{name} has weights above 65504, float16's largest; use bfloat16")
    return out.reshape(tensor_shape(rule, sizes))


def _rules(cfg: MistralConfig, table: Sequence[Rule]) -> list[Rule]:
    return [rule for rule in table if rule.ours in param_axes(cfg)]


def _tensors(cfg: MistralConfig, table: Sequence[Rule]) -> Iterator[tuple[str, Rule, int | None]]:
    """Every tensor's name, rule and layer: embedding, layer by layer, last norm, head."""
    rules = _rules(cfg, table)
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


def read_slice(
    reader: SafetensorsReader,
    rule: Rule,
    sizes: dict[str, int],
    dtype: str,
    index: Any,
) -> np.ndarray:
    """The part of one of our arrays that `index` selects, layer by layer from disk.

    Raises:
        ValueError: if float16 cannot hold a weight, naming the tensor.
    """
    names, inner = [rule.theirs], index
    if "{}" in rule.theirs:
        layers, *inner = index
        names = [rule.theirs.format(i) for i in range(*layers.indices(sizes["L"]))]
    out = None
    for i, name in enumerate(names):
        part = _read_layer(reader, name, rule.axes, sizes, tuple(inner))
        if out is None:
            out = aligned_empty((len(names), *part.shape), jnp.dtype(dtype))
        with np.errstate(over="ignore"):
            out[i] = part  # transposed and cast on the way, so that no further copy is made
        if out.dtype == np.float16 and not np.isfinite(out[i]).all():
            raise ValueError(f"{name} has weights above 65504, float16's largest; use bfloat16")
    assert out is not None, "a device without layers"
    return out if "{}" in rule.theirs else out[0]


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
    found = {name: reader.shape(name) for name in reader.names if not _BUFFER.fullmatch(name)}
    if cfg.tie_word_embeddings and found.get(_HEAD) == wanted[_EMBED] == found.get(_EMBED):
        if not np.array_equal(reader.read(_HEAD), reader.read(_EMBED)):
            raise ValueError(
                f"{folder}: config.json says tie_word_embeddings, but {_HEAD} differs from "
                f"{_EMBED}; set tie_word_embeddings to false to keep both"
            )
        del found[_HEAD]
    check_tensors(wanted, found, f"{folder}: tensors and config.json")
    for name in found:
        reader.spec(name)  # raises for a dtype that cannot be read
