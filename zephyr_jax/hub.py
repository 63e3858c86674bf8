"""Large files from the Hugging Face hub into its client's cache, in spite of a bad connection.

The client begins a file anew when its download was cut off. Weights are gigabytes, so they are
fetched here by ranges of bytes: an interrupted download goes on where it stopped, also days later.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

from absl import logging
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status
from tqdm import tqdm

from zephyr_jax._version import __version__

STREAMS = 4  # files that are fetched at once
LOGIN = "log in (hf auth login, or a token in the variable HF_TOKEN)"
TRIES = 5  # one after another that bring nothing
WAIT = 1.0  # seconds before the second try; twice as long before each further one
_Answer = TypeVar("_Answer")

# What goes wrong on the network: the base class in the HTTP library, whose name changes between
# versions of the client (httpx, httpx2).
NetworkError: type[Exception] = HfHubHTTPError.__bases__[0]


class _Blob(NamedTuple):
    """A file to fetch: where from, how long, and where the cache wants it."""

    url: str
    size: int
    path: Path  # its name is the ETag, which is the sha256 of weights
    lock: Path

    @property
    def partial(self) -> Path:
        """What has come so far."""
        return self.path.with_name(f"{self.path.name}.incomplete")


def fetch(
    name: str, commit: str, files: Iterable[str], tries: int, repo_type: str = "model"
) -> None:
    """Brings the content of files of a repository into the cache; the client has to link it there.

    Args:
        name: hub id.
        commit: in full.
        files: their paths in the repository.
        tries: of a question to the hub. Bytes are asked for TRIES times more after each progress.
        repo_type: "model" or "dataset".

    Raises:
        FileNotFoundError: if the disk has no room, or wrong bytes come twice.
        NetworkError: if nothing comes any more; what has come is kept.
    """
    found = [_locate(name, commit, file, tries, repo_type) for file in files]
    blobs = list({blob.path: blob for blob in found if blob and not blob.path.exists()}.values())
    if not blobs:
        return
    cache = blobs[0].path.parent
    for folder in (cache, blobs[0].lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    size, here = sum(b.size for b in blobs), sum(_size(b.partial) for b in blobs)
    if size - here > shutil.disk_usage(cache).free:
        raise FileNotFoundError(
            f"{name} needs {(size - here) / 1e9:.1f} GB, more than is free in {cache}; make room, "
            "or name another place in the variable HF_HUB_CACHE"
        )
    stop = threading.Event()
    with (
        tqdm(total=size, desc=name, unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        try:
            for done in as_completed([pool.submit(_fetch, blob, bar, stop) for blob in blobs]):
                done.result()
        finally:
            stop.set()  # one error ends all streams; what they brought stays for the next time


def _locate(name: str, commit: str, file: str, tries: int, repo_type: str) -> _Blob | None:
    """Where a file comes from and goes to; None where the client has it, or must fetch it."""
    if isinstance(try_to_load_from_cache(name, file, revision=commit, repo_type=repo_type), str):
        return None
    url = hf_hub_url(name, file, revision=commit, repo_type=repo_type)
    ask = functools.partial(get_hf_file_metadata, url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    about = patiently(ask, tries)
    if not about.size or not re.fullmatch(r"[\w-]+", about.etag or ""):
        return None
    cache, folder = Path(constants.HF_HUB_CACHE), f"{repo_type}s--{name.replace('/', '--')}"
    lock = cache / ".locks" / folder / f"{about.etag}.lock"
    return _Blob(url, about.size, cache / folder / "blobs" / str(about.etag), lock)


def _fetch(blob: _Blob, bar: tqdm, stop: threading.Event) -> None:
    """Fetches one file, going on from what an earlier try left, and checks its digest."""
    with WeakFileLock(blob.lock):
        for _ in range(2):
            if blob.path.exists():  # another process was here
                return
            _fill(blob, bar, stop)
            if stop.is_set():
                return
            if _digest_fits(blob):
                os.replace(blob.partial, blob.path)
                return
            logging.warning("%s has other bytes than the hub announced; once more", blob.url)
            bar.update(-_size(blob.partial))
            blob.partial.unlink()
    raise FileNotFoundError(f"{blob.url} came twice with other bytes than the hub announced")


def _fill(blob: _Blob, bar: tqdm, stop: threading.Event) -> None:
    """Appends to the partial file until it is as long as announced, however often it is cut."""
    if _size(blob.partial) > blob.size:
        blob.partial.unlink()
    bar.update(_size(blob.partial))
    fruitless = 0
    while (before := _size(blob.partial)) < blob.size and not stop.is_set():
        problem: Exception = FileNotFoundError(
            f"{blob.url} ends after {before:,} of its announced {blob.size:,} bytes; the same "
            f"command goes on once the hub has all of them"
        )
        try:
            _append(blob, before, bar, stop)
        except (NetworkError, OSError) as error:
            if not _beyond_the_end(error):
                if not is_passing(error):
                    raise
                problem = error
        after = _size(blob.partial)
        fruitless = 0 if after > before else fruitless + 1
        if fruitless == TRIES:
            raise problem
        if after < blob.size:
            _wait(problem, fruitless, stop)


def _beyond_the_end(error: Exception) -> bool:
    """Whether the server has no byte at the place that was asked for."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code == 416


def _append(blob: _Blob, start: int, bar: tqdm, stop: threading.Event) -> None:
    headers = build_hf_headers(library_name="zephyr_jax", library_version=__version__)
    headers |= {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # between two pieces, not for the whole
    with get_session().stream("GET", blob.url, headers=headers, timeout=timeout) as answer:
        hf_raise_for_status(answer)
        ranged = answer.status_code == 206
        if not ranged:  # the server sends the whole file
            bar.update(-start)
        with blob.partial.open("ab" if ranged else "wb") as file:
            for block in answer.iter_raw():
                file.write(block)
                bar.update(len(block))
                if stop.is_set():
                    return


def _digest_fits(blob: _Blob) -> bool:
    if not re.fullmatch("[0-9a-f]{64}", blob.path.name):
        return True  # a small file outside LFS, named by git
    with blob.partial.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.path.name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def patiently(ask: Callable[[], _Answer], tries: int = TRIES) -> _Answer:
    """The answer to `ask`, asked for again while the network or the hub stumbles."""
    for attempt in range(1, tries):
        try:
            return ask()
        except (NetworkError, OSError) as error:
            # Before the former the client has tried for itself; the latter does not pass.
            if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
                raise
            if not is_passing(error):
                raise
            _wait(error, attempt, threading.Event())
    return ask()


def _wait(error: Exception, attempt: int, stop: threading.Event) -> None:
    seconds = min(WAIT * 2 ** max(attempt - 1, 0), 30)
    logging.warning("the hub: %s; trying again in %.0f s", one_line(error), seconds)
    stop.wait(seconds)


def is_passing(error: BaseException) -> bool:
    """Whether the fault lies with the network or the hub's health, not with what was asked."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (NetworkError, OfflineModeIsEnabled, LocalEntryNotFoundError))


def one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said.split(" For more information check:")[0]  # a page on what HTTP statuses are


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Hub id and revision of `org/name@REVISION`, or the revision given beside it.

    Raises:
        ValueError: if both are given and differ, or nothing follows the `@`.
    """
    base, at, tail = name.partition("@")
    if at and not tail:
        raise ValueError(f"{name} ends in @; a branch, a tag or a commit has to follow")
    if tail and revision and tail != revision:
        raise ValueError(f"{name} names one revision, {revision} is another; give one of them")
    return base, tail or revision


def cause_of(error: BaseException) -> BaseException:
    """What caused the client to say that the cache has nothing either."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def explained(
    name: str, revision: str | None, error: BaseException, repo_type: str = "model"
) -> FileNotFoundError:
    """What to tell the user, in one line."""
    hub, what = constants.ENDPOINT, repo_type.replace("dataset", "data set")
    page = f"{hub}/{'datasets/' * (repo_type == 'dataset')}{name}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RevisionNotFoundError):
        said = f"{name} has no revision {revision} at {hub}; name a branch, a tag or a commit"
    elif isinstance(error, GatedRepoError):
        said = f"{name} is gated: accept its license at {page}, then {LOGIN}"
    elif isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        said = f"{name} is not a {what}: neither a folder here, nor one that {hub} shows to this "
        said += f"account; check the spelling or, where it is private, {LOGIN}"
    elif status == 404:
        said = f"{hub} lists a file of {name} that it does not serve ({one_line(error)}); try "
        said += "again later, or name another revision"
    elif status in (401, 403):
        said = f"{hub} refuses {name}: {LOGIN}, and accept its license at {page} if it asks"
    elif isinstance(error, OfflineModeIsEnabled):
        said = f"{name} could not be fetched: HF_HUB_OFFLINE is set and {name} is not whole in "
        said += f"{constants.HF_HUB_CACHE}; unset it, or download first"
    elif is_passing(error):
        said = f"{name} could not be fetched from {hub} ({one_line(error)}), and is not whole in "
        said += f"{constants.HF_HUB_CACHE}; the same command goes on from what has come"
    else:
        said = one_line(error)
    return FileNotFoundError(said)
