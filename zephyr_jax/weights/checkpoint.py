"""Checkpoints of a run, written and read. Only this package imports Orbax.

A workdir holds `checkpoints/STEP/{params,opt_state,meta}` and the tokenizer. An imported model has
the same shape, with step 0 and parameters only. For a run with adapters `params` holds only these,
and `meta` names their base. Orbax restores a flipped bit without an error, so each step is sealed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers as policies

from zephyr_jax import storage
from zephyr_jax.chips import check_space
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.distributed import first_decides
from zephyr_jax.types import Params, TrainState
from zephyr_jax.weights.layouts import aligned_empty, from_parts, not_finite

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"  # what Orbax writes last, in a bucket, where nothing is renamed
_UNSEALED = "unsealed"  # in FOLDER, the number of a step that is being saved
CHUNK_BYTES = 1 << 23  # of an array, written as one chunk
_CONTEXT = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": 10_000_000}})


def _for_orbax(folder: epath.Path) -> epath.Path:
    """The folder; where its path is a pattern, for which Orbax takes it, a link in the cache."""
    if storage.is_remote(folder) or not re.search(r"[][*?]", str(folder)):
        return folder
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # on every process the same
    link = epath.Path(storage.user_cache()) / "links" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(folder, link)
    return link


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Everything but step and parameters, as a flat dict, which outlives the types of optax."""
    leaves = jax.tree_util.tree_flatten_with_path(tuple(state[2:]))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _chunked(tree: Any) -> Any:
    """Arguments that make Orbax write every leaf in chunks, which a reader unpacks one by one."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)


def saved_steps(root: epath.Path) -> list[int]:
    """The steps that are complete under a workdir, oldest first."""
    folder = root / FOLDER
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if storage.is_remote(folder):
        paths = [path for path in paths if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in paths)


def workdir_and_steps(folder: epath.Path) -> tuple[epath.Path, list[int]]:
    """The workdir and its steps; where `folder` is that of a step, only this one."""
    folder = step_folder(folder)
    if folder.parent.name == FOLDER:
        if not folder.name.isdigit():
            held = ", ".join(map(str, saved_steps(folder.parents[1]))) or "none"
            raise ValueError(f"{folder} is not that of a step; the run has {held}")
        return folder.parents[1], [int(folder.name)]
    return folder, saved_steps(folder)


def step_folder(folder: epath.Path) -> epath.Path:
    """The folder itself, or for `WORKDIR/checkpoints/best` that of the run's best step."""
    if folder.parent.name != FOLDER or folder.name != "best":
        return folder
    path = folder.parents[1] / "best.json"
    if not path.is_file():
        why = "it was trained without train.keep_best, or not evaluated yet"
        raise FileNotFoundError(f"{folder.parents[1]} has no best step: {why}; name another")
    return folder.parent / str(storage.read_checked(path, "name a step", ["step"])["step"])


def newest_whole(
    root: epath.Path, steps: Sequence[int], parts: Sequence[str] = ("",)
) -> tuple[int, list[int]]:
    """The newest of these steps whose `parts` (all folders) are whole, and the newer ones."""
    problems: dict[int, str] = {}
    for step in reversed(steps):
        try:
            check_step(root / FOLDER / str(step), parts)
            return step, list(problems)
        except (ValueError, FileNotFoundError) as error:
            logging.warning("checkpoint of step %d in %s: %s", step, root, error)
            problems[step] = str(error)
    why = "; ".join(problems.values())
    steps = sorted(problems)
    raise ValueError(f"none of the checkpoints {steps} in {root} is whole: {why}, or train again")


def check_step(folder: epath.Path, parts: Sequence[str] = ("",)) -> None:
    """Verifies a step, which lacks its digests if the run was killed before it wrote them."""
    mark, sealed = folder.parent / _UNSEALED, (folder / storage.MANIFEST).is_file()
    if not sealed and mark.is_file() and mark.read_text() == folder.name:
        logging.warning("%s is complete, but the run was killed before it was sealed", folder)
        return
    meta = storage.read_json(folder / "meta" / "metadata", "take another step")
    storage.verify(folder, parts, required="sealed" in meta)
    if folder.name not in ("0", str(meta.get("step", folder.name))):  # 0: a model that was saved
        raise ValueError(f"{folder} holds step {meta['step']}: give it that name")


def params_digest(params: Params) -> str:
    """A sha256 over every parameter's path, shape and bits, the same on every mesh."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    folds = jax.device_get([_fold(leaf) for _, leaf in leaves])
    folded = [
        (jax.tree_util.keystr(path), list(leaf.shape), [int(x) for x in fold])
        for (path, leaf), fold in zip(leaves, folds, strict=True)
    ]
    return hashlib.sha256(json.dumps(folded).encode()).hexdigest()


@jax.jit
def _fold(leaf: jax.Array) -> jax.Array:
    """Two sums over the bits, each times an odd number of its index, the same in any order."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        shape = tuple(size if i == axis else 1 for i in range(leaf.ndim))
        index = index * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    mixed = bits ^ (bits >> 15)
    first = (bits * (2 * index + 1)).sum(dtype=jnp.uint32)
    return jnp.stack([first, (mixed * (index * jnp.uint32(2654435761) | 1)).sum(dtype=jnp.uint32)])


class Checkpointer:
    """Saves a run's states, of which the newest `keep` stay, and that of step `best`."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int):
        self._root, self._keep = storage.absolute(workdir), keep
        self.best = 0  # set by the run
        self._orbax: ocp.CheckpointManager | None = None
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which lists the steps when it is first used."""
        if self._orbax is None:
            kept = policies.AnyPreservationPolicy([policies.LatestN(self._keep), self])
            self._orbax = ocp.CheckpointManager(
                _for_orbax(self._root) / FOLDER,
                item_names=("params", "opt_state", "meta"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=kept,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(timeout_secs=3600),
                ),
            )
        return self._orbax

    def should_preserve(self, checkpoints: Any, **_: Any) -> list[bool]:
        """For Orbax, whose policy this is: which checkpoint is that of the best step."""
        return [checkpoint.step == self.best for checkpoint in checkpoints]

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving a step, if it was not saved; a FloatingPointError if it is not finite."""
        step = int(state.step)
        self._wait()
        if step in self._manager().all_steps():
            return
        if problem := not_finite(state.params):
            remedy = f"{self._root} keeps earlier steps; lower optim.peak_lr in another --workdir"
            raise FloatingPointError(f"after step {step} {problem}, so it is not saved; {remedy}")
        opt_state = _named_leaves(state)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, _chunked(state.params)),
            opt_state=ocp.args.StandardSave(opt_state, _chunked(opt_state)),
            meta=ocp.args.JsonSave(meta | {"step": step, "sealed": True}),
        )
        if not jax.process_index():
            storage.write_atomic(self._root / FOLDER / _UNSEALED, str(step))
        self._manager().save(step, args=args, force=True)
        self._pending = self._background.submit(self._finish, step)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state, placed as `like`, and meta, or None; moves damaged steps away."""
        step = first_decides(self._newest_whole)  # one process reads all bytes, and moves folders
        if step is None:
            return None
        opt_state = _named_leaves(like)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            opt_state=ocp.args.StandardRestore(_abstract(opt_state)),
            meta=ocp.args.JsonRestore(),
        )
        restored = self._manager().restore(step, args=args)
        if problem := not_finite(restored["params"]):
            raise ValueError(f"{problem} in step {step} of {self._root}; remove that checkpoint")
        treedef = jax.tree.structure(tuple(like[2:]))
        rest = jax.tree.unflatten(treedef, [restored["opt_state"][name] for name in opt_state])
        number = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(number, restored["params"], *rest), restored["meta"]

    def _newest_whole(self) -> int | None:
        steps = saved_steps(self._root)
        if not steps:
            return None
        step, damaged = newest_whole(self._root, steps)
        if not (self._root / FOLDER / str(step) / storage.MANIFEST).is_file():
            self._seal(step)
        for other in damaged:
            target = self._root / "damaged" / str(other)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmtree()
            (self._root / FOLDER / str(other)).rename(target)
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
        if not jax.process_index():
            self._seal(step)

    def _seal(self, step: int) -> None:
        storage.seal(self._root / FOLDER / str(step))
        (self._root / FOLDER / _UNSEALED).unlink(missing_ok=True)


class Model(NamedTuple):
    """A model to run: its architecture, parameters, tokenizer, and where they came from."""

    cfg: MistralConfig
    params: Params
    tokenizer: Tokenizer
    lineage: dict[str, Any]  # the saved meta: step, config, digests, and lines of `lineage`


def check_vacant(folder: Path) -> None:
    """Raises a FileExistsError unless a new checkpoint can be written to `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another or remove it")


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model as step 0 of a new checkpoint folder, which appears when it is complete."""
    check_vacant(Path(folder))
    check_space(folder, sum(x.nbytes for x in jax.tree.leaves(model.params)))
    # Orbax works on little more than one leaf at a time.
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.params))
    with storage.atomic_path(Path(folder).absolute()) as temporary:
        (temporary / FOLDER / "0" / "meta").mkdir(parents=True)
        step = _for_orbax(epath.Path(temporary)) / FOLDER / "0"
        with ocp.StandardCheckpointer(save_concurrent_gb=(largest + CHUNK_BYTES) / 1e9) as writer:
            writer.save(step / "params", model.params, save_args=_chunked(model.params))
        meta = {"model": model.cfg.__dict__, "step": 0, **model.lineage, "sealed": True}
        meta["tokenizer"] = model.tokenizer.digest
        (step / "meta" / "metadata").write_text(json.dumps(meta))
        storage.seal(step)
        model.tokenizer.save(temporary)


def read_stored(folder: epath.Path, like: Params, dtype: str) -> Params:
    """The parameters that Orbax saved in `folder` (`STEP/params`), cast to `dtype` on the way.

    Orbax's own restore holds packed bytes and an unpacked copy next to each array, so every leaf is
    opened as a TensorStore array (Zarr in OCDBT) and read a few chunks at a time into its memory.
    """
    leaves: Any = traverse_util.flatten_dict(like, sep="/")
    arrays = {path: _read_array(folder, path, leaf, dtype) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _read_array(folder: epath.Path, path: str, leaf: Any, dtype: str) -> jax.Array:
    base = f"{folder}/" if storage.is_remote(folder) else {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
    spec = {"driver": "zarr", "kvstore": store | {"cache_pool": "cache_pool#index"}}
    try:
        stored = tensorstore.open(spec, open=True, read=True, context=_CONTEXT).result()
        array = tensorstore.cast(stored, dtype)
    except ValueError as error:
        raise ValueError(f"{folder} holds no array {path} that can be read: {error}") from error
    if tuple(array.shape) != leaf.shape:
        raise ValueError(f"{path} in {folder} is {array.shape}, expected {leaf.shape}")
    chunks: Any = array.chunk_layout.read_chunk.shape
    axis = int(np.argmax(np.divide(array.shape, chunks)))  # along which most chunks lie
    step = chunks[axis]

    def read(part: tuple[slice, ...]) -> np.ndarray:
        out = aligned_empty(tuple(s.stop - s.start for s in part), np.dtype(dtype))
        first, last = part[axis].start, part[axis].stop
        source, target = list(part), [slice(None)] * out.ndim
        for corner in range(first // step * step, last, step):
            low, high = max(corner, first), min(corner + step, last)
            source[axis], target[axis] = slice(low, high), slice(low - first, high - first)
            stored = array[tuple(source)][tensorstore.d[:].translate_to[0]]
            tensorstore.array(out[tuple(target)]).write(stored).result()
        return out

    return from_parts(leaf.shape, leaf.sharding, read)
