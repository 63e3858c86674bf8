"""`fit`: one training loop. SFT and preferences differ in their step and batches alone."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from zephyr_jax.chips import peak_flops
from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import HostBatch, device_pairs, device_rows, read_batches
from zephyr_jax.distributed import STOPPED, ShutdownHandler, first_decides, shutdown_handler
from zephyr_jax.models.parameters import count_params, train_flops
from zephyr_jax.training.heldout import Heldout
from zephyr_jax.training.metrics import Clock, Heartbeat, Meter, MetricsFile
from zephyr_jax.training.optim import warmup_steps
from zephyr_jax.training.scores import StepInputs
from zephyr_jax.training.setup import Run, run_mesh, setup
from zephyr_jax.training.steps import jitted_steps, loss_sums
from zephyr_jax.training.trackers import open_trackers
from zephyr_jax.training.workdir import claim
from zephyr_jax.types import TrainState


def fit(config: Any, workdir: str | os.PathLike[str] | None = None) -> TrainState:
    """Trains as the configuration says, or continues the earlier run in `workdir`.

    Packs the data set first if that has not been done. Leaves checkpoints, `metrics.jsonl`,
    `run_config.json` and the tokenizer in `workdir`.

    Args:
        config: a RunConfig, or the ConfigDict of a config file.
        workdir: the run's folder, by default `runs/NAME`; it may be a URL such as
            gs://bucket/runs/sft.

    Raises:
        ValueError: if the configuration does not fit itself, its data, its mesh, its initial model
            or an earlier run in the same folder; on every process, if they do not have the same
            code, configuration and data.
        FloatingPointError: if the loss stops being a finite number.
    """
    if not isinstance(config, RunConfig):
        config = RunConfig.from_config_dict(config)
    with run_mesh(config) as resolved:
        return train(setup(resolved, workdir or os.path.join("runs", config.name)))


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool


class Cadence(NamedTuple):
    """When a run logs, evaluates and saves; a period of 0 means only at the last step."""

    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    def due(self, step: int, stops: bool = False) -> Due:
        """What is due after `step` steps; `stops` says that the run is asked to stop there.

        The held-out set is also evaluated before the first step. Whatever is evaluated or saved is
        logged too.
        """
        last = step == self.total_steps
        evaluate = step == 0 or last or _divides(self.eval_every, step)
        save = last or stops or _divides(self.checkpoint_every, step)
        return Due(evaluate or save or _divides(self.log_every, step), evaluate, save)


def _divides(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


class Outputs(NamedTuple):
    """Where a run reports its progress."""

    metrics: MetricsFile
    heartbeat: Heartbeat
    clock: Clock
    bar: tqdm


def train(run: Run) -> TrainState:
    """Runs the remaining steps and returns the last state."""
    config, state, total = run.config, run.state, run.plan.train_steps
    start = step = int(state.step)
    outputs = open_outputs(run)
    every = config.train
    cadence = Cadence(total, every.log_every, every.eval_every, every.checkpoint_every)
    train_step, eval_step = jitted_steps(config, loss_sums(config), run.optimizer)
    batches = read_batches(run.packed, run.plan, "train", start, total, config.seed)
    meter, stops = Meter(), False
    with (
        outputs.bar,
        contextlib.closing(run.checkpointer),
        contextlib.closing(outputs.metrics),
        shutdown_handler() as shutdown,
    ):
        outputs.heartbeat.beat(start)
        evaluated = first_decides(lambda: int(outputs.metrics.has(start, "eval")))
        if cadence.due(start).evaluate and not evaluated:
            evaluate(run, eval_step, state, outputs, shutdown)
        for step, host in enumerate(batches, start + 1):
            batch = device_batch(run, host, state)
            outputs.clock.begin_step()
            with run.profiler.around(step):
                state, sums = train_step(state, batch, run.base)
            if run.reference:
                state = run.reference.after(state, step)
            meter.add(sums)
            outputs.bar.update()
            stops = shutdown.stops_after(step)
            due = cadence.due(step, stops)
            if due.log:
                meter.flush()
            outputs.clock.end_step()
            run.profiler.after(step, state, last=step == total or stops)
            outputs.heartbeat.beat(step)
            if due.log:
                log(run, outputs, meter, step)
                meter = Meter()
            if due.save:
                outputs.metrics.flush()
                run.checkpointer.save(state, run.meta)
            if due.evaluate:
                evaluate(run, eval_step, state, outputs, shutdown)
            if due.save or due.evaluate:
                outputs.clock.skip()
            if stops or shutdown.signals:
                if not due.save:  # the signal came during the evaluation
                    run.checkpointer.save(state, run.meta)
                break
    outputs.heartbeat.beat(step, "stopped" if step < total else "done")
    if step < total:
        logging.info("stopped at step %d of %d; start again to go on from there", step, total)
        raise SystemExit(STOPPED)
    logging.info("%s: %d steps done; results in %s", config.name, total, run.workdir)
    return state


def open_outputs(run: Run) -> Outputs:
    """Claims the run's folder and opens what the run writes; nothing is written before."""
    config, workdir, total = run.config, run.workdir, run.plan.train_steps
    start = int(run.state.step)
    claim(workdir, config)
    log_start(run)
    trackers = open_trackers(config, workdir, start)
    metrics = MetricsFile(workdir / "metrics.jsonl", start, trackers)
    if not jax.process_index():
        run.tok.save(workdir)
    bar = tqdm(
        total=total,
        initial=start,
        desc=config.name,
        unit="step",
        mininterval=1,
        disable=bool(jax.process_index()),
    )
    clock = Clock(total, run.began, metrics.before, step_at_peak=step_at_peak(run))
    return Outputs(metrics, Heartbeat(workdir, total), clock, bar)


def device_batch(run: Run, host: HostBatch, state: TrainState) -> Any:
    """The global batch on the mesh; of pairs with the reference's log-probs."""
    rows = device_rows(host)
    if run.reference is None:
        return rows
    return device_pairs(host, rows, run.reference.logps(host, rows, state))


def log(run: Run, outputs: Outputs, meter: Meter, step: int) -> None:
    """Writes the means of the steps since the last line.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite.
    """
    means = meter.means()
    for name in ("loss", "grad_norm"):
        if not math.isfinite(means[name]):
            raise FloatingPointError(
                f"{name} is {means[name]} at step {step}; checkpoints in {run.workdir} are from "
                f"before; try a lower optim.peak_lr in another --workdir"
            )
    rates = outputs.clock.read(meter, step, pairs=run.config.dpo is not None)
    # The rate that the last of these steps used: schedules count from 0.
    rate = float(np.asarray(run.schedule(step - 1)))
    more = {"learning_rate": rate, "target_tokens": meter.total("target_tokens")}
    outputs.metrics.write(step, "train", means | more | rates)
    shown = {"loss": f"{means['loss']:.4f}", "tok/s": f"{rates['target_tokens_per_s']:.0f}"}
    if run.config.dpo:
        shown["acc"] = f"{means['rewards/accuracies']:.2f}"
    outputs.bar.set_postfix(shown, refresh=False)


def evaluate(
    run: Run, eval_step: Any, state: TrainState, outputs: Outputs, shutdown: ShutdownHandler
) -> None:
    """Means over the whole held-out set, exact whatever the batch size; none after a signal."""
    step, dpo = int(state.step), run.config.dpo
    shift = 0.0 if state.shift is None else state.shift.delta
    inputs = StepInputs(base=run.base, shift=shift)
    heldout = Heldout(dpo.beta if dpo else None, run.packed.sources("eval") if dpo else {})
    hosts = read_batches(run.packed, run.plan, "eval", 0, run.plan.eval_steps, run.config.seed)
    for host in hosts:
        batch = device_batch(run, host, state)
        heldout.add(host, batch, eval_step(state.params, batch, inputs))
        outputs.heartbeat.beat(step, "eval")
        if shutdown.signals:  # the run that continues from here evaluates first
            return
    means = heldout.means()
    heldout.save(run.workdir / "evaluations" / f"{step:06d}.npz")
    outputs.metrics.write(step, "eval", means)
    shown = (f"{name} {value:.4f}" for name, value in means.items() if "source/" not in name)
    logging.info("step %d  %s", step, "  ".join(shown))


def step_at_peak(run: Run) -> float | None:
    """Seconds of a step's model FLOPs at all devices' bfloat16 peak; None for unknown devices.

    Adapters of a frozen base count two thirds: no gradients of frozen parameters.
    """
    devices, config = jax.devices(), run.config
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    flops = train_flops(config.model, run.plan.rows_per_batch, config.data.seq_len)
    return flops * (2 / 3 if config.lora else 1) / (peak * len(devices))


def log_start(run: Run) -> None:
    """Logs what runs where, and on which data."""
    config, plan = run.config, run.plan
    logging.info(
        "%s: jax %s on %d %s device(s), mesh %s; %s parameters in %s; packed set %s",
        config.name,
        jax.__version__,
        jax.device_count(),
        jax.default_backend(),
        dict(jax.sharding.get_mesh().shape),
        f"{count_params(config.model):,}",
        config.model.dtype,
        run.packed.folder,
    )
    logging.info(
        "steps %d to %d (%d an epoch, %d warm-up), %d rows of %d tokens a batch",
        int(run.state.step),
        plan.train_steps,
        plan.steps_per_epoch,
        warmup_steps(config.optim, plan.train_steps),
        plan.rows_per_batch,
        config.data.seq_len,
    )
