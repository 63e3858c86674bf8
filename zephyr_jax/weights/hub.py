"""Models from and to the Hugging Face hub; processes that share a cache wait for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import logging
from huggingface_hub import constants
from huggingface_hub.errors import LocalTokenNotFoundError

from zephyr_jax._version import __version__
from zephyr_jax.hub import ERRORS, LOGIN, api, fetch, listed_files, one_line, retried, split_name
from zephyr_jax.weights.safetensors import INDEX, SINGLE, no_weights, read_index

# Files read in addition to the weights. Pickles, other precisions and other formats of the same
# weights stay on the hub.
_SMALL = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", INDEX)
_SMALL += ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def download(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder in the client's cache that holds a model; the folder's name is the commit.

    Only configuration, tokenizer and (with `weights`) safetensors are fetched, and of these only
    what the cache lacks. A FileNotFoundError is as of `fetch`, or names what is no model.
    """
    name, revision = split_name(name, revision)
    folder = fetch(name, revision, _SMALL)
    listed = listed_files(name, folder.name)
    if SINGLE not in listed and INDEX not in listed:
        raise no_weights(name, listed)
    if "config.json" not in listed:
        raise FileNotFoundError(f"{name} is not a model: it lacks a config.json")
    if not weights:
        return folder
    files = [SINGLE]  # preferred to an index, as by the reader
    if SINGLE not in listed:
        files = sorted(set(read_index(folder).values()))
    logging.info("%s at %s is in %s", name, folder.name, folder)
    return fetch(name, folder.name, files)


def check_login(name: str) -> None:
    """Raises a ValueError unless `name` can be a repository, and the hub knows the login."""
    if name.count("/") != 1 or "@" in name or name.startswith((".", "/")) or name.endswith("/"):
        raise ValueError(f"{name!r} cannot be pushed to; name it org/name or user/name")
    try:
        retried(api().whoami)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"a push to {name} needs an account: {LOGIN}") from error
    except ERRORS as error:
        raise ValueError(
            f"{constants.ENDPOINT} does not accept the login: {one_line(error)}"
        ) from error


def push(path: Path, name: str, *, private: bool = True) -> str:
    """Uploads an export, a folder or a file, in one commit; returns the address of its page.

    A missing repository is created, `private` or not. Weights of an earlier export that this one
    lacks are deleted; other files stay. If the upload fails (a ValueError), nothing of it shows.
    """
    options: dict[str, Any] = {"commit_message": f"Export by zephyr_jax {__version__}"}
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        options["delete_patterns"] = ["*.safetensors", INDEX]  # those that are not uploaded again

    def upload() -> None:
        api().create_repo(name, private=private, exist_ok=True)
        if path.is_dir():
            api().upload_folder(repo_id=name, folder_path=path, **options)
        else:
            api().upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name, **options)

    try:
        retried(upload)
    except (*ERRORS, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        raise ValueError(
            f"{path} is complete, but its upload to {name} failed: {one_line(cause or error)}; "
            f"`hf upload {name} {path}` repeats the upload alone"
        ) from error
    return f"{constants.ENDPOINT}/{name}"
