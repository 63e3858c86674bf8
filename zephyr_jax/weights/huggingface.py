"""Hugging Face folders in and out: one table of weights, from which both directions follow.

Our layers are stacked on a leading axis; Hugging Face has one matrix per layer, outputs first.
RoPE is half-split in both, so nothing is permuted.
"""

from __future__ import annotations

import collections
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import reading
from zephyr_jax.models.parameters import count_params, param_shardings
from zephyr_jax.storage import MANIFEST, read_json, verify
from zephyr_jax.types import Params
from zephyr_jax.weights import safetensors
from zephyr_jax.weights.exports import new_export, write_files
from zephyr_jax.weights.layouts import Layout, Rule, check_tensors

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
_BUFFER = re.compile(r".*rotary_emb\.inv_freq")  # old exports carry it; it is no parameter


def load_hf(
    folder: str | os.PathLike[str], *, dtype: str | None = "float32"
) -> tuple[MistralConfig, Params]:
    """The configuration and the parameters of a Mistral (or Llama) model in a local folder.

    Each process reads its own devices' slices by the ambient mesh; `dtype` None: config.json's.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    reader = safetensors.SafetensorsReader(folder)
    if cfg.num_hidden_layers > len(reader.shapes):  # before the names of all are listed
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers={cfg.num_hidden_layers}, but there are "
            f"only {len(reader.shapes)} tensors; copy both again"
        )
    if (folder / MANIFEST).is_file():
        changed = f"copy it again or, if it was changed on purpose, remove {folder / MANIFEST}"
        verify(folder, remedy=changed)
    layout = hf_layout(cfg)
    actual = {k: shape for k, shape in reader.shapes.items() if not _BUFFER.fullmatch(k)}
    tied = cfg.tie_word_embeddings and {_HEAD, _EMBED} <= actual.keys()
    if tied and np.array_equal(reader.read(_HEAD), reader.read(_EMBED)):
        del actual[_HEAD]  # only a copy; another head does not fit
    check_tensors(layout.shapes, actual, f"{folder}: tensors and config.json")
    reader.check_dtypes(actual)
    return cfg, layout.read(reader, dtype or cfg.dtype, param_shardings(cfg))


def export_hf(
    cfg: MistralConfig,
    params: Params,
    tok: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
    card: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes a complete Hugging Face folder that transformers 4 and 5 load; returns its path.

    One tensor at a time is in host memory. Of several processes, which all must call it, the first
    writes. The folder appears when complete, and replaces an earlier export if `overwrite`, else
    there is a FileExistsError. `card` has fields of `exports.CARD_FIELDS`.
    """
    safetensors.check_dtype(dtype)
    layout = hf_layout(cfg)
    tensors = layout.write(params, dtype)
    if jax.process_index() > 0:  # every process takes part in gathering, one writes
        collections.deque(tensors, maxlen=0)
        return Path(folder)
    with new_export(folder, overwrite, count_params(cfg) * jnp.dtype(dtype).itemsize) as temporary:
        write_files(temporary, cfg, tok, dtype, card or {}, Path(folder).name)
        safetensors.write_safetensors(temporary, layout.shapes, dtype, tensors, max_shard_bytes)
    return Path(folder)


def read_config(folder: Path) -> MistralConfig:
    """The configuration of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {folder} is not a Hugging Face model")
    with reading(path):
        config = read_json(path, "copy it again")
        if config.get("quantization_config"):
            raise ValueError("the model is quantized; use the unquantized one")
        cfg = MistralConfig.from_hf(config | _end_ids(config, folder))
        positions = cfg.max_position_embeddings
        if not isinstance(positions, int) or not 0 < positions < 1 << 31:
            raise ValueError(f"max_position_embeddings={positions} is no number of positions")
        return cfg


def _end_ids(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `eos_token_id` of config.json and generation_config.json together; {}: neither has it."""
    path = folder / "generation_config.json"
    others = read_json(path, "copy it again") if path.is_file() else {}
    named = [file["eos_token_id"] for file in (config, others) if "eos_token_id" in file]
    ends = [i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    return {"eos_token_id": [*dict.fromkeys(ends)]} if named else {}


def hf_layout(cfg: MistralConfig) -> Layout:
    """The tensors of a Hugging Face checkpoint."""
    return Layout.of(cfg, TABLE)
