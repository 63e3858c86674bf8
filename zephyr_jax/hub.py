"""The Hugging Face hub through its own client: downloads, retries, and errors in one line.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
Where the hub cannot be reached, a complete copy in the client's cache serves, with a warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from absl import logging
from httpx2 import TransportError
from huggingface_hub import HfApi, constants, get_cached_repo_tree
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from zephyr_jax._version import __version__

TRIES = 5
WAIT = 1.0  # seconds before the second try; twice as long before each further one
LOGIN = "log in (hf auth login, or a token in the variable HF_TOKEN)"
# What the client raises; HfHubHTTPError and a missing token are OSErrors.
ERRORS = (
    OSError,
    TransportError,
    HFValidationError,
    RevisionResolutionError,
    XetDownloadError,
)
_T = TypeVar("_T")


def api() -> HfApi:
    """The client, which names this library to the hub."""
    return HfApi(library_name="zephyr_jax", library_version=__version__)


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Hub id and revision of `org/name@REVISION`, or the separate revision.

    Raises:
        ValueError: if both revisions are set and differ, or nothing follows the `@`.
    """
    base, at, tail = name.partition("@")
    if at and not tail:
        raise ValueError(f"{name} ends in @; a branch, a tag or a commit has to follow")
    if tail and revision and tail != revision:
        raise ValueError(f"{name} names one revision, {revision} is another; give one of them")
    return base, tail or revision


def fetch(name: str, revision: str | None, files: Sequence[str], repo_type: str = "model") -> Path:
    """The folder in the client's cache that holds files of a repository; its name is the commit.

    Args:
        name: hub id.
        revision: branch, tag or commit; None: the main branch.
        files: their paths or patterns; the cache keeps what it has of them.
        repo_type: "model" or "dataset".

    Raises:
        FileNotFoundError: if there is no such repository or revision, this account may not read
            it, or a file can neither be downloaded nor found in the cache.
    """

    def request() -> str:
        commit = api().resolve_revision(name, revision=revision, repo_type=repo_type)
        return api().snapshot_download(
            name, revision=commit, repo_type=repo_type, allow_patterns=list(files)
        )

    try:
        return Path(retried(request))
    except ERRORS as error:
        raise FileNotFoundError(_explanation(name, revision, _cause(error), repo_type)) from error


def listed_files(name: str, commit: str, repo_type: str = "model") -> list[str]:
    """The sorted paths of all files of a repository of which `fetch` has fetched some."""
    tree = get_cached_repo_tree(name, revision=commit, repo_type=repo_type)
    return sorted(file.path for file in tree)


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
    while isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)) and error.__cause__:
        error = error.__cause__
    return error


def _is_transient(error: BaseException) -> bool:
    """Whether the network or the hub's health is at fault, not the request."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)):
        return False
    return not isinstance(error, OSError) or error.errno is None  # not a full disk


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind if it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message.split(" For more information check:")[0]  # a page about HTTP status codes


def _explanation(name: str, revision: str | None, error: BaseException, repo_type: str) -> str:
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    kind = "data set" if repo_type == "dataset" else repo_type
    page = f"{hub}/datasets/{name}" if repo_type == "dataset" else f"{hub}/{name}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision} at {hub}; name a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its license at {page}, then {LOGIN}"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return (
            f"{name} is not a {kind}: neither a folder here nor visible to this account at {hub}; "
            f"check the spelling or, if it is private, {LOGIN}"
        )
    if status in (401, 403):
        return f"{hub} refuses {name}: {LOGIN}, and accept its license at {page} if it asks"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name} is not complete in {cache}, and HF_HUB_OFFLINE is set; unset it, or "
            "download first"
        )
    return (
        f"{name} could not be downloaded from {hub} to {cache}: {one_line(error)}; the same "
        "command fetches only the files that are still missing"
    )
