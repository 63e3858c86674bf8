"""What the digests of a large folder cost: sealing and verifying it, next to reading it once.

python benchmarks/verification.py --gb=10 [--folder=DIR]

The made-up folder has files of 512 MB, as a packed set. Before each measurement its pages are
dropped from the cache where the system allows it, so that all three read from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zephyr_jax.storage import seal, verify

_FILE, _BLOCK = 512 * 10**6, 1 << 22


def read(path: Path) -> None:
    """Reads a file once, by the block."""
    with path.open("rb", buffering=0) as file:
        while file.read(_BLOCK):
            pass


def measured(name: str, folder: Path, work: Callable[[], object]) -> None:
    """Prints wall-clock and processor seconds of the work, from the disk."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    began, used = time.monotonic(), time.process_time()
    work()
    seconds, used = time.monotonic() - began, time.process_time() - used
    sys.stdout.write(f"{name:<16}{seconds:8.2f} s{used:8.2f} s of processors\n")
    sys.stdout.flush()


def main() -> None:
    """Makes the folder, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--folder", help="where to make it (default: the temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        content = os.urandom(_FILE)
        for i in range(round(args.gb * 1e9 / _FILE)):
            (folder / f"{i:03d}.npy").write_bytes(content)
        paths = sorted(folder.iterdir())
        with ThreadPoolExecutor() as pool:
            measured("reading", folder, lambda: list(pool.map(read, paths)))
        measured("sealing", folder, lambda: seal(folder))
        measured("verifying", folder, lambda: verify(folder))
        measured("sizes alone", folder, lambda: verify(folder, contents=False))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
