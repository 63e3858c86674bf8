"""Looks at this machine and says whether runs will work on it, and what will be slow and why.

Versions against the ranges of the installed package, devices and their memory, the host, the
attention kernel, and one real training step of a tiny model on all devices. Ends with status 0 if
runs will work, else 1. On a slice of several hosts give every host the same command, with
--distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from zephyr_jax import distributed

# extra -> the distributions that show it is there (any of them), and what it is for
EXTRAS = {
    "tokenizers": (("tokenizers",), "models that bring a tokenizer.json (SmolLM2, TinyLlama)"),
    "gguf": (("gguf",), "GGUF files, in and out"),
    "plan": (("libtpu",), "plan.py, which compiles a run for TPU slices that are not here"),
    "serve": (("starlette",), "the chat server"),
    "trackers": (("wandb", "trackio", "tensorboardX"), "train.trackers"),
}
# distributions beside the declared ones; jax's own metadata says which of them fit it
_OF_JAX = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# what a cluster's launcher sets -> how many processes it started
_LAUNCHED = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_LITTLE_DISK = 20 * 2**30
_STEPS = 5

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--json", action="store_true", help="the whole report as one JSON object")
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command; a machine on which runs will not work ends in `SystemExit(1)`."""
    distributed.start(args)
    report = examine()
    text = json.dumps(report, indent=1) if args.json else show(report)
    sys.stdout.write(text + "\n")
    if not report["ok"]:
        raise SystemExit(1)


def examine() -> Report:
    """All that is known of this machine: plain values, `problems` that stop runs, and `notes`."""
    problems: list[str] = []
    notes: list[str] = []
    report: Report = {
        "versions": versions(problems, notes),
        "extras": {name: bool(_installed(EXTRAS[name][0])) for name in EXTRAS},
        "host": _host(notes),
    }
    report |= _accelerators(problems, notes)
    notes += [
        f"the extra {name} is not installed: {EXTRAS[name][1]} (pip install 'zephyr_jax[{name}]')"
        for name, there in report["extras"].items()
        if not there
    ]
    return {"ok": not problems, "problems": problems, "notes": notes, **report}


def versions(problems: list[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    """What is installed beside what is asked for: distribution -> `installed`, `wanted`, `fits`.

    Args:
        problems: gets a line for every distribution that is missing or outside its range.
        notes: gets a line where the ranges are not known.
    """
    try:
        wanted = {r.name: r.specifier for r in _requirements("zephyr_jax", "")}
        python = SpecifierSet(metadata.metadata("zephyr_jax")["Requires-Python"])
    except metadata.PackageNotFoundError:
        notes.append("zephyr_jax runs from a folder and is not installed: no ranges are known")
        wanted, python = {"jax": SpecifierSet()}, SpecifierSet()
    table = {"python": _line(platform.python_version(), python)}
    table |= {name: _line(_version(name), wanted[name]) for name in sorted(wanted, key=str.lower)}
    of_jax = {}
    if _version("jax"):
        extras = ("", "tpu", "cuda12", "cuda13")
        of_jax = {r.name: r.specifier for extra in extras for r in _requirements("jax", extra)}
    for name in _OF_JAX:
        if _version(name) or name == "jaxlib":
            table[name] = _line(_version(name), of_jax.get(name, SpecifierSet()))
    for name, line in table.items():
        if not line["fits"]:
            found = line["installed"] or "not installed"
            problems.append(f"{name} is {found}, wanted is {line['wanted']}; install it anew")
    return table


def _requirements(name: str, extra: str) -> list[Requirement]:
    """What a distribution asks for in this environment, with one of its extras."""
    found = [Requirement(text) for text in metadata.requires(name) or []]
    return [r for r in found if not r.marker or r.marker.evaluate({"extra": extra})]


def _line(installed: str | None, wanted: SpecifierSet) -> dict[str, Any]:
    fits = installed is not None and wanted.contains(installed, prereleases=True)
    return {"installed": installed, "wanted": str(wanted) or "any", "fits": fits}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _installed(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if _version(name)]


def _host(notes: list[str]) -> dict[str, Any]:
    """Cores this process may use, memory and disk in bytes; None where the system does not say."""
    may_use = getattr(os, "sched_getaffinity", None)
    disk = shutil.disk_usage(".")
    if disk.free < _LITTLE_DISK:
        notes.append(
            f"{_gib(disk.free)} are free in {os.getcwd()}: a checkpoint of a 7B run with its "
            "moments takes 87 GB, an export in bfloat16 14.5 GB"
        )
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    memory = None
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(may_use(0)) if may_use else os.cpu_count(),
        "memory_bytes": memory,
        "folder": os.getcwd(),
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
    }


def _accelerators(problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Devices, attention and the step; an empty dict where JAX finds no device at all."""
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        problems.append(f"JAX finds no devices: {_short(error)}")
        return {}
    here = found[0].platform
    devices = [_device(device) for device in jax.local_devices()]
    launched = max(int(os.environ.get(name) or 1) for name in _LAUNCHED)
    if launched > 1 and jax.process_count() == 1:
        notes.append(
            f"the launcher started {launched} processes and each works alone: give every one "
            "--distributed"
        )
    try:
        distributed.check_started()
    except ValueError as error:
        problems.append(str(error))
        return {"devices": devices}
    part = {
        "platform": here,
        "processes": jax.process_count(),
        "all_devices": len(found),
        "devices": devices,
        "attention": {dtype: attention_kernel(2048, 128, dtype) for dtype in _dtypes(here)},
    }
    notes += _slow(here, part["attention"])
    try:
        part["step"] = step_times("float32" if here == "cpu" else "bfloat16")
    except Exception as error:  # whatever a broken driver, kernel or compiler raises
        problems.append(f"a training step of a tiny model fails: {_short(error)}")
        return part
    if not part["step"]["finite"]:
        problems.append("the loss of a tiny model is not a finite number")
    return part


def _dtypes(here: str) -> tuple[str, ...]:
    return ("float32",) if here == "cpu" else ("bfloat16", "float32")


def _device(device: Any) -> dict[str, Any]:
    """One device; bytes where its backend counts them (a CPU's does not)."""
    stats = device.memory_stats() or {}
    return {
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "memory_used_bytes": stats.get("bytes_in_use"),
    }


def attention_kernel(tokens: int, head_dim: int, dtype: str) -> str:
    """Which implementation "auto" takes here for packed rows of so many tokens."""
    import jax
    import jax.numpy as jnp

    from zephyr_jax.models.attention import auto
    from zephyr_jax.models.masks import row_layout

    made: list[str] = []

    def choose(ids: jax.Array) -> jax.Array:
        made.append(auto(row_layout(ids, None, ids), head_dim, dtype))
        return ids

    jax.eval_shape(choose, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    return made[0]


def step_times(dtype: str) -> dict[str, Any]:
    """Trains a model of two small layers on all devices and takes the time.

    Args:
        dtype: of the computation.

    Returns:
        `compile_seconds` of the first step, `seconds` of a later one, and whether the loss was
        `finite` and got `smaller` on the same rows.
    """
    import dataclasses

    import jax
    import jax.numpy as jnp

    from zephyr_jax.config.run import load_config
    from zephyr_jax.models.mistral import init_params
    from zephyr_jax.sharding import make_mesh
    from zephyr_jax.training.optim import make_optimizer
    from zephyr_jax.training.steps import jitted_steps, loss_sums
    from zephyr_jax.types import TrainState

    config = load_config("demo_sft")
    model = dataclasses.replace(config.model, dtype=dtype, num_hidden_layers=2, head_dim=64)
    config = dataclasses.replace(config, model=model)
    with jax.set_mesh(make_mesh(data=-1)):
        optimizer = make_optimizer(config.optim, lambda _: 1e-3)
        step, _ = jitted_steps(config, loss_sums(config), optimizer)
        params = init_params(model, jax.random.key(0))
        moments = jax.jit(optimizer.init)(params)
        state, rows = TrainState(jnp.zeros((), jnp.int32), params, moments, None, None), _rows(256)
        losses, seconds = [], []
        for _ in range(_STEPS):
            start = time.perf_counter()
            state, sums = step(state, rows)
            losses.append(float(sums["loss"] / sums["weight"]))  # waits for the step
            seconds.append(time.perf_counter() - start)
    return {
        "dtype": dtype,
        "compile_seconds": round(seconds[0], 3),
        "seconds": round(min(seconds[1:]), 5),
        "finite": all(abs(loss) < float("inf") for loss in losses),
        "smaller": losses[-1] < losses[0],
    }


def _rows(tokens: int) -> Any:
    """A row for each device, of one document of so many tokens."""
    import jax
    import numpy as np

    from zephyr_jax.sharding import named_sharding, spec
    from zephyr_jax.types import Rows

    shape = (jax.device_count(), tokens)
    at = np.broadcast_to(np.arange(tokens, dtype=np.int32), shape)
    ones, zeros = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            shape, named_sharding(spec("BT")), lambda cut: x[cut]
        ),
        Rows(at % 97, ones, at, zeros, at > 0),  # type: ignore[arg-type]
    )


def _slow(here: str, kernels: dict[str, str]) -> list[str]:
    """What will be slow here, and why."""
    if here == "cpu":
        return [
            "only a CPU: demos, tests, porting and data run; training 7B does not. For an "
            "accelerator: pip install 'zephyr_jax[cuda]' or 'zephyr_jax[tpu]'"
        ]
    if here == "tpu":
        return []
    notes = ["model.dtype=float32 on a GPU leaves cuDNN's attention and most of the speed unused"]
    if kernels["bfloat16"] != "cudnn":
        notes.append(f"cuDNN's attention does not serve here: {kernels['bfloat16']} is slower")
    return notes


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def show(report: Report) -> str:
    """The report as text, one fact a line, problems last."""
    lines = ["versions"]
    for name, line in report["versions"].items():
        mark = "" if line["fits"] else "  <- does not fit"
        lines.append(f"  {name:<22} {line['installed'] or '-':<12} {line['wanted']}{mark}")
    host = report["host"]
    lines += [
        "host",
        f"  {host['cores']} cores, {_gib(host['memory_bytes'])} of memory",
        f"  {_gib(host['disk_free_bytes'])} free in {host['folder']}",
    ]
    if "devices" in report:
        lines.append("devices of this process")
    for device in report.get("devices", []):
        used, size = _gib(device["memory_used_bytes"]), _gib(device["memory_bytes"])
        said = f"{used} of {size} used" if device["memory_bytes"] else "memory is the host's"
        lines.append(f"  {device['kind']}: {said}")
    if "attention" in report:
        kernels = ", ".join(f"{v} ({k})" for k, v in report["attention"].items())
        lines.append(f"  in all: {report['all_devices']}, of {report['processes']} process(es)")
        lines.append(f"  attention of packed rows of 2,048 tokens: {kernels}")
    if "step" in report:
        step = report["step"]
        lines.append(
            f"  training step of a tiny model, {step['dtype']}: {1e3 * step['seconds']:.1f} ms, "
            f"compiled in {step['compile_seconds']:.1f} s"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("runs will work here" if report["ok"] else "runs will not work here")
    return "\n".join(lines)
