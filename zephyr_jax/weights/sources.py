"""Loading a model, adapters or a tokenizer: from a workdir, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath, epy
from flax import traverse_util

from zephyr_jax.chips import keep_programs
from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.data.tokenizer_files import ADDED_NAME, MODEL_NAME, TokenizerFiles
from zephyr_jax.hub import check_name, fetch, split_name
from zephyr_jax.models.lora import abstract_adapters, merge
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.storage import MANIFEST, absolute, compare, digests, is_remote, read_json, verify
from zephyr_jax.types import Params
from zephyr_jax.weights import checkpoint, safetensors
from zephyr_jax.weights.checkpoint import FOLDER, Model
from zephyr_jax.weights.huggingface import load_hf
from zephyr_jax.weights.layouts import not_finite
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, INDEX, SINGLE

with epy.lazy_imports():  # the package gguf is slow to import
    from zephyr_jax.weights import gguf_reader

# Files read in addition to the weights. Pickles, other precisions and other formats of the same
# weights stay on the hub.
_SMALL = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", INDEX)
_SMALL += ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Adapters(NamedTuple):
    """The trained adapters of a run, without their base."""

    cfg: MistralConfig
    lora: LoraConfig
    adapters: Params  # float32
    meta: dict[str, Any]  # as of `Model.lineage`, and `base`: its source and digest


def resolve(source: str | os.PathLike[str], *, weights: bool = True) -> Path | epath.Path:
    """The folder (or GGUF file) of a model: the source itself, or the download of a hub id.

    Only that of a run at a URL is not on this machine. Without `weights` all but these is fetched.
    """
    folder = checkpoint.step_folder(epath.Path(source))
    if folder.parent.name == FOLDER or checkpoint.saved_steps(folder):
        return folder if is_remote(folder) else Path(folder)
    if is_remote(source):
        why = f"{folder} holds no checkpoints of a run; other models are read from disks"
        raise FileNotFoundError(f"{why}: copy it here, as by gcloud storage rsync --recursive")
    folder = Path(folder)
    if (folder / "config.json").is_file() or (folder.is_file() and folder.suffix == ".gguf"):
        return folder
    if (folder / ADAPTER_CONFIG).is_file():
        raise safetensors.no_weights(folder, [ADAPTER_CONFIG])
    if folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no model (checkpoints/ or config.json)")
    check_name(
        str(source),
        f"{source} is not a model: expected a workdir, a checkpoint, a Hugging Face folder, a GGUF "
        "file, or a hub id such as mistralai/Mistral-7B-v0.1",
    )
    return download(str(source), weights=weights)


def download(name: str, *, weights: bool = True) -> Path:
    """The folder in the client's cache that holds a model; the folder's name is the commit."""
    name, revision = split_name(name)
    folder, listed = fetch(name, revision, _SMALL)
    if SINGLE not in listed and INDEX not in listed:
        raise safetensors.no_weights(name, listed)
    if "config.json" not in listed:
        raise FileNotFoundError(f"{name} is not a model: it lacks a config.json")
    logging.info("%s at %s is in %s", name, folder.name, folder)
    if not weights:
        return folder
    # One file is preferred to shards, as by the reader
    shards = {SINGLE} if SINGLE in listed else {*safetensors.read_index(folder).values()}
    return fetch(name, folder.name, sorted(shards))[0]


def stored_dtype(folder: Path | epath.Path) -> str | None:
    """The dtype of the weights in a model's files; None: a run's, of float32 masters."""
    if folder.suffix == ".gguf":
        return gguf_reader.GgufReader(folder).dtype
    _, steps = checkpoint.workdir_and_steps(epath.Path(folder))
    return None if steps else safetensors.SafetensorsReader(folder).dtype


def find_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file (a GGUF file too), in a folder that holds one, or of a model's."""
    path = epath.Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_reader.read_tokenizer(gguf_reader.GgufReader(Path(path)))
    root, steps = checkpoint.workdir_and_steps(path)
    if not steps:
        if (path / MANIFEST).is_file():  # of an export
            names = (*TokenizerFiles.kept, MODEL_NAME, ADDED_NAME)
            verify(path, names, remedy=f"copy it again, or remove {path / MANIFEST}")
        return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)
    tok, (_, meta) = Tokenizer.from_folder(root), _newest_meta(root, steps, ("meta",))
    if meta.get("tokenizer", tok.digest) != tok.digest:
        raise ValueError(f"the tokenizer in {root} changed: restore its files, or name another one")
    return tok


def source_files(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The `folder` of a model that is imported and digests of its `files`; {} for that of a run."""
    resolved = resolve(source)
    if checkpoint.workdir_and_steps(epath.Path(resolved))[1]:  # which has digests of its own
        return {}
    path = Path(resolved)
    found = [path] if path.is_file() else sorted(path.iterdir())
    names = [x.name for x in found if x.is_file() and x.name != "README.md"]  # a card is edited
    folder = path.parent if path.is_file() else path
    return {"folder": str(folder.absolute()), "files": digests(folder, names)}


def verify_model(source: str | os.PathLike[str]) -> None:
    """Compares an export, every step of a workdir and the source of an import with the digests."""
    root, steps = checkpoint.workdir_and_steps(epath.Path(resolve(source)))
    if not steps or (root / MANIFEST).is_file():
        verify(root)
    for step in steps:
        folder = root / FOLDER / str(step)
        checkpoint.check_step(folder)
        origin = read_json(folder / "meta" / "metadata").get("source")
        if origin and Path(origin["folder"]).exists():
            compare(origin["folder"], origin["files"], f"{root} was imported from other bytes")
        elif origin:
            logging.warning("%s was imported from %s, which is gone", root, origin["folder"])


def check_same_tokenizer(tok: Tokenizer, source: str, field: str = "init") -> None:
    """Raises a ValueError if a model's own tokenizer, if at hand, gives other ids than `tok`."""
    try:
        theirs = find_tokenizer(resolve(source, weights=False))
    except OSError as error:
        logging.info("the tokenizer is not compared with that of %s: %s", source, error)
        return
    if theirs.digest == tok.digest:
        return
    difference = f"{theirs.vocab_size} tokens against {tok.vocab_size}"
    if theirs.vocab_size == tok.vocab_size:
        special = frozenset(tok.specials.values())
        entries = [tok.decode([i]) for i in range(tok.vocab_size) if i not in special]
        # Every entry of the vocabulary, in lines of a hundred
        lines = [" ".join(entries[i : i + 100]) for i in range(0, len(entries), 100)]
        unequal = [line for line in lines if theirs.encode(line) != tok.encode(line)]
        if not unequal and theirs.specials == tok.specials:
            return
        words = ((x, theirs.encode(x), tok.encode(x)) for line in unequal for x in line.split())
        pairs = (f"{x!r} is {a} against {b}" for x, a, b in words if a != b)
        difference = next(pairs, "other special tokens")
    remedy = "name a model that has the run's tokenizer"
    if field == "init":
        remedy = 'use --config.data.tokenizer="" for that of init, or say that it is on purpose by '
        remedy += "--config.data.new_tokenizer=True"
    raise ValueError(
        f"{field}={source} was trained with another tokenizer ({theirs.source}, digest "
        f"{theirs.digest[:16]}) than that of the run ({tok.source}, digest {tok.digest[:16]}): "
        f"{difference}; {remedy}"
    )


def load_model(
    source: str | os.PathLike[str], tokenizer: str = "", *, dtype: str | None = "float32"
) -> Model:
    """The model in a workdir, a step's folder, a Hugging Face folder, a GGUF file, or at a hub id.

    Parameters are sharded over the ambient mesh. A workdir gives the newest step whose parameters
    are whole. Adapters of a run are merged with their base, which is loaded in float32 from where
    the run had it. `tokenizer` is a file or folder, if not the one of `source`; `dtype` is float32,
    bfloat16 or float16, None for that of the model's computation. A hub id may end in `@REVISION`.
    A ValueError says which files are damaged, or that the base of adapters is not theirs.
    """
    if dtype is not None:
        safetensors.check_dtype(dtype)
    keep_programs()
    folder = resolve(source)
    if not isinstance(folder, epath.Path) and folder.suffix == ".gguf":
        cfg, params, tok = gguf_reader.load_gguf(folder, dtype=dtype)
        tok = find_tokenizer(tokenizer) if tokenizer else tok
        return Model(cfg, params, tok, {"lineage": [f"ported from {folder.name}"]})
    root, steps = checkpoint.workdir_and_steps(epath.Path(folder))
    if not steps:
        cfg, params = load_hf(Path(folder), dtype=dtype)
        tok = find_tokenizer(tokenizer or folder)
        # The folder of a download is named after its commit.
        name = source if Path(source).exists() else f"{str(source).split('@')[0]}@{folder.name}"
        return Model(cfg, params, tok, {"lineage": [f"ported from {name}"]})
    step, meta, cfg = _newest_step(root, steps)
    dtype, tok = dtype or cfg.dtype, find_tokenizer(tokenizer or folder)
    if "lora" in meta:
        lora, base = meta.pop("lora"), meta.pop("base")
        adapters = checkpoint.read_stored(step / "params", abstract_adapters(cfg, lora), "float32")
        params = _load_base(root, base, str(tokenizer or folder))
        params = merge_into(params, adapters, lora, dtype)
    else:
        params = checkpoint.read_stored(step / "params", abstract_params(cfg), dtype)
    if dtype == "float16" and not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise ValueError(f"{step} has weights above 65504, float16's largest; use bfloat16")
    return Model(cfg, params, tok, meta)


def load_in(source: str, dtype: str | None) -> Model:
    """The model with its parameters and its computation in `dtype`, checked; None: its own."""
    model = load_model(source, dtype=dtype)
    check_all_finite(model.params, source)
    if dtype:
        model = model._replace(cfg=dataclasses.replace(model.cfg, dtype=dtype))
    return model


def check_all_finite(params: Params, source: str) -> None:
    """Raises a ValueError that names the parameters, from `source`, that hold nan or inf."""
    if problem := not_finite(params):
        raise ValueError(f"{problem} in {source}; restore it, or take another model")


def load_adapters(source: str | os.PathLike[str]) -> Adapters:
    """The newest whole adapters of a run, or those of a step's folder, on the ambient mesh."""
    root, steps = checkpoint.workdir_and_steps(epath.Path(source))
    if not steps:
        raise ValueError(f"{source} holds no adapters of a run; only a workdir or a step does")
    step, meta, cfg = _newest_step(root, steps)
    if "lora" not in meta:
        raise ValueError(f"{source} holds no adapters but a whole model; use --format=hf")
    lora = meta.pop("lora")
    adapters = checkpoint.read_stored(step / "params", abstract_adapters(cfg, lora), "float32")
    return Adapters(cfg, lora, adapters, meta)


def _newest_step(
    root: epath.Path, steps: list[int]
) -> tuple[epath.Path, dict[str, Any], MistralConfig]:
    """The folder of the newest step whose parameters are whole, its meta, the architecture."""
    folder, meta = _newest_meta(root, steps, ("params", "meta"))
    if meta["step"] < meta.get("total_steps", 0):
        logging.warning("%s stopped at step %d of %d", root, meta["step"], meta["total_steps"])
    if lora := meta.get("lora"):
        meta["lora"] = LoraConfig(**lora | {"targets": tuple(lora["targets"])})  # JSON has a list
    return folder, meta, MistralConfig(**meta.pop("model"))


def _newest_meta(
    root: epath.Path, steps: list[int], parts: tuple[str, ...]
) -> tuple[epath.Path, dict[str, Any]]:
    folder = absolute(root / FOLDER / str(checkpoint.newest_whole(root, steps, parts)[0]))
    return folder, read_json(folder / "meta" / "metadata", "take another step", ("step", "model"))


def find_base(root: str | os.PathLike[str], source: str) -> str:
    """The initial model of the run in `root`: `source`, looked for in the folders above it too."""
    if is_remote(source) or Path(source).exists() or Path(source).is_absolute():
        return source
    paths = (folder / source for folder in absolute(root).parents)
    return next((str(path) for path in paths if path.exists()), source)


def _load_base(root: epath.Path, base: dict[str, str], tokenizer: str) -> Params:
    """The parameters on which the adapters in `root` were trained, float32."""
    source = find_base(root, base["source"])
    try:
        params = load_model(source, tokenizer).params
    except FileNotFoundError as error:
        why = f"{root} has adapters for {base['source']}, which cannot be loaded ({error})"
        raise FileNotFoundError(f"{why}; put it back, or start where that path leads to") from error
    check_base(params, base["digest"], source, str(root))
    return params


def check_base(base: Params, digest: str, source: str, owner: str) -> None:
    """Raises a ValueError unless parameters (float32, from `source`) have the digest of a run's."""
    if (actual := checkpoint.params_digest(base)) != digest:
        why = f"{owner} belongs to parameters of digest {digest}, but {source} has {actual}"
        raise ValueError(f"{why}; restore the model that it was trained with")


def merge_into(params: Params, adapters: Params, lora: LoraConfig, dtype: str) -> Params:
    """The parameters with adapters merged in float32, as `dtype`; empties `params` on the way."""
    tree = dict(params)
    params.clear()
    for name in lora.targets:
        tree = merge(tree, adapters, dataclasses.replace(lora, targets=(name,)))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    tree = {path: flat.pop(path).astype(dtype) for path in list(flat)}
    return traverse_util.unflatten_dict(tree, sep="/")
