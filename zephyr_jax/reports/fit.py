"""Writes WORKDIR/report.html of a training run, finished or not; `fit` trains it first."""

from __future__ import annotations

import argparse
import contextlib
import logging as standard_logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

if TYPE_CHECKING:  # the commands start before JAX is imported
    from zephyr_jax.types import TrainState

SAMPLES = 3  # held-out prompts that a report shows replies to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command report."""
    parser.add_argument("workdir", help="the run's folder")
    samples = "also generate replies to N held-out prompts"
    parser.add_argument("--samples", type=int, metavar="N", help=samples)


def run(args: argparse.Namespace) -> None:
    """Runs the command report."""
    write_report(args.workdir, args.samples)


def fit(
    config: Any,
    workdir: str | os.PathLike[str] | None = None,
    samples: int = SAMPLES,
    began: float | None = None,
) -> TrainState:
    """Trains as the configuration says, or continues the earlier run in `workdir`.

    `config` is a RunConfig or the ConfigDict of a config file; `workdir`, by default `runs/NAME`,
    may be a URL such as gs://bucket/runs/sft. Packs the data set first if that has not been done.
    Leaves checkpoints, `metrics.jsonl`, `run_config.json` and the tokenizer in `workdir`, and
    `report.html` with replies to `samples` held-out prompts. `began`: its start, `time.monotonic`.

    Raises:
        ValueError: if the configuration does not fit itself, its data, its mesh, its initial model
            or an earlier run in the same folder; on every process, if they do not have the same
            code, configuration and data.
        FloatingPointError: if the loss stops being a finite number.
    """
    import jax

    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.storage import lock
    from zephyr_jax.training import loop

    if not isinstance(config, RunConfig):
        config = RunConfig.from_config_dict(config)
    workdir = workdir or os.path.join("runs", config.name)
    if jax.process_index():
        return loop.fit(config, workdir, began)
    with progress(), lock(workdir):
        state = loop.fit(config, workdir, began)
        try:
            write_report(workdir, samples)
        except Exception:
            logging.error("the run in %s is done and saved; only its report failed", workdir)
            raise
    return state


def write_report(workdir: str | os.PathLike[str], samples: int | None) -> None:
    """Writes a run's report; `samples`: how many prompts get replies; None: those stored."""
    from zephyr_jax.config.run import RunConfig
    from zephyr_jax.reports.run import Run, write_run_report
    from zephyr_jax.reports.samples import write_samples

    if samples is not None:
        write_samples(RunConfig.from_config_dict(Run(workdir).config), workdir, samples)
    logging.info("report: %s", write_run_report(workdir))


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Sends the progress of this package to stderr, and only the errors of others."""
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    before = logger.propagate, logger.handlers[:]
    handler = standard_logging.StreamHandler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = str(Path(__file__).parents[1])
    handler.addFilter(
        lambda record: record.pathname.startswith(ours) or record.levelno >= standard_logging.ERROR
    )
    logging.set_verbosity(logging.INFO)
    logger.propagate, logger.handlers[:] = False, [handler]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logger.propagate, logger.handlers[:] = before
