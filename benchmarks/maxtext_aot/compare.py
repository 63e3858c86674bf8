"""MaxText's train step and ours by one estimator; and its published, measured figures by it.

    benchmarks/maxtext_aot/run.sh                 SFT of the 7B on slices of 16 chips
    benchmarks/maxtext_aot/run.sh --calibrate     configurations that MaxText has measured

A case takes 3 to 20 minutes of one core; what is compiled already is read again. MaxText's DPO is
a loop of another package around its model (0.2.5: "Legacy DPO implementation in train.py is
removed"), without a step that compiles for a slice that is not here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from zephyr_jax.chips import CHIPS
from zephyr_jax.planning import hlo
from zephyr_jax.planning.compiling import parse_topology
from zephyr_jax.planning.estimate import kernel_flops, timed

HERE = Path(__file__).resolve().parent
COMMON = ("run_name=aot", "dataset_type=synthetic")
COMMON += ("enable_checkpointing=false", "attention=flash")
MISTRAL = ("model_name=mistral-7b", "max_target_length=2048", "per_device_batch_size=8")
SAVED = ("query_proj", "key_proj", "value_proj", "out_proj", "mlpwi_0", "mlpwi_1")
CUSTOM = ("remat_policy=custom", *(f"{name}=device" for name in SAVED))
# The compiler's options of its published recipe for Llama 3.1 8B on v6e-16, but for a third run of
# the scheduler, which makes compiling three times as long, and the name of a chip's configuration.
V6E = CHIPS["v6e"].compiler | {
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disjoint_spmem": "false",
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
    "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
    "xla_tpu_enable_ag_backward_pipelining": "true",
}
V5P = {
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
}
BLOCKS = [f"sa_block_{name}=2048" for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")]
BLOCKS += ["sa_block_kv_dkv_compute=2048", "sa_block_q_dq=2048", "sa_block_kv_dq=2048"]
OFFLOADED = ("decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj")


class Step(NamedTuple):
    """One step of MaxText's."""

    slice: str  # as ours is called
    words: tuple[str, ...]  # MaxText's
    options: dict[str, str]  # of the compiler
    seconds: float = 0.0  # measured, published
    tflops: float = 0.0  # the same, TFLOP/s of a chip, attention counted in full


def _options() -> dict[str, str]:
    """Asynchronous transfers alone, as MaxText's own recipes of 2024 have them."""
    return {k: v for k, v in CHIPS["v5e"].compiler.items() if "vmem" not in k}


STEPS = {
    "v5p, no options": Step("v5p:2x2x4", MISTRAL, {}),
    "v5p, our options": Step("v5p:2x2x4", MISTRAL, CHIPS["v5p"].compiler),
    "v5p, our options, saves what ours saves": Step(
        "v5p:2x2x4", (*MISTRAL, *CUSTOM), CHIPS["v5p"].compiler
    ),
    "v5e, our options": Step("v5e:4x4", MISTRAL, CHIPS["v5e"].compiler),
    "v5e, our options, 4 micro-batches": Step(
        "v5e:4x4",
        (*MISTRAL[:2], "per_device_batch_size=2", "gradient_accumulation_steps=4"),
        CHIPS["v5e"].compiler,
    ),
    "v6e, our options": Step("v6e:4x4", MISTRAL, CHIPS["v6e"].compiler),
}


def _published(where: str, scale: int, rows: int, tflops: float) -> Step:
    """A model of `scale` billion parameters of MaxText's configs for v5e-256 or v5p-128."""
    words = f"global_parameter_scale={scale}", f"per_device_batch_size={rows}"
    words += "max_target_length=2048", "use_iota_embed=true"
    if where == "v5p:4x4x4":
        words += "remat_policy=minimal", "ici_tensor_parallelism=4"
        return Step(where, words, _options() | V5P, tflops=tflops)
    return Step(where, (*words, "remat_policy=full"), _options(), tflops=tflops)


def _trillium(model: str, where: str, rows: int, seconds: float) -> Step:
    """A model of tpu-recipes, rows of 8,192, whose layers keep activations in host memory."""
    words = f"model_name={model}", "max_target_length=8192", f"per_device_batch_size={rows}"
    words += "remat_policy=custom", *(f"{name}=offload" for name in OFFLOADED)
    words += "use_iota_embed=true", "sa_use_fused_bwd_kernel=true", *BLOCKS
    return Step(where, words, V6E, seconds=seconds)


MEASURED = {  # sources: docs/pods.md, "Held against measured steps"
    "Mistral 7B": _trillium("mistral-7b", "v6e:2x4", 6, 6.320),
    "Llama 3.1 8B": _trillium("llama3.1-8b", "v6e:4x4", 3, 3.393),
    "16B": _published("v5e:16x16", 16, 6, 120.0),
    "16B, two slices": _published("2*v5e:16x16", 16, 6, 117.0),
    "32B": _published("v5e:16x16", 32, 4, 132.0),
    "64B": _published("v5e:16x16", 64, 2, 118.0),
    "32B on v5p": _published("v5p:4x4x4", 32, 7, 328.0),
    "32B on v5p, 6 rows": _published("v5p:4x4x4", 32, 6, 328.0),
    "64B on v5p": _published("v5p:4x4x4", 64, 3, 323.0),
}
TOPOLOGIES = {"v5p:2x2x4": "v5p-32", "v5e:4x4": "v5e-16", "v6e:4x4": "v6e-16"}
TOPOLOGIES |= {"v5e:16x16": "v5e-256", "v6e:2x4": "v6e-8", "v5p:4x4x4": "v5p-128"}


def main() -> None:
    """Compiles what is missing, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maxtext", required=True, help="Python of MaxText's environment")
    parser.add_argument("--folder", type=Path, required=True, help="takes the reports")
    parser.add_argument("--calibrate", action="store_true", help="the measured configurations")
    parser.add_argument("--only", default="", help="a name")
    args = parser.parse_args()
    steps = MEASURED if args.calibrate else STEPS
    head = ("MaxText 0.2.5", "slice", "GiB a device", "step", "measured", "estimate / measured")
    rows = [head, ["---"] * len(head)]
    for name, step in steps.items():
        if args.only in ("", name):
            rows.append([name, step.slice, *cells(step, report(name, step, args))])
    sys.stdout.write("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


def report(name: str, step: Step, args: argparse.Namespace) -> dict[str, Any]:
    """What the compiler reports, from the folder if it is there."""
    path = args.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.json.gz"
    if not path.is_file():
        flags = " ".join(f"--{key}={value}" for key, value in step.options.items())
        command = [args.maxtext, str(HERE / "compile_step.py"), str(path), *COMMON, *step.words]
        command += [f"base_output_directory={args.folder}"]
        command += [f"compile_topology={TOPOLOGIES[step.slice.removeprefix('2*')]}"]
        command += [f"compile_topology_num_slices={parse_topology(step.slice).slices}"]
        subprocess.run(command, check=False, env=os.environ | {"LIBTPU_INIT_ARGS": flags})
    return json.loads(gzip.decompress(path.read_bytes()))


def cells(step: Step, done: dict[str, Any]) -> list[str]:
    """Memory and time of a step."""
    if not done["text"]:
        return [done["error"][:80], "-", "-", "-"]
    topology, program = parse_topology(step.slice), hlo.parse(done["text"])
    counts = hlo.count(program, {})
    for loop in counts.unknown:
        sys.stderr.write(f"the loop {loop.name} ({loop.origin}) counts once\n")
    flops = kernel_flops(None, program, counts.times)  # no window is shorter than a row
    seconds, _ = timed(program, counts.times, topology, {"devices": topology.devices}, flops)
    row = [f"{done['peak'] / 2**30:.1f}", f"{seconds['step']:.2f} s"]
    measured = step.seconds
    if step.tflops:  # until July 2025 MaxText counted attention in full, now its causal half
        _, weights, attention = done["tflops"]
        measured = (weights + 2 * attention) / step.tflops
    if not measured:
        return [*row, "-", "-"]
    return [*row, f"{measured:.2f} s", f"{seconds['step'] / measured:.2f}"]


if __name__ == "__main__":
    main()
