"""What is known of accelerators, by published figures and the compiler's own; and of this machine.

Peak FLOP/s, HBM bytes/s and link rates are those that Google Cloud publishes for each chip;
`usable_gib` is what libtpu says is there when a program does not fit. The compiler counts cycles;
with `clock_hz` the peak is reached when every cycle does a full matrix product.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import datetime
import functools
import glob
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from etils import epath
from filelock import FileLock

from zephyr_jax._version import __version__
from zephyr_jax.storage import absolute, file_info, read_checked, user_cache, write_checked

# Compiled programs on disk, of which JAX looks at all when it adds one; those not used for long go.
_KEPT_BYTES, _KEPT_PROGRAMS = 5 << 30, 1000
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # in /dev


class Chip(NamedTuple):
    """One generation. A device is what JAX counts: a chip, or half of one where `devices` is 2."""

    kind: str  # as JAX names its devices
    devices: int  # a chip
    peak_flops: float  # a device, bfloat16, FLOP/s
    hbm_rate: float  # a device, bytes/s
    usable_gib: float  # a device
    link_rate: float  # bytes/s, one link, one way
    ring: int  # chips along an axis from which on the axis is closed to a ring
    dcn_rate: float  # bytes/s, a device, between slices
    clock_hz: float
    options: dict[str, str]  # that the topology is asked for with
    compiler: dict[str, str]  # options of the compiler for a step (docs/speed.md: what each gives)
    keeps_hidden: bool = True  # reading an MLP's gate and up takes less time than computing them


_MEGACORE = {"chip_config_name": "megacore"}
# Transfers that run next to products, whatever made them.
_ASYNC = dict.fromkeys(
    (
        "xla_enable_async_all_gather",
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "xla_tpu_overlap_compute_collective_tc",
    ),
    "true",
)
# Vector memory for the operands of a product, KiB: most of the 128 MiB that v5e and v6e have, and
# of v5p's 64 MiB a core; v4 has no more than the default of 16.
_V5E = _ASYNC | {"xla_tpu_scoped_vmem_limit_kib": "98304"}
# Gradients of weights whole: as a ring of 16 steps they would read the larger operand 16 times. The
# sparse cores, which v5e lacks, add them up meanwhile.
_WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_ADDED = ("all_reduce", "reduce_scatter")
_WHOLE |= {f"xla_tpu_enable_async_collective_fusion_fuse_{name}": "false" for name in _ADDED}
_WHOLE |= {f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true" for name in _ADDED}
_V5P = _ASYNC | _WHOLE | {"xla_tpu_scoped_vmem_limit_kib": "50000"}
_V6E = _V5E | _WHOLE
CHIPS = {
    "v3": Chip("TPU v3", 2, 61.5e12, 450e9, 15.48, 70e9, 16, 3.1e9, 0.94e9, {}, {}),
    "v4": Chip("TPU v4", 1, 275e12, 1228e9, 30.75, 45e9, 4, 6.25e9, 1.05e9, _MEGACORE, {}),
    "v5e": Chip("TPU v5 lite", 1, 197e12, 819e9, 15.75, 45e9, 16, 3.125e9, 1.5e9, {}, _V5E),
    "v5p": Chip("TPU v5", 1, 459e12, 2765e9, 95.74, 90e9, 4, 6.25e9, 1.75e9, {}, _V5P),
    "v6e": Chip("TPU v6 lite", 1, 918e12, 1640e9, 31.25, 90e9, 16, 12.5e9, 1.75e9, {}, _V6E, False),
    "tpu7x": Chip("TPU7x", 2, 1153.5e12, 3690e9, 94.75, 100e9, 4, 12.5e9, 2.2e9, {}, {}),
}

# Part of a GPU's name -> peak FLOP/s, bfloat16 without sparsity
_GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a device of this kind, as JAX names it; None: not known here."""
    known = getattr(chip_of(kind), "peak_flops", None)
    return known or next((peak for part, peak in _GPUS.items() if part in kind), None)


def options_of(kind: str) -> dict[str, str]:
    """The compiler's options for a step on devices of this kind; none if it is not known here."""
    return dict(getattr(chip_of(kind), "compiler", {}))


def chip_of(kind: str) -> Chip | None:
    """The generation of devices of this kind, as JAX names it, if it is known here."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


@functools.cache
def keep_programs(shared: str | os.PathLike[str] = "") -> None:
    """Makes JAX keep compiled programs for later processes, which is logged.

    They go to the user's cache folder, or to `shared`, a folder or URL that all hosts of a run
    see, of which JAX lets the first write. JAX's settings come first: JAX_COMPILATION_CACHE_DIR
    names another place, and JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return
    folder = config.jax_compilation_cache_dir
    if not folder:
        folder = os.fspath(shared) or str(user_cache() / "programs")
        if not shared:
            try:
                _check_programs(Path(folder))
                atexit.register(_check_programs, Path(folder), at_end=True)
            except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
                logging.warning("compiled programs are not kept: %s", error)
                return
            config.update("jax_compilation_cache_max_size", _KEPT_BYTES)
        config.update("jax_compilation_cache_dir", folder)
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        reset_cache()  # after a first program without a folder JAX looks for none
    off = "JAX_ENABLE_COMPILATION_CACHE=false switches that off"
    logging.info("compiled programs are kept in %s (%s)", folder, off)


def keep_freed_memory() -> None:
    """Makes the C library (glibc) keep what is freed, where no accelerator is there to compute.

    Mapping and zeroing a step's buffers page by page again is a tenth to a sixth of its time on a
    CPU. It counts for threads that do not run yet.
    """
    there = any(glob.glob(f"/dev/{name}") for name in _ACCELERATORS)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option and (os.environ.get("JAX_PLATFORMS") == "cpu" or not there):
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # arenas, mappings, what is trimmed
            set_option(option, value)


def _check_programs(folder: Path, at_end: bool = False) -> None:
    """Creates the cache folder; removes old, damaged and torn programs (JAX fails over these)."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
        times = sorted(folder.glob("*-atime"), key=lambda path: path.stat().st_mtime)
        kept = {path.name.removesuffix("-atime") for path in times[-_KEPT_PROGRAMS:]}
        # Where zstandard is installed JAX packs them without a checksum, and runs damaged ones. So
        # each gets its digest when the process that made it ends.
        for path in folder.glob("*-cache"):
            stored = path.with_name(f"{path.name[:-5]}xxh3_128")
            if not stored.is_file():
                stored.write_text(file_info(path)["xxh3_128"])
            elif not at_end and stored.read_text() != file_info(path)["xxh3_128"]:
                logging.warning("%s is damaged, so the program is compiled again", path)
                kept.discard(path.name[:-6])
        for path in folder.glob("*-*"):
            if path.name.rpartition("-")[0] not in kept:
                path.unlink()


def record_start(path: epath.Path) -> None:
    """Adds this process's `environment` to the `starts` of a JSON file, one for each of a run's."""
    starts = read_checked(path, f"remove {path}")["starts"] if path.is_file() else []
    write_checked(path, {"starts": [*starts, environment()]})


def environment() -> dict[str, Any]:
    """When, where and with which code this process computes: plain values, for a run's report."""
    import jax

    kinds = collections.Counter(device.device_kind for device in jax.devices())
    versions = {"zephyr_jax": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "host": platform.node(),
        "processes": jax.process_count(),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "backend": jax.default_backend(),
        "compiler_options": options_of(jax.devices()[0].device_kind),
        "versions": versions,
        "commit": commit(Path(__file__).parent),
    }


def commit(folder: Path) -> str:
    """The Git commit of a checkout, with "-dirty" where files differ from it; "" for other code."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # An installed package may lie in another project's checkout, which does not track it.
        git("ls-files", "--error-unmatch", ".")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raises a ValueError unless the disk of a local path, which need not exist, has room."""
    folder = next(x for x in (epath.Path(path), *absolute(path).parents) if x.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{path} needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on its disk: "
            "remove what is not needed there, or choose another place"
        )
