"""`fit`: one training loop. SFT and preferences differ in their step and batches alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from zephyr_jax import distributed
from zephyr_jax.chips import peak_flops
from zephyr_jax.config.run import RunConfig, TrainConfig
from zephyr_jax.data.packing.batches import HostBatch, device_pairs, device_rows, read_batches
from zephyr_jax.distributed import ShutdownHandler
from zephyr_jax.evaluation import pairs
from zephyr_jax.evaluation.bad_steps import BadSteps
from zephyr_jax.evaluation.metrics_file import BestStep, MetricsFile, learned, read_metrics
from zephyr_jax.models.parameters import count_params, model_flops_per_token
from zephyr_jax.sharding import make_mesh
from zephyr_jax.training.metrics import Clock, Meter
from zephyr_jax.training.optim import warmup_steps
from zephyr_jax.training.scores import StepInputs
from zephyr_jax.training.setup import Run, setup
from zephyr_jax.training.sizes import resolve_sizes
from zephyr_jax.training.steps import jitted_steps
from zephyr_jax.training.workdir import claim
from zephyr_jax.types import TrainState
from zephyr_jax.weights.checkpoint import params_digest, saved_steps

_BY_SOURCE = ("pairs", "loss", "rewards/accuracies", "rewards/margins")


def fit(
    config: RunConfig, workdir: str | os.PathLike[str], began: float | None = None
) -> TrainState:
    """`zephyr_jax.fit` without the run's report."""
    clock = Clock(began)
    distributed.check_started()
    mesh = contextlib.nullcontext()  # one that is set already, as in a notebook
    if jax.sharding.get_mesh().empty:
        config = resolve_sizes(config)
        mesh = jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh)))
    with mesh:
        return train(setup(config, workdir, clock))


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool


def due_after(step: int, total: int, train: TrainConfig, stops: bool = False) -> Due:
    """What is due after `step` of `total` steps; `stops`: the run is asked to stop there.

    A period of 0: only at the last step. The held-out set is also evaluated before the first step.
    """

    def divides(period: int) -> bool:
        return period > 0 and step % period == 0

    evaluate = step in (0, total) or divides(train.eval_every)
    save = step == total or stops or divides(train.checkpoint_every)
    return Due(evaluate or save or divides(train.log_every), evaluate, save)


class Outputs(NamedTuple):
    """Where a run reports its progress."""

    metrics: MetricsFile
    heartbeat: distributed.Heartbeat
    profiler: distributed.Profiler
    bar: tqdm
    best: BestStep
    bad_steps: BadSteps


def train(run: Run) -> TrainState:
    """Runs the remaining steps and returns the last state."""
    config, state, total = run.config, run.state, run.plan.train_steps
    start = step = int(state.step)
    outputs = open_outputs(run)
    steps_config = dataclasses.replace(config, dpo=run.dpo)
    train_step, eval_step = jitted_steps(steps_config, run.optimizer)
    meter, stops, order, sums, clock = Meter(), False, 0, {}, run.clock
    with (
        contextlib.closing(clock),
        outputs.bar,
        contextlib.closing(run.checkpointer),
        contextlib.closing(outputs.metrics),
        ShutdownHandler() as shutdown,
    ):
        outputs.heartbeat.beat(start)
        evaluated = distributed.first_decides(lambda: int(outputs.metrics.has(start, "eval")))
        if due_after(start, total, config.train).evaluate and not evaluated:
            evaluate(run, eval_step, state, outputs, shutdown)
        end = start if outputs.best.ends_run else total
        batches = read_batches(run.packed, run.plan, "train", start, end, config.seed)
        for step, host in enumerate(batches, start + 1):
            batch = device_batch(run, host, state)
            clock.end("data_wait")
            hold = outputs.bad_steps.hold(sums)
            with outputs.profiler.around(step):
                state, sums = train_step(state, batch, run.base, hold)
            if step == start + 1:
                clock.end_first_step(sums)
            if run.reference:
                state = run.reference.after(state, step)
            meter.add(sums, (step, host))
            order = zlib.crc32(host.numbers[host.numbers >= 0].tobytes(), order)
            outputs.bar.update()
            stops = shutdown.stops_after(step)
            due = due_after(step, total, config.train, stops)
            if due.log:
                meter.flush()
            clock.end("step")
            outputs.profiler.after(step, state, last=step == total or stops)
            outputs.heartbeat.beat(step)
            answer_bad_steps(run, outputs, meter, state)
            if due.log:
                log(run, outputs, meter, step, order)
                meter, order = Meter(), 0
            if due.save:
                outputs.metrics.flush()
                save(run, state)
            best = due.evaluate and evaluate(run, eval_step, state, outputs, shutdown)
            # A signal may have come during the evaluation.
            ends = bool(stops or shutdown.signals or outputs.best.ends_run)
            if (best or ends) and not due.save:
                save(run, state)
            if ends:
                break
    done = step == total or outputs.best.ends_run
    outputs.heartbeat.beat(step, "done" if done else "stopped")
    if not done:
        logging.info("stopped at step %d of %d; start again to go on from there", step, total)
        raise SystemExit(distributed.STOPPED)
    report_learning(run, state, outputs.best.step)
    return state


def save(run: Run, state: TrainState) -> None:
    """Starts saving a checkpoint."""
    run.checkpointer.save(state, run.meta)
    run.clock.end("save")


def report_learning(run: Run, state: TrainState, best: int) -> None:
    """The run's last line: what it learned; a warning if that is nothing."""
    unchanged = params_digest(state.params) == run.meta.get("start_digest")
    if jax.process_index():
        return
    text, better = learned(read_metrics(run.workdir / "metrics.jsonl"))
    if unchanged:
        logging.warning(
            "the parameters are bit for bit those that the run began with: all updates were 0 or "
            "too small for float32; raise optim.peak_lr, or look at the data's targets"
        )
    elif not better:
        logging.warning("the loss is no better than before; look at optim.peak_lr and the data")
    of_them = f", the best of them {best}" if best else ""
    logging.info(f"{run.config.name}: {int(state.step)} steps done{of_them}; {text}; {run.workdir}")


def open_outputs(run: Run) -> Outputs:
    """Claims the run's folder and opens what the run writes; nothing is written before."""
    config, plan, workdir, start = run.config, run.plan, run.workdir, int(run.state.step)
    total, devices = plan.train_steps, jax.devices()
    profiler = distributed.Profiler(config.train.profile, workdir)
    claim(workdir, config.to_dict())
    logging.info(
        f"{config.name}: jax {jax.__version__} on {len(devices)} {jax.default_backend()} "
        f"device(s), mesh {dict(jax.sharding.get_mesh().shape)}; {count_params(config.model):,} "
        f"parameters in {config.model.dtype}; packed set {run.packed.folder}; steps {start} to "
        f"{total} ({plan.steps_per_epoch} an epoch, {warmup_steps(config.optim, total)} warm-up), "
        f"{plan.rows_per_batch} rows of {config.data.seq_len} tokens a batch"
    )
    metrics = MetricsFile(workdir / "metrics.jsonl", start, config)
    best = BestStep(workdir, config.train, metrics.kept, saved_steps(workdir))
    run.checkpointer.best = best.step
    if not jax.process_index():
        run.tok.save(workdir)
    shown: dict[str, Any] = {"desc": config.name, "unit": "step", "mininterval": 1}
    bar = tqdm(total=total, initial=start, disable=bool(jax.process_index()), **shown)
    if peak := peak_flops(devices[0].device_kind):
        tokens = plan.rows_per_batch * config.data.seq_len
        flops = tokens * model_flops_per_token(config.model, config.data.seq_len)
        # Adapters of a frozen base count two thirds: no gradients of frozen parameters.
        run.clock.step_at_peak = flops * (2 / 3 if config.lora else 1) / (peak * len(devices))
    run.clock.total_steps, run.clock.before = total, metrics.before
    heartbeat = distributed.Heartbeat(workdir, total)
    bad_steps = BadSteps(workdir, start, config.train.bad_steps.get("skip", 0))
    return Outputs(metrics, heartbeat, profiler, bar, best, bad_steps)


def device_batch(run: Run, host: HostBatch, state: TrainState) -> Any:
    """The global batch on the mesh; of pairs with the reference's log-probs."""
    rows = device_rows(host)
    if run.reference is None:
        return rows
    return device_pairs(host, rows, run.reference.logps(host, rows, state))


def answer_bad_steps(run: Run, outputs: Outputs, meter: Meter, state: TrainState) -> None:
    """Keeps the batches of new bad steps; ends the run at the first that may not be skipped."""
    while meter.bad:
        (step, host), loss, norm = meter.bad.pop(0)
        if problem := outputs.bad_steps.keep(step, host, loss, norm):
            # Parameters and moments are those before the step, unless a reference moved since.
            if state.reference is None:
                before = state._replace(step=jnp.full_like(state.step, step - 1))
                run.checkpointer.save(before, run.meta)
            raise FloatingPointError(problem)


def log(run: Run, outputs: Outputs, meter: Meter, step: int, order: int) -> None:
    """Writes the means of the steps since the last line, and a digest of the rows they took."""
    means, skipped = meter.means(), outputs.bad_steps.skipped
    rates = run.clock.read(meter, step, pairs=run.config.dpo is not None)
    # The rate that the last of these steps used: schedules count updates from 0.
    means["learning_rate"] = float(jax.device_get(run.schedule(step - 1 - skipped)))
    means["target_tokens"] = meter.total("target_tokens")
    means["data_order"] = order % 10**6
    if skipped:
        means["skipped_steps"] = skipped
    outputs.metrics.write(step, "train", means | rates)
    shown = {"tok/s": f"{rates['target_tokens_per_s']:.0f}"}
    names = {"loss": "loss", "rewards/accuracies": "acc"}
    shown |= {name: f"{means[key]:.4f}" for key, name in names.items() if key in means}
    outputs.bar.set_postfix(shown, refresh=False)


def evaluate(
    run: Run, eval_step: Any, state: TrainState, outputs: Outputs, shutdown: ShutdownHandler
) -> bool:
    """Writes the means over the held-out set, if there is one, as `eval_...`; none after a signal.

    They are exact whatever the batch. A preference run also gets `eval_source/...` and a table of
    its pairs in WORKDIR/evaluations. Returns whether the state is the best so far.
    """
    step, plan, dpo = int(state.step), run.plan, run.dpo
    if not plan.eval_steps:
        return False
    inputs = StepInputs(base=run.base, shift=0.0 if state.shift is None else state.shift.delta)
    meter, tables = Meter(), []
    for host in read_batches(run.packed, plan, "eval", 0, plan.eval_steps, run.config.seed):
        batch = device_batch(run, host, state)
        sums, scores = eval_step(state.params, batch, inputs)
        if scores is None:
            meter.add(sums)
        else:
            scored = multihost_utils.process_allgather((*scores, batch.ref_logps), tiled=True)
            losses, logps, tokens, ref_logps = scored
            tables.append(pairs.PairTable(host.pair_ids, losses, logps, ref_logps, tokens))
        outputs.heartbeat.beat(step, "eval")
        if shutdown.signals:  # the run that continues from here evaluates first
            return False
    means, sources = meter.means(), {}
    if dpo:
        table = pairs.pair_table(tables, run.packed.ties("eval"))
        if dpo.labeled:
            table = table._replace(losses=pairs.labeled_losses(table, dpo))
        means = pairs.pair_means(table, dpo.beta, dpo.labeled)
        sources = pairs.by_source(table, run.packed.sources("eval"), dpo.beta, dpo.labeled)
        if not jax.process_index():
            pairs.save_table(table, run.workdir / "evaluations" / f"{step:06d}.npz")
    logging.info("step %d  %s", step, "  ".join(f"eval_{n} {x:.4f}" for n, x in means.items()))
    for source, values in sources.items() if len(sources) > 1 else ():
        means |= {f"source/{source}/{n}": values[n] for n in _BY_SOURCE if n in values}
    means = {f"eval_{name}": x for name, x in means.items()}
    outputs.metrics.write(step, "eval", means)
    best = outputs.best.after(step, means)
    run.checkpointer.best = outputs.best.step
    run.clock.end("held_out")
    return best
