"""Compiles MaxText's train step for a slice that is not here, and writes what the compiler reports.

    python compile_step.py OUT.json.gz compile_topology=v5p-32 model_name=mistral-7b ...

Runs in MaxText's own environment (`run.sh` makes it). The words are MaxText's; options of the
compiler stand in LIBTPU_INIT_ARGS. The fields are those of `zephyr_jax.planning`'s reports, and
`tflops`, of a device and step as MaxText counts them: in all, of weights, of attention.
"""

import gzip
import importlib.util
import inspect
import json
import os
import sys
import time
from pathlib import Path

# Before libtpu is loaded, as zephyr_jax.planning.compiling does.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main() -> None:
    """Compiles and writes."""
    from jax.experimental import xla_metadata

    if not hasattr(xla_metadata, "must_fuse_call"):  # of jax 0.11; libtpu 0.0.42.1 is jax 0.10.2's
        xla_metadata.must_fuse_call = lambda function=None, **_: function or (lambda f: f)
    import jax
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import maxtext_utils

    out, words = Path(sys.argv[1]), sys.argv[2:]
    config = Path(str(importlib.util.find_spec("maxtext").origin)).parent / "configs" / "base.yml"
    compile_step, start = train_compile.jit_and_compile, time.monotonic()
    report = {"peak": 0, "arguments": 0, "temporary": 0, "aliased": 0, "text": "", "error": ""}

    def keep(*arguments, **options):
        config = inspect.signature(compile_step).bind(*arguments, **options).arguments["config"]
        report["tflops"] = maxtext_utils.calculate_tflops_training_per_device(config, log=False)
        try:
            program = compile_step(*arguments, **options)
        except jax.errors.JaxRuntimeError as error:
            report["error"] = " ".join(str(error).split())[:2000]
            raise
        memory = program.memory_analysis()
        report.update(
            peak=memory.peak_memory_in_bytes,
            arguments=memory.argument_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            text=program.as_text(),
        )
        return program

    train_compile.jit_and_compile = keep
    try:
        train_compile.main(["train_compile", str(config), *words])
    except Exception as error:  # what follows the compilation may fail without a device
        if not report["text"]:
            report["error"] = report["error"] or f"{type(error).__name__}: {error}"[:2000]
    report |= {"seconds": time.monotonic() - start, "words": words}
    out.write_bytes(gzip.compress(json.dumps(report).encode()))
    sys.exit(not report["text"])


if __name__ == "__main__":
    main()
