"""Checks whether runs will work on this machine, and reports what will be slow and why.

Versions against the ranges of the installed package, devices and their memory, the attention
kernel, and a few training steps of a tiny model on all devices. Ends with status 0 if runs will
work, else 1. On a slice of several hosts run it on every host, with --distributed.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from zephyr_jax import chips, distributed

# jax's own metadata says which versions of these fit it
_OF_JAX = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_STEPS, _TOKENS = 5, 256  # of the tiny model, and in each of its rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command; `SystemExit(1)` if runs will not work on this machine."""
    distributed.start(args)
    report = examine()
    sys.stdout.write(show(report))
    if report["problems"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """The report: facts by name, `problems` that stop runs, and `notes` on what will be slow."""
    report: dict[str, Any] = {"problems": list(_misfits()), "notes": []}
    disk = shutil.disk_usage(".").free / 2**30
    report |= {"cores": os.cpu_count(), "GiB free on disk": round(disk, 1)}
    if disk < 20:
        report["notes"].append(
            f"{disk:.1f} GiB are free in {os.getcwd()}: a checkpoint of a 7B run with its moments "
            "takes 87 GB, an export in bfloat16 14.5 GB"
        )
    try:
        _add_devices(report)
        report |= step_times("float32" if report["backend"] == "cpu" else "bfloat16")
    except Exception as error:  # a broken driver, kernel or compiler raises errors of any type
        what = "a step of a tiny model fails" if "backend" in report else "JAX finds no devices"
        report["problems"].append(f"{what}: {' '.join(str(error).split())[:400]}")
    return report


def _misfits() -> Iterator[str]:
    """A problem for each distribution outside the range that the package, or jax, requires."""
    for owner, extras in (("zephyr_jax", ("",)), ("jax", ("", "tpu", "cuda12", "cuda13"))):
        known = _version(owner) is not None  # else the package runs from a folder
        for line in map(Requirement, metadata.requires(owner) or () if known else ()):
            installed, mark = _version(line.name), line.marker
            wanted_by = [x for x in extras if not mark or mark.evaluate({"extra": x})]
            unrelated = owner == "jax" and line.name not in _OF_JAX
            if unrelated or not wanted_by or (installed is None and "" not in wanted_by):
                continue
            if installed is None or not line.specifier.contains(installed, prereleases=True):
                text = f"{line.name} is {installed or 'not installed'}"
                yield f"{text}, required by {owner} is {line.specifier or 'any version'}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _add_devices(report: dict[str, Any]) -> None:
    """Adds versions, devices and the attention kernel, with notes on what is slow."""
    import jax
    import jax.numpy as jnp

    from zephyr_jax.models.attention import auto
    from zephyr_jax.models.masks import row_layout

    notes, device = report["notes"], jax.local_devices()[0]
    distributed.check_started()
    ids = jnp.zeros((1, 2048), jnp.int32)  # packed rows, of a model with heads of width 128
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    report["attention"] = auto(row_layout(ids, None, ids), 128, dtype)
    report |= chips.environment()
    if memory := (device.memory_stats() or {}).get("bytes_limit"):
        report["GiB of a device"] = round(memory / 2**30, 1)
    if device.platform == "cpu":
        notes.append(
            "only a CPU: demos, tests, porting and data run; training 7B does not. For an "
            "accelerator: pip install 'zephyr_jax[cuda]' or 'zephyr_jax[tpu]'"
        )
    elif device.platform == "gpu" and report["attention"] != "cudnn":
        notes.append(f"cuDNN's attention is not available: {report['attention']} is slower")


def step_times(dtype: str) -> dict[str, float]:
    """Trains a model of two small layers on all devices; seconds of the first and a later step."""
    import jax
    import numpy as np

    from zephyr_jax.config.run import load_config
    from zephyr_jax.models.mistral import init_params
    from zephyr_jax.sharding import make_mesh, named_sharding, spec
    from zephyr_jax.training.optim import make_optimizer
    from zephyr_jax.training.steps import initial_state, jitted_steps
    from zephyr_jax.types import Rows

    changes = (f"dtype={dtype}", "num_hidden_layers=2", "head_dim=64")
    config = load_config("demo_sft", [f"--config.model.{change}" for change in changes])
    with jax.set_mesh(make_mesh(data=-1)):
        optimizer = make_optimizer(config.optim, lambda _: 1e-3)
        step, _ = jitted_steps(config, optimizer)
        state = initial_state(config, optimizer, init_params(config.model, jax.random.key(0)))
        at = np.tile(np.arange(_TOKENS, dtype=np.int32), (jax.device_count(), 1))
        arrays = (at % 97, np.ones_like(at), at, np.zeros_like(at), at > 0)
        rows = Rows(*jax.device_put(arrays, named_sharding(spec("BT"))))
        seconds, loss = [], math.nan
        for _ in range(_STEPS):
            start = time.perf_counter()
            state, sums = step(state, rows)
            loss = float(sums["loss"] / sums["weight"])  # waits for the step
            seconds.append(time.perf_counter() - start)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return {"seconds to compile a step": seconds[0], "seconds of a step": min(seconds[1:])}


def show(report: dict[str, Any]) -> str:
    """The report as text, one fact a line, problems last."""
    facts = report | report.get("versions", {})
    lines = [f"{name:<26} {x}" for name, x in facts.items() if not isinstance(x, list | dict)]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("runs will not work here" if report["problems"] else "runs will work here")
    return "\n".join([*lines, ""])
