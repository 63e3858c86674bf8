"""Checkpoints of a run, and loading a model from wherever one lies. Nobody else imports Orbax.

A workdir holds `checkpoints/STEP/{params,opt_state,meta}`, a checksum file for each step (Orbax
restores a flipped bit without a word) and the tokenizer. An imported model has the same shape, with
step 0 and parameters only.
"""

from __future__ import annotations

import functools
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
from zephyr_jax.models.mistral import abstract_params
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
        self._root, self._keep = Path(workdir).absolute(), keep
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._root / _FOLDER,
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
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(_named_leaves(state.opt_state)),
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
        problems: dict[int, str] = {}
        for step in reversed(saved_steps(self._root)):
            problem = damage(self._root, step)
            if problem is None:
                for other, said in problems.items():
                    logging.warning(
                        "checkpoint of step %d is damaged and put aside: %s", other, said
                    )
                    if not jax.process_index():
                        _put_aside(self._root, other)
                return self._restore_step(step, like)
            problems[step] = problem
        if problems:
            raise ValueError(
                f"none of the checkpoints {sorted(problems)} in {self._root} is whole: "
                f"{'; '.join(problems.values())}; restore one from a copy, or begin anew elsewhere"
            )
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
        if "_manager" in self.__dict__:
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
    """What is wrong with a saved step, in words; None where every byte is as it was written.

    A step appears under its name only when all of it is written. Where the run was killed before
    it also wrote the checksums, they are made now.
    """
    path = root / _FOLDER / f"{step}.sums.json"
    if not path.is_file():
        logging.warning("checkpoint of step %d in %s has no checksums yet; making them", step, root)
        write_checksums(root, step)
        return None
    try:
        wanted = json.loads(path.read_text())
    except ValueError:
        return f"{path} is not JSON"
    found = _sums(root / _FOLDER / str(step))
    for name in sorted(wanted):
        if found.get(name) != wanted[name]:
            return f"file {step}/{name} is {'changed' if name in found else 'missing'}"
    return None


def saved_steps(root: Path) -> list[int]:
    """The steps that lie under a workdir, oldest first."""
    folder = root / _FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _put_aside(root: Path, step: int) -> None:
    (root / "damaged").mkdir(exist_ok=True)
    for name in (str(step), f"{step}.sums.json"):
        target = root / "damaged" / name
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
        (root / _FOLDER / name).rename(target)


class Model(NamedTuple):
    """A model to run: its architecture, parameters, tokenizer, and where they came from."""

    cfg: MistralConfig
    params: Params
    tokenizer: Tokenizer
    lineage: dict[str, Any]  # the saved meta: step, config, digests, and lines of `lineage`


def load_model(source: str | Path, tokenizer: str = "") -> Model:
    """The model in a workdir, a step's folder, a Hugging Face folder, or at a hub id.

    Parameters are float32, placed on the ambient mesh. Of a workdir the newest whole step counts.

    Raises:
        FileNotFoundError: if `source` is nothing of that kind.
        ValueError: if what is there is damaged.
    """
    folder = resolve(source)
    tok = find_tokenizer(tokenizer or folder)
    if folder.parent.name == _FOLDER:
        root, steps = folder.parents[1], [int(folder.name)]
    else:
        root, steps = folder, saved_steps(folder)
    if not steps:
        cfg, params = load_hf(folder)
        return Model(cfg, params, tok, {"lineage": [f"ported from {source}"]})
    for step in reversed(steps):
        if damage(root, step) is None:
            return _load_step(root, step, tok)
    raise ValueError(f"{source} has no whole checkpoint (steps {steps}); run the stage again")


def resolve(source: str | Path) -> Path:
    """The local folder of a model: the source itself, or the download of a hub id.

    Raises:
        FileNotFoundError: if there is no such folder, and no such model on the hub.
    """
    folder = Path(source)
    if folder.is_dir():
        if (
            saved_steps(folder)
            or (folder / "config.json").is_file()
            or folder.parent.name == _FOLDER
        ):
            return folder
        raise FileNotFoundError(f"{folder} holds no model (checkpoints/ or config.json)")
    name = str(source)
    said = (
        f"{name} is not a model: expected a workdir, a checkpoint, a Hugging Face folder, or a hub "
        f"id such as mistralai/Mistral-7B-v0.1"
    )
    if name.count("/") != 1 or name.startswith((".", "/", "runs/")):
        raise FileNotFoundError(said)
    from huggingface_hub import snapshot_download  # only where the hub is asked

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{said}; the hub answered: {error}") from error


def find_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at a `tokenizer.model`, in a folder that holds one, or of a model's folder."""
    path = Path(path)
    if path.parent.name == _FOLDER:
        path = path.parents[1]
    return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)


def _load_step(root: Path, step: int, tok: Tokenizer) -> Model:
    folder = (root / _FOLDER / str(step)).absolute()
    meta = json.loads((folder / "meta" / "metadata").read_text())
    cfg = MistralConfig(**meta["model"])
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / "params", abstract_params(cfg))
    if meta["step"] < meta.get("total_steps", 0):
        logging.warning("%s stopped at step %d of %d", root, meta["step"], meta["total_steps"])
    return Model(cfg, params, tok, {k: v for k, v in meta.items() if k != "model"})


def save_model(model: Model, folder: str | Path) -> None:
    """Writes a model as step 0 of a new checkpoint folder, which appears when it is whole.

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
    model.tokenizer.save(temporary)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)
