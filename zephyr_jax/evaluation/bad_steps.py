"""Recomputes the batch of a bad step document by document, and names those that are to blame.

The parameters are those of the newest checkpoint before the step, adapters merged. A run keeps the
batches of steps that were not applied in WORKDIR/bad_steps.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath

from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import HostBatch
from zephyr_jax.models.mistral import ForwardOptions, token_scores
from zephyr_jax.sharding import named_sharding, spec
from zephyr_jax.storage import read_checked, write_atomic
from zephyr_jax.types import Rows
from zephyr_jax.weights.checkpoint import FOLDER, saved_steps
from zephyr_jax.weights.sources import load_model

_FOLDER = "bad_steps"
_SHOWN = 8  # rows and pairs that a message names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("workdir", help="the run's folder")
    parser.add_argument("step", type=int, help="a step whose batch is in WORKDIR/bad_steps")


def run(args: argparse.Namespace) -> None:
    """Runs the command replay_batch."""
    sys.stdout.write("\n".join([*replay(args.workdir, args.step), ""]))


class BadSteps:
    """The batches of a run's bad steps; `skipped` counts them, and more than `most` end the run."""

    def __init__(self, workdir: epath.Path, start: int, most: float):
        self._workdir, self._own, self._most = workdir, f"-{jax.process_index()}.npz", most
        folder = workdir / _FOLDER
        paths = folder.glob(f"*{self._own}") if folder.is_dir() else ()
        self.skipped = sum(int(path.name.split("-")[0]) <= start for path in paths)
        self._no: Any = jax.device_put(jnp.float32(0), named_sharding(spec("")))

    def hold(self, sums: dict[str, Any]) -> Any:
        """Whether a step changes nothing: where the one before, of these sums, may end the run."""
        return self._no if self.skipped < self._most else sums.get("bad", self._no)

    def keep(self, step: int, host: HostBatch, loss: float, norm: float) -> str:
        """Writes the batch of a bad step; returns why that ends the run, or "" if it does not."""
        self.skipped += 1
        arrays: dict[str, Any] = {**host.rows._asdict(), "numbers": host.numbers[host.own]}
        arrays["pair_ids"] = host.pair_ids[host.own]
        path = self._workdir / _FOLDER / f"{step}{self._own}"
        write_atomic(path, lambda file: np.savez(file, **arrays))
        rows = host.numbers[host.numbers >= 0].tolist()
        pairs = host.pair_ids[host.pair_ids != 0].tolist()
        ids = f" with pairs {pairs[:_SHOWN]}, ..." if pairs else ", ..."
        problem = (
            f"step {step} has loss {loss:.6g}, its gradient norm {norm:.6g}: the update was not "
            f"applied, its batch (rows {rows[:_SHOWN]}{ids}) is in {path}"
        )
        if self.skipped <= self._most:
            logging.warning("%s; %d of at most %d such steps", problem, self.skipped, self._most)
            return ""
        spike = math.isfinite(loss + norm)
        otherwise = "raise bad_steps.spike" if spike else "lower optim.peak_lr in another --workdir"
        return (
            f"{problem}; python scripts/replay_batch.py {self._workdir} {step} seeks a document to "
            f"blame, --config.train.bad_steps.skip=N leaves out N such steps; else {otherwise}"
        )


def replay(workdir: str | os.PathLike[str], step: int) -> list[str]:
    """A line for each document of a bad step's batch (loss, gradient, text), and a verdict."""
    folder = epath.Path(workdir)
    config = RunConfig.from_config_dict(read_checked(folder / "run_config.json"))
    files = sorted((folder / _FOLDER).glob(f"{step}-*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} has no batch of step {step} in {_FOLDER}")
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
    for path in files:
        try:
            stored = dict(np.load(path))
        except Exception as error:  # zipfile's and NumPy's, of many types
            raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error
        arrays: list[Any] = [stored[name] for name in Rows._fields]
        rows = Rows(*arrays)
        for at, number in enumerate(stored["numbers"]):
            for segment in range(1, rows.segments[at].max() + 1):
                own = rows.segments[at] == segment
                alone: list[Any] = [np.where(own, x[at], 0).astype(x.dtype)[None] for x in arrays]
                value, gradient = loss(model.params, Rows(*alone))
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
