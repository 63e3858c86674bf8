"""Checkpoints of a run, and loading a model from wherever one lies. Nobody else imports Orbax.

A workdir holds `checkpoints/STEP/{params,opt_state,meta}`, a checksum file for each step (Orbax
restores a flipped bit without a word) and the tokenizer. An imported model has the same shape, with
step 0 and parameters only. Of a run with adapters `params` holds these alone, and `meta` says what
they stand beside.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from zephyr_jax.agreement import first_decides
from zephyr_jax.config.run import LoraConfig, MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.lora import abstract_adapters
from zephyr_jax.models.parameters import abstract_params
from zephyr_jax.storage import absolute
from zephyr_jax.types import Params, TrainState
from zephyr_jax.weights.checksums import (
    FOLDER,
    damage,
    newest_whole,
    saved_steps,
    steps_of,
    write_checksums,
)
from zephyr_jax.weights.huggingface import load_hf
from zephyr_jax.weights.merging import check_base, find_base, merge_into
from zephyr_jax.weights.safetensors import DTYPES
from zephyr_jax.weights.sources import find_tokenizer, resolve
from zephyr_jax.weights.stored_params import CHUNK_BYTES, read_params


def _named_leaves(tree: Any) -> dict[str, Any]:
    """A tree of any node types as a flat dict, which outlives the types of optax."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _beside(state: TrainState) -> tuple[Any, ...]:
    """What training needs beside the parameters: the item `opt_state`."""
    return tuple(state[2:])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _chunked(tree: Any) -> Any:
    """How leaves are written: in pieces, which a reader unpacks one by one."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)


def _gigabytes(tree: Any) -> float:
    """What of a tree Orbax may have in work at once: little more than its largest leaf."""
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return (largest + CHUNK_BYTES) / 1e9


class Checkpointer:
    """Saves a run's states without blocking it, and restores the newest whole one."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int):
        self._root, self._keep = absolute(workdir), keep
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._root / FOLDER,
            item_names=("params", "opt_state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep)]),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=3600),
            ),
        )

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to save; `meta` is JSON (config, digests, data position)."""
        step = int(state.step)
        self._wait()
        opt_state = _named_leaves(_beside(state))
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, _chunked(state.params)),
            opt_state=ocp.args.StandardSave(opt_state, _chunked(opt_state)),
            meta=ocp.args.JsonSave(meta | {"step": step}),
        )
        self._manager.save(step, args=args, force=True)
        self._pending = self._background.submit(self._finish, step)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state with its meta, placed as `like`; None where nothing was saved.

        Newer steps that are damaged are put aside, under `damaged/`.

        Args:
            like: shapes, dtypes and shardings.

        Raises:
            ValueError: if states were saved, but none of them is whole.
        """
        step = first_decides(self._newest_whole)  # one process reads all bytes, and moves folders
        return None if step is None else self._restore_step(step, like)

    def _newest_whole(self) -> int | None:
        problems: dict[int, str] = {}
        for step in reversed(saved_steps(self._root)):
            problem = damage(self._root, step)
            if problem is None:
                for other, said in problems.items():
                    logging.warning(
                        "checkpoint of step %d is damaged and put aside: %s", other, said
                    )
                    _put_aside(self._root, other)
                return step
            problems[step] = problem
        if problems:
            raise ValueError(
                f"none of the checkpoints {sorted(problems)} in {self._root} is whole: "
                f"{'; '.join(problems.values())}; restore one from a copy, or begin anew elsewhere"
            )
        return None

    def _restore_step(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        opt_state = _named_leaves(_beside(like))
        got = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(like.params)),
                opt_state=ocp.args.StandardRestore(_abstract(opt_state)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        treedef = jax.tree.structure(_beside(like))
        beside = jax.tree.unflatten(treedef, [got["opt_state"][name] for name in opt_state])
        number = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(number, got["params"], *beside), got["meta"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._wait()
        self._background.shutdown()
        if "_manager" in self.__dict__:
            self._manager.close()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()  # raises what went wrong in the background

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        folder = self._root / FOLDER
        write_checksums(self._root, step)
        for path in folder.glob("*.sums.json"):
            if not (folder / path.name.split(".")[0]).is_dir():
                path.unlink()


def _put_aside(root: epath.Path, step: int) -> None:
    (root / "damaged").mkdir(exist_ok=True)
    for name in (str(step), f"{step}.sums.json"):
        target = root / "damaged" / name
        if target.exists():
            target.rmtree()
        (root / FOLDER / name).rename(target)


class Model(NamedTuple):
    """A model to run: its architecture, parameters, tokenizer, and where they came from."""

    cfg: MistralConfig
    params: Params
    tokenizer: Tokenizer
    lineage: dict[str, Any]  # the saved meta: step, config, digests, and lines of `lineage`


class Adapters(NamedTuple):
    """What a run with adapters trained, without its base."""

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

    Parameters are placed on the ambient mesh. Of a workdir the newest step counts whose parameters
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
        ValueError: if what is there is damaged, the base of adapters is not the one they were
            trained beside, or the dtype is none of the three.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    folder = resolve(source, revision)
    if not isinstance(folder, epath.Path) and folder.suffix == ".gguf":
        from zephyr_jax.weights.gguf import load_gguf  # only where the extra is needed

        cfg, params, tok = load_gguf(folder, dtype=dtype)
        tok = find_tokenizer(tokenizer) if tokenizer else tok
        return Model(cfg, params, tok, {"lineage": [f"ported from {folder.name}"]})
    tok = find_tokenizer(tokenizer or folder)
    root, steps = steps_of(epath.Path(folder))
    if not steps:
        cfg, params = load_hf(Path(folder), dtype=dtype)
        # The folder of a download is named after its commit.
        named = source if Path(source).exists() else f"{str(source).split('@')[0]}@{folder.name}"
        return Model(cfg, params, tok, {"lineage": [f"ported from {named}"]})

    def load(step: int) -> Model:
        cfg, params, lineage = _load_step(root, step, str(tokenizer or folder), dtype)
        return Model(cfg, params, tok, lineage)

    return newest_whole(root, steps, load)


def load_adapters(source: str | os.PathLike[str]) -> Adapters:
    """The newest whole adapters of a run, or those of a step's folder, on the ambient mesh.

    Raises:
        FileNotFoundError: if `source` is no workdir or step.
        ValueError: if they are damaged, or the run trained all parameters.
    """
    root, steps = steps_of(epath.Path(source))
    if not epath.Path(source).is_dir():
        raise FileNotFoundError(f"{source} is no workdir and no step of one, so has no adapters")
    if not steps:
        raise ValueError(f"{source} holds no adapters of a run; only a workdir or a step does")

    def load(step: int) -> Adapters:
        folder, meta, cfg = _read_meta(root, step)
        if "lora" not in meta:
            raise ValueError(f"{source} holds no adapters but a whole model; use --format=hf")
        lora = LoraConfig(**meta.pop("lora"))
        adapters = read_params(folder / "params", abstract_adapters(cfg, lora), "float32")
        return Adapters(cfg, lora, adapters, meta)

    return newest_whole(root, steps, load)


def _read_meta(root: epath.Path, step: int) -> tuple[epath.Path, dict[str, Any], MistralConfig]:
    """A step's folder, what is saved beside its arrays, and the architecture."""
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
        adapters = read_params(folder / "params", abstract_adapters(cfg, lora), "float32")
        params = _base_of(root, base, tokenizer)
        params = merge_into(params, adapters, lora, dtype)
    else:
        params = read_params(folder / "params", abstract_params(cfg), dtype)
    if dtype == "float16" and not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise ValueError(f"{folder} has weights above 65504, float16's largest; use bfloat16")
    return cfg, params, meta


def _base_of(root: epath.Path, base: dict[str, str], tokenizer: str) -> Params:
    """The parameters beside which the adapters in `root` were trained, float32."""
    source = find_base(base["source"], root)
    try:
        params = load_model(source, tokenizer).params
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{root} has adapters for {base['source']}, which cannot be loaded ({error}); put it "
            "back, or start where that name leads to it"
        ) from error
    check_base(params, base["digest"], source, str(root))
    return params


def check_vacant(folder: Path) -> None:
    """Raises a FileExistsError where something stands that a new checkpoint would bury."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another or remove it")


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model as step 0 of a new checkpoint folder, which appears when it is whole.

    Raises:
        FileExistsError: if the folder exists and is not empty.
    """
    folder = Path(folder).absolute()
    check_vacant(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    step = temporary / FOLDER / "0"
    step.mkdir(parents=True)
    with ocp.StandardCheckpointer(save_concurrent_gb=_gigabytes(model.params)) as writer:
        writer.save(step / "params", model.params, save_args=_chunked(model.params))
    (step / "meta").mkdir()
    meta = {"model": model.cfg.__dict__, "step": 0} | model.lineage
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    write_checksums(epath.Path(temporary), 0)
    model.tokenizer.save(temporary)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)
