"""MaxText's train step and ours by one estimator; and its published, measured figures by it.

    benchmarks/maxtext_aot/run.sh                 SFT of the 7B on slices of 16 chips
    benchmarks/maxtext_aot/run.sh --calibrate     configurations that MaxText has measured

A case takes 3 to 15 minutes of one core; what is compiled already is read again. MaxText's DPO is
a loop of another package around its model (0.2.5: "Legacy DPO implementation in train.py is
removed"), without a step that compiles for a slice that is not here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.chips import CHIPS
from zephyr_jax.planning import hlo
from zephyr_jax.planning.compiling import parse_topology
from zephyr_jax.planning.estimate import kernel_flops, timed

HERE = Path(__file__).resolve().parent
COMMON = ("run_name=aot", "base_output_directory=/tmp/maxtext", "dataset_type=synthetic")
COMMON += ("enable_checkpointing=false", "compile_topology_num_slices=1", "attention=flash")
MISTRAL = ("model_name=mistral-7b", "max_target_length=2048", "per_device_batch_size=8")
SAVED = ("query_proj", "key_proj", "value_proj", "out_proj", "mlpwi_0", "mlpwi_1")
CUSTOM = ("remat_policy=custom", *(f"{name}=device" for name in SAVED))
# What its published recipes for v6e give the compiler, as far as libtpu 0.0.42.1 takes it there.
V6E = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
BLOCKS = [f"sa_block_{name}=2048" for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")]
BLOCKS += ["sa_block_kv_dkv_compute=2048", "sa_block_q_dq=2048", "sa_block_kv_dq=2048"]
OFFLOADED = ("decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj")


class Step(NamedTuple):
    """One step of MaxText's."""

    slice: str  # as ours is called
    words: tuple[str, ...]  # MaxText's
    options: dict[str, str]  # of the compiler
    measured: float = 0.0  # seconds, published
    window: int | None = None


def _options(family: str) -> dict[str, str]:
    return CHIPS[family].compiler


STEPS = {
    "v5p, full remat": Step("v5p:2x2x4", MISTRAL, {}),
    "v5p, full remat, our options": Step("v5p:2x2x4", MISTRAL, _options("v5p")),
    "v5p, saved as ours, our options": Step("v5p:2x2x4", (*MISTRAL, *CUSTOM), _options("v5p")),
    "v5e, full remat, our options": Step(
        "v5e:4x4", (*MISTRAL, "gradient_accumulation_steps=4"), _options("v5e")
    ),
    "v6e, full remat, our options": Step("v6e:4x4", MISTRAL, _options("v6e")),
}
MEASURED = {  # sources: docs/pods.md, "Held against measured steps"
    "v6e-16, Llama 3.1 8B": Step(
        "v6e:4x4",
        (
            *("model_name=llama3.1-8b", "max_target_length=8192", "per_device_batch_size=3"),
            *("remat_policy=custom", *(f"{name}=offload" for name in OFFLOADED)),
            *("use_iota_embed=true", "sa_use_fused_bwd_kernel=true", *BLOCKS),
        ),
        V6E | {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
        measured=3.393,
    ),
    "v5e-256, 16B": Step(
        "v5e:16x16",
        (
            *("global_parameter_scale=16", "max_target_length=2048", "per_device_batch_size=6"),
            *("remat_policy=full", "use_iota_embed=true"),
        ),
        {k: v for k, v in _options("v5e").items() if "vmem" not in k},
        measured=0.0,
    ),
}
TOPOLOGIES = {"v5p:2x2x4": "v5p-32", "v5e:4x4": "v5e-16", "v6e:4x4": "v6e-16"}
TOPOLOGIES |= {"v5e:16x16": "v5e-256", "v5p:4x4x4": "v5p-128"}  # v5p by its cores


def main() -> None:
    """Compiles what is missing, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maxtext", required=True, help="Python of MaxText's environment")
    parser.add_argument("--folder", type=Path, required=True, help="takes the reports")
    parser.add_argument("--calibrate", action="store_true", help="the measured configurations")
    parser.add_argument("--only", default="", help="part of a name")
    args = parser.parse_args()
    steps = MEASURED if args.calibrate else STEPS
    head = ("MaxText 0.2.5", "slice", "GiB a device", "step", "measured", "estimate / measured")
    rows = [head, ["---"] * len(head)]
    for name, step in steps.items():
        if args.only in name:
            rows.append([name, step.slice, *cells(step, report(name, step, args))])
    sys.stdout.write("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


def report(name: str, step: Step, args: argparse.Namespace) -> dict[str, Any]:
    """What the compiler reports, from the folder if it is there."""
    path = args.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.json.gz"
    if not path.is_file():
        flags = " ".join(f"--{key}={value}" for key, value in step.options.items())
        words = (f"compile_topology={TOPOLOGIES[step.slice]}", f"compile_xla_flags={flags}")
        command = [args.maxtext, str(HERE / "compile_step.py"), str(path)]
        subprocess.run([*command, *COMMON, *words, *step.words], check=False)
    return json.loads(gzip.decompress(path.read_bytes()))


def cells(step: Step, done: dict[str, Any]) -> list[str]:
    """Memory and time of a step."""
    if not done["text"]:
        return [done["error"][:80], "-", "-", "-"]
    topology, program = parse_topology(step.slice), hlo.parse(done["text"])
    counts = hlo.count(program, {})
    for loop in counts.unknown:
        sys.stderr.write(f"the loop {loop.name} ({loop.origin}) counts once\n")
    flops = kernel_flops(step.window, program, counts.times)
    seconds, _ = timed(program, counts.times, topology, {"fsdp": topology.devices}, flops)
    row = [f"{done['peak'] / 2**30:.1f}", f"{seconds['step']:.2f} s"]
    if not step.measured:
        return [*row, "-", "-"]
    return [*row, f"{step.measured:.2f} s", f"{seconds['step'] / step.measured:.2f}"]


if __name__ == "__main__":
    main()
