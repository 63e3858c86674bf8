"""Checkpoints of a run, and loading a model from any source. Only this package imports Orbax.

A workdir holds `checkpoints/STEP/{params,opt_state,meta}`, a checksum file for each step and the
tokenizer. An imported model has the same shape, with step 0 and parameters only. For a run with
adapters `params` holds only these, and `meta` names their base.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.distributed import first_decides
from zephyr_jax.models.lora import abstract_adapters
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.storage import absolute, atomic_path
from zephyr_jax.types import Params, TrainState
from zephyr_jax.weights.checksums import (
    FOLDER,
    newest_whole,
    saved_steps,
    workdir_and_steps,
    write_checksums,
)
from zephyr_jax.weights.huggingface import load_hf
from zephyr_jax.weights.merging import check_base, find_base, merge_into
from zephyr_jax.weights.safetensors import check_dtype
from zephyr_jax.weights.sources import find_tokenizer, resolve
from zephyr_jax.weights.stored_params import CHUNK_BYTES, read_stored


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Everything but step and parameters, as a flat dict, which outlives the types of optax."""
    leaves = jax.tree_util.tree_flatten_with_path(tuple(state[2:]))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _chunked(tree: Any) -> Any:
    """Arguments that make Orbax write every leaf in chunks, which a reader unpacks one by one."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)


class Checkpointer:
    """Saves a run's states without blocking it, and restores the newest whole one."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int):
        self._root, self._keep = absolute(workdir), keep
        self._orbax: ocp.CheckpointManager | None = None
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which lists the steps when it is first used."""
        if self._orbax is None:
            self._orbax = ocp.CheckpointManager(
                self._root / FOLDER,
                item_names=("params", "opt_state", "meta"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(
                        [policies.LatestN(self._keep)]
                    ),
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(timeout_secs=3600),
                ),
            )
        return self._orbax

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving; `meta` is JSON (config, digests, data position)."""
        step = int(state.step)
        self._wait()
        opt_state = _named_leaves(state)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, _chunked(state.params)),
            opt_state=ocp.args.StandardSave(opt_state, _chunked(opt_state)),
            meta=ocp.args.JsonSave(meta | {"step": step}),
        )
        self._manager().save(step, args=args, force=True)
        self._pending = self._background.submit(self._finish, step)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state and its meta; None if nothing was saved.

        Newer steps that are damaged are moved to `damaged/`.

        Args:
            like: shapes, dtypes and shardings.

        Raises:
            ValueError: if states were saved, but none of them is whole.
        """
        step = first_decides(self._newest_whole)  # one process reads all bytes, and moves folders
        if step is None:
            return None
        opt_state = _named_leaves(like)
        restored = self._manager().restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(like.params)),
                opt_state=ocp.args.StandardRestore(_abstract(opt_state)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        treedef = jax.tree.structure(tuple(like[2:]))
        rest = jax.tree.unflatten(treedef, [restored["opt_state"][name] for name in opt_state])
        number = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(number, restored["params"], *rest), restored["meta"]

    def _newest_whole(self) -> int | None:
        steps = saved_steps(self._root)
        if not steps:
            return None
        step, damaged = newest_whole(self._root, steps)
        for other in damaged:
            (self._root / "damaged").mkdir(exist_ok=True)
            for name in (str(other), f"{other}.sums.json"):
                target = self._root / "damaged" / name
                if target.exists():
                    target.rmtree()
                (self._root / FOLDER / name).rename(target)
        return step

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._wait()
        self._background.shutdown()
        if self._orbax is not None:
            self._orbax.close()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()  # raises what went wrong in the background

    def _finish(self, step: int) -> None:
        self._manager().wait_until_finished()
        if jax.process_index() == 0:
            folder = self._root / FOLDER
            write_checksums(self._root, step)
            for path in folder.glob("*.sums.json"):
                if not (folder / path.name.split(".")[0]).is_dir():
                    path.unlink()


class Model(NamedTuple):
    """A model to run: its architecture, parameters, tokenizer, and where they came from."""

    cfg: MistralConfig
    params: Params
    tokenizer: Tokenizer
    lineage: dict[str, Any]  # the saved meta: step, config, digests, and lines of `lineage`


class Adapters(NamedTuple):
    """The trained adapters of a run, without their base."""

    cfg: MistralConfig
    lora: LoraConfig
    adapters: Params  # float32
    meta: dict[str, Any]  # as of `Model.lineage`, and `base`: its source and digest


def load_model(
    source: str | os.PathLike[str],
    tokenizer: str = "",
    *,
    dtype: str | None = "float32",
    revision: str | None = None,
) -> Model:
    """The model in a workdir, a step's folder, a Hugging Face folder, a GGUF file, or at a hub id.

    Parameters are sharded over the ambient mesh. A workdir gives the newest step whose parameters
    are whole; the optimizer's state is not read and need not be there. Adapters of a run are merged
    with their base, which is loaded in float32 from where the run had it.

    Args:
        source: where the model is; a hub id may end in `@REVISION`.
        tokenizer: a tokenizer file or folder, if not the one of `source`.
        dtype: of the parameters: float32, bfloat16 or float16; None: that of the model's
            computation. No other copy is made on the way.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: if `source` is nothing of that kind.
        ValueError: if the files are damaged, the base of adapters is not the one they were trained
            on, or the dtype is none of the three.
    """
    if dtype is not None:
        check_dtype(dtype)
    folder = resolve(source, revision)
    if not isinstance(folder, epath.Path) and folder.suffix == ".gguf":
        from zephyr_jax.weights.gguf import load_gguf  # only where the extra is needed

        cfg, params, tok = load_gguf(folder, dtype=dtype)
        tok = find_tokenizer(tokenizer) if tokenizer else tok
        return Model(cfg, params, tok, {"lineage": [f"ported from {folder.name}"]})
    tok = find_tokenizer(tokenizer or folder)
    root, steps = workdir_and_steps(epath.Path(folder))
    if steps:
        step, _ = newest_whole(root, steps, ("params", "meta"))
        cfg, params, meta = _load_step(root, step, str(tokenizer or folder), dtype)
        return Model(cfg, params, tok, meta)
    cfg, params = load_hf(Path(folder), dtype=dtype)
    # The folder of a download is named after its commit.
    name = source if Path(source).exists() else f"{str(source).split('@')[0]}@{folder.name}"
    return Model(cfg, params, tok, {"lineage": [f"ported from {name}"]})


def load_adapters(source: str | os.PathLike[str]) -> Adapters:
    """The newest whole adapters of a run, or those of a step's folder, on the ambient mesh.

    Raises:
        FileNotFoundError: if `source` is no workdir or step.
        ValueError: if they are damaged, or the run trained all parameters.
    """
    root, steps = workdir_and_steps(epath.Path(source))
    if not epath.Path(source).is_dir():
        raise FileNotFoundError(f"{source} is no workdir and no step of one, so has no adapters")
    if not steps:
        raise ValueError(f"{source} holds no adapters of a run; only a workdir or a step does")
    folder, meta, cfg = _read_meta(root, newest_whole(root, steps, ("params", "meta"))[0])
    if "lora" not in meta:
        raise ValueError(f"{source} holds no adapters but a whole model; use --format=hf")
    lora = LoraConfig(**meta.pop("lora"))
    adapters = read_stored(folder / "params", abstract_adapters(cfg, lora), "float32")
    return Adapters(cfg, lora, adapters, meta)


def _read_meta(root: epath.Path, step: int) -> tuple[epath.Path, dict[str, Any], MistralConfig]:
    """A step's folder, its saved meta, and the architecture."""
    folder = absolute(root / FOLDER / str(step))
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if meta["step"] < meta.get("total_steps", 0):
        logging.warning("%s stopped at step %d of %d", root, meta["step"], meta["total_steps"])
    return folder, meta, MistralConfig(**meta.pop("model"))


def _load_step(
    root: epath.Path, step: int, tokenizer: str, dtype: str | None
) -> tuple[MistralConfig, Params, dict[str, Any]]:
    folder, meta, cfg = _read_meta(root, step)
    dtype = dtype or cfg.dtype
    if "lora" in meta:
        lora, base = LoraConfig(**meta.pop("lora")), meta.pop("base")
        adapters = read_stored(folder / "params", abstract_adapters(cfg, lora), "float32")
        params = merge_into(_load_base(root, base, tokenizer), adapters, lora, dtype)
    else:
        params = read_stored(folder / "params", abstract_params(cfg), dtype)
    if dtype == "float16" and not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise ValueError(f"{folder} has weights above 65504, float16's largest; use bfloat16")
    return cfg, params, meta


def _load_base(root: epath.Path, base: dict[str, str], tokenizer: str) -> Params:
    """The parameters on which the adapters in `root` were trained, float32."""
    source = find_base(base["source"], root)
    try:
        params = load_model(source, tokenizer).params
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{root} has adapters for {base['source']}, which cannot be loaded ({error}); put it "
            "back, or start in the folder from which that path leads to it"
        ) from error
    check_base(params, base["digest"], source, str(root))
    return params


def check_vacant(folder: Path) -> None:
    """Raises a FileExistsError unless a new checkpoint can be written to `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another or remove it")


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model as step 0 of a new checkpoint folder, which appears when it is complete.

    Raises:
        FileExistsError: if the folder exists and is not empty.
    """
    check_vacant(Path(folder))
    # Orbax works on little more than one leaf at a time.
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.params))
    with atomic_path(Path(folder).absolute()) as temporary:
        step = temporary / FOLDER / "0"
        step.mkdir(parents=True)
        gigabytes = (largest + CHUNK_BYTES) / 1e9
        with ocp.StandardCheckpointer(save_concurrent_gb=gigabytes) as writer:
            writer.save(step / "params", model.params, save_args=_chunked(model.params))
        (step / "meta").mkdir()
        meta = {"model": model.cfg.__dict__, "step": 0} | model.lineage
        (step / "meta" / "metadata").write_text(json.dumps(meta))
        write_checksums(epath.Path(temporary), 0)
        model.tokenizer.save(temporary)
