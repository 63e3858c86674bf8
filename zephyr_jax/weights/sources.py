"""Finding a model or a tokenizer by its name: on disk, at a URL, or on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from etils import epath

from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.storage import is_remote
from zephyr_jax.weights.checksums import FOLDER, saved_steps
from zephyr_jax.weights.safetensors import ADAPTER_CONFIG, no_weights


def resolve(
    source: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
) -> Path | epath.Path:
    """The folder (or GGUF file) of a model: the source itself, or the download of a hub id.

    It is on this machine, except for a run's at a URL, which is an `epath.Path`.

    Args:
        source: as of `load_model`.
        revision: branch, tag or commit of a hub id.
        weights: False: all files but the weights are downloaded.

    Raises:
        FileNotFoundError: if there is no such folder, and no such model on the hub.
        ValueError: if a revision is given for something other than a hub id, or two of them.
    """
    if is_remote(source):
        remote = epath.Path(source)
        if remote.parent.name == FOLDER or saved_steps(remote):
            return remote
        raise FileNotFoundError(
            f"{remote} holds no checkpoints of a run; other models are read from disks: copy it "
            "here, as by gcloud storage rsync --recursive"
        )
    folder = Path(source)
    if revision and folder.exists():
        raise ValueError(f"revision {revision} belongs to a hub id; {source} is here on disk")
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if folder.is_dir():
        if folder.parent.name == FOLDER or saved_steps(epath.Path(folder)):
            return folder
        if (folder / "config.json").is_file():
            return folder
        if (folder / ADAPTER_CONFIG).is_file():
            raise no_weights(folder, [ADAPTER_CONFIG])
        raise FileNotFoundError(f"{folder} holds no model (checkpoints/ or config.json)")
    name = str(source)
    if name.split("@")[0].count("/") != 1 or name.startswith((".", "/", "~", "runs/")):
        raise FileNotFoundError(
            f"{name} is not a model: expected a workdir, a checkpoint, a Hugging Face folder, a "
            "GGUF file, or a hub id such as mistralai/Mistral-7B-v0.1"
        )
    from zephyr_jax.weights.hub import download  # only where the hub is needed

    return download(name, revision, weights=weights)


def find_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file (a GGUF file too), in a folder that holds one, or of a model's."""
    path = epath.Path(path)
    if path.suffix == ".gguf" and path.is_file():
        from zephyr_jax.weights.gguf_io import GgufReader  # only where the extra is needed
        from zephyr_jax.weights.gguf_tokenizer import read_tokenizer

        return read_tokenizer(GgufReader(Path(path)))
    if path.parent.name == FOLDER:
        path = path.parents[1]
    return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)
