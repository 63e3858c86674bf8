"""Host memory of imports and exports: what a process holds in addition to its parameters.

Makes a random sharded model of the requested size, one tensor at a time, then runs each case in a
process of its own and prints a table. Fails where a step needs more than its limit: one tensor of
the files, or one array of ours (a tensor of all layers) where Orbax writes a checkpoint, and
OVERHEAD. Memory is anonymous memory (RssAnon, sampled every 2 ms): pages of mapped files, which the
system may drop at any time, are not in it.

    python benchmarks/port_memory.py --gigabytes=2.1 --folder=/tmp
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CASES = {
    "import, 1 device": 1,
    "import, fsdp=8": 8,
    "bfloat16, 1 device": 1,
    "checkpoint, 1 device": 1,
    "checkpoint, fsdp=8": 8,
}
# Programs that XLA compiles on the way, thread stacks, buffers of the file systems.
OVERHEAD = 60_000_000
TENSOR, ARRAY = "largest tensor of the files", "largest array of ours"
DEVICES = "--xla_force_host_platform_device_count"


def main() -> None:
    """Makes the model, runs the cases, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.1, help="of float32 weights")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a place")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=CASES, action="append", help="these cases alone")
    parser.add_argument("--keep", action="store_true", help="leave the files of the model")
    args = parser.parse_args()
    folder = args.folder / "port_memory_files"
    if args.case:
        run_case(args.case, folder)
        return
    sizes = make_model(folder / "model", args.gigabytes * 1e9)
    lines = [f"{name}: {value / 1e6:.1f} MB" for name, value in sizes.items()]
    titles = ("case", "step", "parameters, MB", "peak in addition, MB", "limit, MB", "s")
    lines += ["", f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|"]
    sys.stdout.write("\n".join(lines) + "\n")
    failed = False
    for case in args.only or CASES:
        for row in _spawn(case, args.folder):
            limit = sizes[row["limit"]] + OVERHEAD
            failed |= row["peak"] > limit
            figures = (f"{x / 1e6:.1f}" for x in (row["held"], row["peak"], limit))
            cells = case, row["step"], *figures, f"{row['seconds']:.1f}"
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{disk(folder)}\n")
    if not args.keep:
        shutil.rmtree(folder)
    sys.exit("a step needs more memory than its limit" if failed else 0)


def disk(folder: Path) -> str:
    """How long `dd` takes to read and to write the bytes of the model's files."""
    seconds = {}
    for what, size in (("read", "bs=4M"), ("written", "bs=4M conv=fdatasync")):
        start = time.perf_counter()
        for path in (folder / "model").glob("*.safetensors"):
            target = "/dev/null" if what == "read" else str(folder / "dd")
            command = ["dd", f"if={path}", f"of={target}", *size.split()]
            subprocess.run(command, check=True, capture_output=True)
        seconds[what] = time.perf_counter() - start
    return "by dd: " + ", ".join(f"{what} in {x:.1f} s" for what, x in seconds.items())


def _spawn(case: str, folder: Path) -> list[dict[str, Any]]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{DEVICES}={CASES[case]}",
        # What is freed goes back to the system at once, so that a peak is a peak of what is held.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, f"--case={case}", f"--folder={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def make_model(folder: Path, nbytes: float) -> dict[str, int]:
    """Writes a random sharded float32 model and its tokenizer; bytes of the whole and of its parts.

    Args:
        folder: is kept if it is there.
        nbytes: of weights, about.
    """
    import numpy as np

    from zephyr_jax.config.run import MistralConfig
    from zephyr_jax.data.text.tokenizer import Tokenizer
    from zephyr_jax.demo import corpus
    from zephyr_jax.models.parameters import param_shapes
    from zephyr_jax.weights.exports import write_files
    from zephyr_jax.weights.huggingface import hf_layout
    from zephyr_jax.weights.safetensors import write_safetensors

    def config(layers: int) -> MistralConfig:
        return MistralConfig(
            vocab_size=32000,
            hidden_size=1536,
            intermediate_size=4096,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=96,
            sliding_window=4096,
            dtype="float32",
        )

    def total(layers: int) -> int:
        return sum(4 * math.prod(shape) for shape in hf_layout(config(layers)).shapes.values())

    per_layer = total(2) - total(1)
    cfg = config(max(2, 1 + math.ceil((nbytes - total(1)) / per_layer)))
    shapes = hf_layout(cfg).shapes
    if not folder.is_dir():
        corpus.write_ultrachat(folder.parent / "raw", 60, 0)
        lines = corpus.tokenizer_lines(folder.parent / "raw")
        corpus.train_tokenizer(lines, folder.parent / "tokenizer.model", 380)
        tok = Tokenizer.from_file(folder.parent / "tokenizer.model")
        temporary = folder.with_name("model.new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_files(temporary, cfg, tok, "float32", {}, "random")
        rng = np.random.default_rng(0)
        tensors = ((n, rng.standard_normal(s, np.float32)) for n, s in shapes.items())
        write_safetensors(temporary, shapes, "float32", tensors, max_shard_bytes=500_000_000)
        temporary.rename(folder)
    arrays = {path: 4 * math.prod(shape) for path, shape in param_shapes(cfg).items()}
    return {
        "weights": sum(arrays.values()),
        TENSOR: max(4 * math.prod(shape) for shape in shapes.values()),
        ARRAY: max(arrays.values()),
    }


class Watch:
    """The most anonymous memory that a block held, beyond what it began with."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        gc.collect()
        self.start = self.peak = anonymous_bytes()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)


def anonymous_bytes() -> int:
    """This process's resident anonymous memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run_case(case: str, folder: Path) -> None:
    """Prints one JSON line for each step of a case."""
    import jax
    import jax.numpy as jnp

    import zephyr_jax as zj

    n = CASES[case]
    jax.block_until_ready(jnp.ones((n, 8)) @ jnp.ones((8, 8)))
    mesh = jax.set_mesh(zj.make_mesh(fsdp=n)) if n > 1 else contextlib.nullcontext()
    with mesh:
        for row in _steps(case, folder):
            sys.stdout.write(json.dumps(row) + "\n")


def _steps(case: str, folder: Path) -> Iterator[dict[str, Any]]:
    import jax

    from zephyr_jax.weights.checkpoint import save_model
    from zephyr_jax.weights.huggingface import export_hf
    from zephyr_jax.weights.sources import load_model

    def held(params: Any) -> int:
        return sum(
            x.addressable_shards[0].data.nbytes * len(x.addressable_shards)
            for x in jax.tree.leaves(params)
        )

    def row(step: str, limit: str, watch: Watch, new: int, params: Any) -> dict[str, Any]:
        peak = watch.peak - watch.start - new
        return {"step": step, "limit": limit, "held": held(params), "peak": peak} | {
            "seconds": watch.seconds
        }

    def export(model: Any, dtype: str) -> dict[str, Any]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        with Watch() as watch:
            export_hf(model.cfg, model.params, model.tokenizer, folder / "out", dtype=dtype)
        shutil.rmtree(folder / "out")
        return row(f"export_hf({dtype})", TENSOR, watch, 0, model.params)

    dtype = "bfloat16" if case.startswith("bfloat16") else "float32"
    read = _count_reads()
    with Watch() as watch:
        model = load_model(folder / "model", dtype=dtype)
        jax.block_until_ready(model.params)
    reads = f"{sum(read) / 1e6:.1f} MB read, at most {max(read) / 1e6:.1f} at once"
    yield row(f"load_model(folder): {reads}", TENSOR, watch, held(model.params), model.params)
    if not case.startswith("checkpoint"):
        yield export(model, "float32")
        yield export(model, "bfloat16")
        return
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with Watch() as watch:
        save_model(model, folder / "checkpoint")
    yield row("save_model", ARRAY, watch, 0, model.params)
    del model
    for dtype in ("float32", "bfloat16"):
        with Watch() as watch:
            model = load_model(folder / "checkpoint", dtype=dtype)
            jax.block_until_ready(model.params)
        step = f"load_model(checkpoint, {dtype})"
        yield row(step, TENSOR, watch, held(model.params), model.params)
        yield export(model, "bfloat16")
        del model
    shutil.rmtree(folder / "checkpoint")


def _count_reads() -> list[int]:
    """The bytes of every slice that is read of a safetensors file from now on."""
    from zephyr_jax.weights.safetensors import SafetensorsReader

    sizes: list[int] = []
    read = SafetensorsReader.read

    def counting(self: Any, name: str, index: Any = ()) -> Any:
        array = read(self, name, index)
        sizes.append(array.nbytes)
        return array

    SafetensorsReader.read = counting  # type: ignore[method-assign]
    return sizes


if __name__ == "__main__":
    main()
