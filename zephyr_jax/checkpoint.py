"""Checkpoints of a run, and loading a model from wherever one lies. Nobody else imports Orbax.

A workdir holds `checkpoints/STEP/{params,opt_state,meta}`, a checksum file for each step (Orbax
restores a flipped bit without a word) and the tokenizer. An imported model has the same shape, with
step 0 and parameters only.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from zephyr_jax.config import MistralConfig
from zephyr_jax.data.tokenizer import Tokenizer
from zephyr_jax.interop.huggingface import load_hf
from zephyr_jax.models.mistral import param_shapes, param_shardings
from zephyr_jax.types import Params, TrainState

_FOLDER = "checkpoints"


def _named_leaves(tree: Any) -> dict[str, Any]:
    """A tree of any node types as a flat dict, which outlives the types of optax."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpointer:
    """Saves a run's states without blocking it, and restores the newest whole one."""

    def __init__(self, workdir: str | Path, keep: int):
        self._root = Path(workdir).absolute()
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._manager = ocp.CheckpointManager(
            self._root / _FOLDER,
            item_names=("params", "opt_state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep)]),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(timeout_secs=3600),
            ),
        )

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to save; `meta` is JSON (config, digests, data position)."""
        step = int(state.step)
        self._wait()
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(_named_leaves(state.opt_state)),
            meta=ocp.args.JsonSave(meta | {"step": step}),
        )
        self._manager.save(step, args=args, force=True)
        self._pending = self._background.submit(self._finish, step)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state with its meta, placed as `like`; None where nothing was saved.

        Raises:
            ValueError: if states were saved, but none of them is whole.
        """
        steps, problem = sorted(self._manager.all_steps(), reverse=True), None
        for step in steps:
            problem = damage(self._root, step)
            if problem is None:
                return self._restore_step(step, like)
            logging.warning(
                "checkpoint of step %d is damaged (%s); trying an older one", step, problem
            )
            self._manager.delete(step)
        if steps:
            raise ValueError(f"none of the checkpoints {steps} in {self._root} is whole; {problem}")
        return None

    def _restore_step(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        opt_state = _named_leaves(like.opt_state)
        got = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(like.params)),
                opt_state=ocp.args.StandardRestore(_abstract(opt_state)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        treedef = jax.tree.structure(like.opt_state)
        leaves = [got["opt_state"][name] for name in opt_state]
        number = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        return TrainState(number, got["params"], jax.tree.unflatten(treedef, leaves)), got["meta"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._wait()
        self._background.shutdown()
        self._manager.close()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()  # raises what went wrong in the background

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        folder = self._root / _FOLDER
        write_checksums(self._root, step)
        for path in folder.glob("*.sums.json"):
            if not (folder / path.name.split(".")[0]).is_dir():
                path.unlink()


def _sums(folder: Path) -> dict[str, list[int]]:
    def one(path: Path) -> tuple[str, list[int]]:
        crc, size = 0, 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
        return str(path.relative_to(folder)), [size, crc]

    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, files))


def write_checksums(root: Path, step: int) -> None:
    """Writes size and CRC-32 of every file of a finished step beside it."""
    path = root / _FOLDER / f"{step}.sums.json"
    path.with_suffix(".tmp").write_text(json.dumps(_sums(root / _FOLDER / str(step))))
    os.replace(path.with_suffix(".tmp"), path)


def damage(root: Path, step: int) -> str | None:
    """What is wrong with a saved step, in words; None where every byte is as it was written."""
    path = root / _FOLDER / f"{step}.sums.json"
    if not path.is_file():
        return f"{path} is missing: the step was not finished"
    try:
        wanted = json.loads(path.read_text())
    except ValueError:
        return f"{path} is not JSON"
    found = _sums(root / _FOLDER / str(step))
    for name in sorted(set(wanted) | set(found)):
        if found.get(name) != wanted.get(name):
            kind = "missing" if name not in found else "changed" if name in wanted else "unexpected"
            return f"file {step}/{name} is {kind}"
    return None


class Model(NamedTuple):
    """A model to run: its architecture, parameters, tokenizer, and where they came from."""

    cfg: MistralConfig
    params: Params
    tokenizer: Tokenizer | None
    lineage: dict[str, Any]


def load_model(source: str | Path, tokenizer: str = "") -> Model:
    """The model in a workdir, a step's folder, a Hugging Face folder, or at a hub id.

    Parameters are float32, placed on the ambient mesh. Of a workdir the newest whole step counts.

    Raises:
        FileNotFoundError: if `source` is nothing of that kind.
        ValueError: if what is there is damaged.
    """
    folder = Path(source)
    tok = find_tokenizer(tokenizer) if tokenizer else None
    if (folder / _FOLDER).is_dir():
        steps = sorted(int(p.name) for p in (folder / _FOLDER).iterdir() if p.name.isdigit())
        for step in reversed(steps):
            if damage(folder, step) is None:
                return _load_step(folder, step, tok)
        raise ValueError(f"{folder} has no whole checkpoint (steps {steps}): run the stage again")
    if folder.name.isdigit() and folder.parent.name == _FOLDER:
        problem = damage(folder.parents[1], int(folder.name))
        if problem:
            raise ValueError(f"{folder} is damaged: {problem}")
        return _load_step(folder.parents[1], int(folder.name), tok)
    if not (folder / "config.json").is_file():
        folder = _from_hub(str(source))
    cfg, params = load_hf(folder)
    return Model(cfg, params, tok or find_tokenizer(folder), {"source": str(source)})


def find_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at a `tokenizer.model` or in a folder that holds one."""
    path = Path(path)
    return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)


def _from_hub(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(
            f"{name} is not a model: expected a workdir or import (with checkpoints/), a Hugging "
            f"Face folder (with config.json), or a hub id such as mistralai/Mistral-7B-v0.1"
        )
    from huggingface_hub import snapshot_download  # only where the hub is asked

    return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))


def _load_step(root: Path, step: int, tok: Tokenizer | None) -> Model:
    folder = (root / _FOLDER / str(step)).absolute()
    meta = json.loads((folder / "meta" / "metadata").read_text())
    cfg = MistralConfig(**meta["model"])
    shardings = param_shardings(cfg)
    like = {
        path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(cfg).items()
    }
    abstract = _nest(like)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / "params", abstract)
    lineage = {k: v for k, v in meta.items() if k != "model"} | {"source": str(root)}
    return Model(cfg, params, tok or find_tokenizer(root), lineage)


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model as step 0 of a new checkpoint folder; nothing is left where it fails.

    Raises:
        FileExistsError: if the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; choose another or remove it")
    temporary = folder.with_name(folder.name + ".tmp").absolute()
    shutil.rmtree(temporary, ignore_errors=True)
    step = temporary / _FOLDER / "0"
    step.mkdir(parents=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", model.params)
    (step / "meta").mkdir()
    meta = {"model": model.cfg.__dict__, "step": 0} | model.lineage
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    write_checksums(temporary, 0)
    if model.tokenizer:
        model.tokenizer.save(temporary)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)
