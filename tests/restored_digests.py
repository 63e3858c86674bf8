"""Prints digests of what a run's newest checkpoint is restored to, in one process of several."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

from zephyr_jax import distributed
from zephyr_jax.config.run import RunConfig
from zephyr_jax.sharding import make_mesh
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.steps import abstract_state
from zephyr_jax.weights.checkpoint import Checkpointer
from zephyr_jax.weights.checksums import params_digest


def main(workdir: Path) -> None:
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    distributed.start(parser.parse_args([]))
    saved = json.loads((workdir / "run_config.json").read_text())
    config = RunConfig.from_config_dict(saved)
    with jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh))):
        optimizer = make_optimizer(config.optim, make_schedule(config.optim, 10))
        restored = Checkpointer(workdir, 2).restore(abstract_state(config, optimizer))
        assert restored is not None
        state = restored[0]
        moments = jax.tree.leaves(state.opt_state)
        print("digests", int(state.step), params_digest(state.params), params_digest(moments))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
