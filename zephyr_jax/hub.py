"""The Hugging Face hub through its own client: downloads, retries, and errors in one line.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
Where the hub cannot be reached, a complete copy in the client's cache serves, with a warning.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from absl import logging
from httpx2 import TransportError
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree
from huggingface_hub.utils.sha import git_hash

from zephyr_jax._version import __version__
from zephyr_jax.storage import file_info

TRIES = 5
WAIT = 1.0  # seconds before the second try; twice as long before each further one
LOGIN = "log in (hf auth login, or a token in the variable HF_TOKEN)"
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIXES = (".json", ".jsonl", ".gz", ".zst", ".parquet", ".csv", ".tsv", ".txt", ".arrow")
_SUFFIXES += (".gguf", ".safetensors", ".model", ".bin", ".pt", ".py")
# What the client raises; HfHubHTTPError and a missing token are OSErrors.
ERRORS = (OSError, TransportError, errors.HFValidationError)
ERRORS += (errors.RevisionResolutionError, errors.XetDownloadError)
_LFS = 1 << 28  # bytes from which on the hub has no file in Git itself
_T = TypeVar("_T")


def api() -> HfApi:
    """The client, which names this library to the hub."""
    return HfApi(library_name="zephyr_jax", library_version=__version__)


def split_name(name: str) -> tuple[str, str | None]:
    """Hub id and revision of `org/name@REVISION`."""
    base, at, revision = name.partition("@")
    if at and not revision:
        raise ValueError(f"{name} ends in @; a branch, a tag or a commit has to follow")
    return base, revision or None


def check_name(name: str, problem: str) -> None:
    """Refuses a name that is nothing here and reads as a mistyped path rather than as a hub id.

    The FileNotFoundError begins with `problem`. org/name@REVISION always means the hub.
    """
    path, _, revision = name.partition("@")
    organization, why = path.partition("/")[0], ""
    if not ID.fullmatch(path):
        why = "it does not read as org/name"
    elif not revision and path.lower().endswith(_SUFFIXES):
        why = "it ends as the name of a file"
    elif not revision and (os.path.isdir(organization) or organization in ("data", "runs")):
        why = f"{organization}/ reads as a folder; write {path}@main to mean the hub"
    if why:
        folder, last = os.path.split(os.path.expanduser(path))
        names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        near = [os.path.join(folder, x) for x in get_close_matches(last, names, cutoff=0.5)]
        advice = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"{problem}{advice} (The hub was not asked: {why}.)")


def fetch(
    name: str, revision: str | None, files: Sequence[str], repo_type: str = "model"
) -> tuple[Path, list[str]]:
    """The folder in the client's cache that holds files of a repository, and the paths of all.

    The folder's name is the commit. `files` are paths or patterns; `revision` None is the main
    branch. A FileNotFoundError says what cannot be read, and what to do.
    """

    def request() -> str:
        commit = api().resolve_revision(name, revision=revision, repo_type=repo_type)
        return api().snapshot_download(
            name, revision=commit, repo_type=repo_type, allow_patterns=list(files)
        )

    try:
        folder = Path(retried(request))
        tree = get_cached_repo_tree(name, revision=folder.name, repo_type=repo_type)
    except ERRORS as error:
        raise FileNotFoundError(_explanation(name, revision, _cause(error), repo_type)) from error
    there = {folder / file.path: file.blob_id for file in tree if (folder / file.path).is_file()}
    with ThreadPoolExecutor() as pool:
        list(pool.map(_check_same, there, there.values()))
    return folder, sorted(file.path for file in tree)


def _check_same(path: Path, blob_id: str) -> None:
    """Raises a ValueError unless a file is what Git's id of it, or of its LFS pointer, says."""
    info = file_info(path, "sha256")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {bytes}\n"
    if blob_id == git_hash(pointer.format_map(info).encode()):
        return
    if info["bytes"] >= _LFS or blob_id != git_hash(path.read_bytes()):
        hint = "remove it, and the same command fetches it again"
        raise ValueError(f"{path} is not what {constants.ENDPOINT} has: {hint}")


def check_login(name: str) -> None:
    """Raises a ValueError unless `name` can be a repository, and the hub knows the login."""
    if name.count("/") != 1 or "@" in name or name.startswith((".", "/")) or name.endswith("/"):
        raise ValueError(f"{name!r} cannot be pushed to; name it org/name or user/name")
    try:
        retried(api().whoami)
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"a push to {name} needs an account: {LOGIN}") from error
    except ERRORS as error:
        raise ValueError(f"{constants.ENDPOINT} refuses the login: {one_line(error)}") from error


def push(path: Path, name: str, *, private: bool = True) -> str:
    """Uploads an export, a folder or a file, in one commit; returns the address of its page.

    A missing repository is created, `private` or not. Weights of an earlier export that this one
    lacks are deleted; other files stay. If the upload fails (a ValueError), nothing of it shows.
    """
    options: dict[str, Any] = {"commit_message": f"Export by zephyr_jax {__version__}"}
    if any(path.glob("model*.safetensors")):  # those that are not uploaded again
        options["delete_patterns"] = ["*.safetensors", "model.safetensors.index.json"]

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


def retried(request: Callable[[], _T]) -> _T:
    """The answer to a request, repeated while the network or the hub fails."""
    for attempt in range(TRIES - 1):
        try:
            return request()
        except ERRORS as error:
            if not _is_transient(_cause(error)):
                raise
            seconds = WAIT * 2**attempt
            logging.warning("the hub: %s; trying again in %.0f s", one_line(error), seconds)
            time.sleep(seconds)
    return request()


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain that ends in "the cache does not have it either"."""
    wrappers = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    while isinstance(error, wrappers) and error.__cause__:
        error = error.__cause__
    return error


def _is_transient(error: BaseException) -> bool:
    """Whether the network or the hub's health is at fault, not the request."""
    if status := _status(error):
        return status in (408, 429) or status >= 500
    permanent = errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError
    if isinstance(error, (*permanent, errors.HFValidationError)):
        return False
    return not isinstance(error, OSError) or error.errno is None  # not a full disk


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind if it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message.split(" For more information check:")[0]  # a page about HTTP status codes


def _explanation(name: str, revision: str | None, error: BaseException, repo_type: str) -> str:
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision} at {hub}; name a branch, a tag or a commit"
    # A gated repository is a RepositoryNotFoundError to the client.
    if isinstance(error, errors.GatedRepoError) or _status(error) == 403:
        page = f"datasets/{name}" if repo_type == "dataset" else name
        return f"{hub} refuses {name}: accept its license at {hub}/{page}, then {LOGIN}"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (
            f"{name} is not a {repo_type}: neither a folder here nor visible to this account at "
            f"{hub}; check the spelling or, if it is private, {LOGIN}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name} is no folder here and is not complete in {cache}; unset HF_HUB_OFFLINE"
    return (
        f"{name} is no folder here and could not be downloaded from {hub} to {cache}: "
        f"{one_line(error)}; the same command fetches only the files that are still missing"
    )


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
