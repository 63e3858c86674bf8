"""Where a run's files lie: a folder of this machine, or a URL such as gs://bucket/runs/sft.

All go through etils.epath, which needs gcsfs for gs://. On a disk a file is written beside its
name and renamed; in a bucket an object appears when it is whole, and nothing can be appended.
"""

from __future__ import annotations

import os

from etils import epath


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """The path from the root, without regard to links; a URL is one already."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def write_whole(path: epath.Path, content: str | bytes) -> epath.Path:
    """Writes a file that appears under its name when it is whole; its path."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(data)
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def files_below(folder: epath.Path) -> list[epath.Path]:
    """Every file in a folder and in those below it, in the order of their names."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found += files_below(path) if path.is_dir() else [path]
    return found
