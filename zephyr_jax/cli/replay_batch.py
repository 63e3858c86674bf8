"""Recomputes the batch of a bad step document by document, and names those that are to blame.

The parameters are those of the newest checkpoint before the step, adapters merged.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("workdir", help="the run's folder")
    parser.add_argument("step", type=int, help="a step whose batch is in WORKDIR/bad_steps")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    for line in replay(args.workdir, args.step):
        sys.stdout.write(f"{line}\n")


def replay(workdir: str, step: int) -> list[str]:
    """A line for each document of the batch (row, number, loss, gradient, text), and a verdict."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from etils import epath

    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.models.mistral import ForwardOptions, token_scores
    from zephyr_jax.storage import read_json
    from zephyr_jax.types import Rows
    from zephyr_jax.weights.checkpoint import FOLDER, saved_steps
    from zephyr_jax.weights.sources import load_model

    folder = epath.Path(workdir)
    config = RunConfig.from_config_dict(read_json(folder / "run_config.json"))
    files = sorted((folder / "bad_steps").glob(f"{step}-*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} has no batch of step {step} in bad_steps")
    before = [saved for saved in saved_steps(folder) if saved < step]
    source = str(folder / FOLDER / str(before[-1])) if before else config.init
    model = load_model(source, str(folder))
    options = ForwardOptions(attention=config.train.attention)

    @jax.jit
    @jax.value_and_grad
    def loss(params, rows):
        scores = token_scores(model.cfg, params, rows, options, branched=config.dpo is not None)
        return -scores.logps.sum() / jnp.maximum(rows.loss_mask.sum(), 1)

    lines, wrong = [f"parameters of {source}"], []
    for stored in map(np.load, files):
        rows = Rows(*(stored[name] for name in Rows._fields))
        for at, number in enumerate(stored["numbers"]):
            for segment in range(1, rows.segments[at].max() + 1):
                own = rows.segments[at] == segment
                row = Rows(*(np.where(own, x[at], 0).astype(x.dtype)[None] for x in rows))
                value, gradient = loss(model.params, row)
                norm = float(optax.tree.norm(gradient))
                pair = f" pair {stored['pair_ids'][at, segment - 1]}" if config.dpo else ""
                text = model.tokenizer.decode(rows.tokens[at][own].tolist())
                name = f"row {number} document {segment}{pair}"
                numbers = f"loss {float(value):.4f}  gradient {norm:.4g}"
                lines.append(f"{name}  {numbers}  {' '.join(text.split())[:60]!r}")
                if not np.isfinite(float(value) + norm):
                    wrong.append(name)
    verdict = "every document has a finite loss and gradient of its own: none is to blame alone"
    return [*lines, f"to blame: {'; '.join(wrong)}" if wrong else verdict]
