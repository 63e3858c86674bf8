"""Checks whether runs will work on this machine, and reports what will be slow and why.

Versions against the ranges of the installed package, devices and their memory, the host, the
attention kernel, and a few training steps of a tiny model on all devices. Ends with status 0 if
runs will work, else 1. On a slice of several hosts run it on every host, with --distributed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from zephyr_jax import distributed

# extra -> the distributions that show that it is installed (any of them), and its purpose
EXTRAS = {
    "tokenizers": (("tokenizers",), "models that bring a tokenizer.json (SmolLM2, TinyLlama)"),
    "gguf": (("gguf",), "import and export of GGUF files"),
    "plan": (("libtpu",), "plan.py, which compiles a run for TPU slices without having them"),
    "serve": (("starlette",), "the chat server"),
    "trackers": (("wandb", "trackio", "tensorboardX"), "train.trackers"),
}
# jax's own metadata says which versions of these fit it
_OF_JAX = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# set by a cluster's launcher: the number of processes that it started
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_STEPS, _TOKENS = 5, 256  # of the tiny model, and in each of its rows

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command; `SystemExit(1)` if runs will not work on this machine."""
    distributed.start(args)
    report = examine()
    sys.stdout.write((json.dumps(report, indent=1) if args.json else show(report)) + "\n")
    if not report["ok"]:
        raise SystemExit(1)


def examine() -> Report:
    """The report: plain values, `problems` that stop runs, and `notes` on what will be slow."""
    versions = installed_versions()
    problems = [
        f"{name} is {line['installed'] or 'not installed'}, required is {line['required']}"
        for name, line in versions.items()
        if not line["fits"]
    ]
    notes = [
        f"the extra {name} is not installed: {purpose} (pip install 'zephyr_jax[{name}]')"
        for name, (distributions, purpose) in EXTRAS.items()
        if not any(map(_version, distributions))
    ]
    disk = shutil.disk_usage(".").free / 2**30
    if disk < 20:
        notes.append(
            f"{disk:.1f} GiB are free in {os.getcwd()}: a checkpoint of a 7B run with its moments "
            "takes 87 GB, an export in bfloat16 14.5 GB"
        )
    host = {"cores": os.cpu_count(), "disk_free_gib": disk, "folder": os.getcwd()}
    report = {"versions": versions, "host": host, **_accelerators(problems, notes)}
    return {"ok": not problems, "problems": problems, "notes": notes, **report}


def installed_versions() -> dict[str, dict[str, Any]]:
    """Distribution -> `installed`, `required` and `fits`, by the metadata of package and jax."""
    required = {r.name: r.specifier for r in _requirements("zephyr_jax")}
    for r in _requirements("jax", "tpu", "cuda12", "cuda13"):
        if r.name == "jaxlib" or (r.name in _OF_JAX and _version(r.name)):
            required[r.name] = r.specifier
    table = {}
    for name in sorted(required, key=str.lower):
        installed, specifier = _version(name), required[name]
        fits = installed is not None and specifier.contains(installed, prereleases=True)
        table[name] = {"installed": installed, "required": str(specifier) or "any", "fits": fits}
    return table


def _requirements(name: str, *extras: str) -> list[Requirement]:
    """What a distribution requires in this environment; nothing if it is not installed."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:  # the package runs from a folder
        return []
    return [
        r
        for r in requirements
        if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerators(problems: list[str], notes: list[str]) -> Report:
    """Devices, attention kernel and step times; only a problem if JAX finds no device."""
    import jax
    import jax.numpy as jnp

    from zephyr_jax.models.attention import auto
    from zephyr_jax.models.masks import row_layout

    try:
        platform = jax.devices()[0].platform
        distributed.check_started()
        launched = max(int(os.environ.get(name) or 1) for name in _LAUNCHERS)
        if launched > 1 and jax.process_count() == 1:
            words = f"the launcher started {launched} processes and each works alone"
            notes.append(f"{words}: give every one --distributed")
    except (RuntimeError, ValueError) as error:
        problems.append(f"JAX finds no devices: {_short(error)}")
        return {}
    dtype = "float32" if platform == "cpu" else "bfloat16"
    ids = jnp.zeros((1, 2048), jnp.int32)  # packed rows, of a model with heads of width 128
    report: Report = {
        "platform": platform,
        "processes": jax.process_count(),
        "all_devices": jax.device_count(),
        "devices": [
            {"kind": device.device_kind, **(device.memory_stats() or {})}
            for device in jax.local_devices()
        ],
        "attention": auto(row_layout(ids, None, ids), 128, dtype),
    }
    if platform == "cpu":
        notes.append(
            "only a CPU: demos, tests, porting and data run; training 7B does not. For an "
            "accelerator: pip install 'zephyr_jax[cuda]' or 'zephyr_jax[tpu]'"
        )
    elif platform == "gpu" and report["attention"] != "cudnn":
        notes.append(f"cuDNN's attention is not available: {report['attention']} is slower")
    try:
        report["step"] = step_times(dtype)
    except Exception as error:  # a broken driver, kernel or compiler raises errors of any type
        problems.append(f"a training step of a tiny model fails: {_short(error)}")
    return report


def step_times(dtype: str) -> Report:
    """Trains a model of two small layers on all devices; seconds of the first and a later step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from zephyr_jax.config.run import load_config
    from zephyr_jax.models.mistral import init_params
    from zephyr_jax.sharding import make_mesh, named_sharding, spec
    from zephyr_jax.training.optim import make_optimizer
    from zephyr_jax.training.steps import jitted_steps
    from zephyr_jax.types import Rows, TrainState

    changes = (f"dtype={dtype}", "num_hidden_layers=2", "head_dim=64")
    config = load_config("demo_sft", [f"--config.model.{change}" for change in changes])
    with jax.set_mesh(make_mesh(data=-1)):
        optimizer = make_optimizer(config.optim, lambda _: 1e-3)
        step, _ = jitted_steps(config, optimizer)
        params = init_params(config.model, jax.random.key(0))
        moments = jax.jit(optimizer.init)(params)
        state = TrainState(jnp.zeros((), jnp.int32), params, moments, None, None)
        shape = (jax.device_count(), _TOKENS)
        positions = np.broadcast_to(np.arange(_TOKENS, dtype=np.int32), shape)
        ones = np.ones_like(positions)
        arrays = (positions % 97, ones, positions, 0 * ones, positions > 0)
        rows = Rows(*jax.device_put(arrays, named_sharding(spec("BT"))))
        seconds, loss = [], math.nan
        for _ in range(_STEPS):
            start = time.perf_counter()
            state, sums = step(state, rows)
            loss = float(sums["loss"] / sums["weight"])  # waits for the step
            seconds.append(time.perf_counter() - start)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return {"dtype": dtype, "compile_seconds": seconds[0], "seconds": min(seconds[1:])}


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def show(report: Report) -> str:
    """The report as text, one fact a line, problems last."""
    lines = ["versions"]
    for name, line in report["versions"].items():
        mark = "" if line["fits"] else "  <- does not fit"
        lines.append(f"  {name:<22} {line['installed'] or '-':<12} {line['required']}{mark}")
    host = report["host"]
    lines.append(f"host: {host['cores']} cores, {host['disk_free_gib']:.1f} GiB free on disk")
    for device in report.get("devices", []):
        limit = device.get("bytes_limit")
        memory = f"{limit / 2**30:.1f} GiB" if limit else "the host's memory"
        lines.append(f"device: {device['kind']}, {memory}")
    if "attention" in report:
        lines.append(f"devices of {report['processes']} process(es): {report['all_devices']}")
        lines.append(f"attention of packed rows of 2,048 tokens: {report['attention']}")
    if "step" in report:
        step = report["step"]
        lines.append(
            f"training step of a tiny model in {step['dtype']}: {1e3 * step['seconds']:.1f} ms, "
            f"compiled in {step['compile_seconds']:.1f} s"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("runs will work here" if report["ok"] else "runs will not work here")
    return "\n".join(lines)
