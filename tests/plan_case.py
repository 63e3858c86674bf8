"""A small run on four chips, and the report of libtpu's compiler for it.

python tests/plan_case.py        compiles it again (extra plan): tests/stored/plan_small.json.gz
"""

import dataclasses
import gzip
import json
import os
import sysconfig
from pathlib import Path

from zephyr_jax.config.run import MeshConfig, RunConfig, load_config
from zephyr_jax.planning import compiling
from zephyr_jax.planning.compiling import ENVIRONMENT, Case, Compiled, make_case, parse_topology

STORED = Path(__file__).parent / "stored" / "plan_small.json.gz"


def small_run(**train) -> RunConfig:
    """All dimensions different, heads as wide as the kernels want them, two micro-batches."""
    config = load_config("zephyr_7b_sft")
    model = dataclasses.replace(
        config.model, vocab_size=1152, hidden_size=256, intermediate_size=640, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=128, sliding_window=None,
    )  # fmt: skip
    train = {"batch_size": 16, "micro_batches": 2, "attention": "splash"} | train
    parts = {"model": model, "data": dataclasses.replace(config.data, seq_len=512)}
    parts |= {"train": dataclasses.replace(config.train, **train), "mesh": MeshConfig(2, 2, 1)}
    return dataclasses.replace(config, name="small", **parts)


def small_case(**train) -> Case:
    """On v5e:2x2."""
    return make_case(small_run(**train), parse_topology("v5e:2x2"))


def stored() -> Compiled:
    """The compiler's report for `small_case()`, by libtpu 0.0.42.1."""
    return Compiled(**json.loads(gzip.decompress(STORED.read_bytes())), options={})


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    case = small_case()
    done = compiling.report(*compiling.lower(case), case.topology, case.config.mesh)
    report = json.dumps(done._asdict())
    for folder in (sysconfig.get_path("purelib"), Path(__file__).parents[1]):  # of this machine
        report = report.replace(f"{folder}/", "")
    STORED.write_bytes(gzip.compress(report.encode(), mtime=0))
