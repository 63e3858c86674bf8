"""Models from and to the Hugging Face hub, through its own client, huggingface_hub.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean there. On several
machines every process downloads for itself, into its own cache; processes that share a cache wait
for each other, file by file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from absl import logging
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from zephyr_jax._version import __version__
from zephyr_jax.hub import (
    LOGIN,
    TRIES,
    NetworkError,
    cause_of,
    explained,
    fetch,
    is_passing,
    one_line,
    patiently,
    split_name,
)
from zephyr_jax.weights.safetensors import INDEX, SINGLE, SafetensorsReader, no_weights, read_index

# What is read of a repository beside its weights. Pickles, other precisions and other formats of
# the same weights stay where they are.
_SMALL = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", INDEX)
_SMALL += ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def _api() -> HfApi:
    return HfApi(library_name="zephyr_jax", library_version=__version__)


def download(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder in the client's cache that holds a model; the folder's name is the commit.

    Only configuration, tokenizer and safetensors are fetched, and of these only what the cache
    lacks. Where the hub cannot be reached, a whole copy in the cache serves, and the log says so.

    Args:
        name: hub id, which may end in `@REVISION`.
        revision: branch, tag or commit; None: the main branch.
        weights: False leaves them where they are.

    Raises:
        FileNotFoundError: if there is no such model or revision, this account may not read it, it
            has no safetensors, or it can neither be fetched nor found in the cache.
        ValueError: if two revisions are named.
    """
    name, revision = split_name(name, revision)
    cached = None
    try:
        cached = _cached(name, revision, weights)
        if cached is not None and cached.name == revision:  # what a commit holds never changes
            return cached
        return _download(name, revision, weights, 1 if cached else TRIES)
    except (NetworkError, OSError, HFValidationError) as error:
        cause = cause_of(error)
        if cached is None or not is_passing(cause):
            raise explained(name, revision, cause) from error
    logging.warning(
        "%s cannot be reached (%s); %s at %s is taken from the cache",
        constants.ENDPOINT,
        one_line(cause),
        name,
        cached.name,
    )
    return cached


def _cached(name: str, revision: str | None, weights: bool) -> Path | None:
    """The folder of a revision where the cache has all of it."""
    try:
        config = hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
        if weights:
            SafetensorsReader(Path(config).parent).close()  # they come last: all else is there too
    except HFValidationError:
        raise
    except (FileNotFoundError, ValueError):
        return None
    return Path(config).parent


def _download(name: str, revision: str | None, weights: bool, tries: int) -> Path:
    ask = functools.partial(_api().model_info, name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    info = patiently(functools.partial(ask, revision=revision), tries)
    listed = {file.rfilename for file in info.siblings or ()}
    if not listed & {SINGLE, INDEX}:
        raise no_weights(name, listed)
    if "config.json" not in listed:
        raise FileNotFoundError(f"{name} holds no config.json, so it is no model to load")

    def get(file: str, at: str | None) -> Path:
        return Path(patiently(lambda: hf_hub_download(name, file, revision=at), tries))

    folder = get("config.json", revision).parent  # the cache notes which commit the branch is
    for file in _SMALL:
        if file in listed:
            get(file, folder.name)
    if not weights:
        return folder
    files = [SINGLE]  # preferred to an index beside it, as by the reader
    if SINGLE not in listed:
        files = sorted(set(read_index(folder).values()))
    if lost := sorted(set(files) - listed):
        raise FileNotFoundError(f"{name} lacks {', '.join(lost)}, which its {INDEX} names")
    fetch(name, folder.name, files, tries)
    for file in files:
        get(file, folder.name)
    logging.info("%s at %s is in %s", name, folder.name, folder)
    return folder


def check_login(name: str) -> None:
    """Makes sure, before any work is done, that an export can be pushed to `org/name`.

    Raises:
        ValueError: if the name is none, nobody is logged in, or the token may not write there.
    """
    if name.count("/") != 1 or "@" in name or name.startswith((".", "/")) or name.endswith("/"):
        raise ValueError(f"{name!r} cannot be pushed to; name it org/name or user/name")
    try:
        me = patiently(_api().whoami)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"a push to {name} needs an account: {LOGIN}") from error
    except (NetworkError, OSError) as error:
        raise ValueError(
            f"{constants.ENDPOINT} does not accept the login: {one_line(error)}"
        ) from error
    token: dict[str, Any] = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError(
            f"the token of {me['name']} may only read; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens"
        )
    places = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    if token.get("role") == "write" and name.split("/")[0] not in places:
        raise ValueError(f"{me['name']} cannot push to {name}, only to {', '.join(places)}")


def push(path: Path, name: str, *, private: bool = True) -> str:
    """Uploads a folder, or a file, as one commit; the page's address.

    The repository is made where there is none. Of an earlier export weights that are not in this
    one are deleted; other files stay.

    Args:
        path: what `export_hf` or `export_gguf` wrote.
        name: hub id.
        private: of a repository that is made now.

    Raises:
        ValueError: if the upload fails; nothing of it is then to be seen in the repository.
    """
    api = _api()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    new = {file.relative_to(root).as_posix(): file for file in files}

    def upload() -> None:
        api.create_repo(name, private=private, exist_ok=True)
        weights = {f for f in api.list_repo_files(name) if f.endswith(".safetensors") or f == INDEX}
        stale = sorted(weights - set(new)) if new.keys() & {SINGLE, INDEX} else []
        operations: list[Any] = [CommitOperationAdd(at, str(file)) for at, file in new.items()]
        operations += [CommitOperationDelete(file) for file in stale]
        said = f"Export by zephyr_jax {__version__}"
        api.create_commit(name, operations, commit_message=said)

    try:
        patiently(upload)
    except (NetworkError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        raise ValueError(
            f"{path} is whole, but its upload to {name} failed: {one_line(cause or error)}; "
            f"`hf upload {name} {path}` repeats the upload alone"
        ) from error
    return f"{constants.ENDPOINT}/{name}"
