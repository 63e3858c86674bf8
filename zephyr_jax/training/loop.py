"""`fit`, the only training loop. SFT and preferences are two step functions, not two trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from zephyr_jax.agreement import agree, first_decides, leave_word
from zephyr_jax.config.run import RunConfig
from zephyr_jax.data.packing.batches import (
    HostBatch,
    device_pairs,
    device_rows,
    make_plan,
    read_batches,
)
from zephyr_jax.distributed import STOPPED, Stopping, check_started, stop_signals
from zephyr_jax.losses.pairs import RewardShift
from zephyr_jax.models.lora import init_adapters
from zephyr_jax.models.mistral import init_params
from zephyr_jax.models.quantized import check_blocks, freeze
from zephyr_jax.sharding import mesh_from_config, named_sharding, spec
from zephyr_jax.training.auto_mesh import resolve_mesh
from zephyr_jax.training.heartbeat import Heartbeat
from zephyr_jax.training.heldout import Heldout
from zephyr_jax.training.metrics import Clock, Meter, MetricsFile
from zephyr_jax.training.optim import make_optimizer, make_schedule
from zephyr_jax.training.profiling import Profiler
from zephyr_jax.training.programs import abstract_state, jitted_steps
from zephyr_jax.training.reference import reference_digest, reference_parts
from zephyr_jax.training.reference_modes import Reference
from zephyr_jax.training.run_facts import run_facts
from zephyr_jax.training.scores import StepInputs
from zephyr_jax.training.setup import (
    check_rows,
    check_same_model,
    check_vocabulary,
    log_start,
    run_packed,
    run_tokenizer,
    stage_line,
    step_at_peak,
)
from zephyr_jax.training.steps import loss_sums
from zephyr_jax.training.trackers import check_trackers, open_trackers
from zephyr_jax.training.workdir import check_unclaimed, claim
from zephyr_jax.types import Params, TrainState
from zephyr_jax.weights.checkpoint import Checkpointer, load_model
from zephyr_jax.weights.digest import params_digest


def fit(config: Any, workdir: str | os.PathLike[str] | None = None) -> TrainState:
    """Trains as the configuration says, or goes on where an earlier run in `workdir` stopped.

    Packs the set first where that has not been done. Leaves checkpoints, `metrics.jsonl`,
    `run_config.json` and the tokenizer in `workdir` (None: `runs/NAME`).

    Args:
        config: a RunConfig, or the ConfigDict of a config file.
        workdir: the run's folder; it may be a URL such as gs://bucket/runs/sft.

    Raises:
        ValueError: if the configuration does not fit itself, its data, its mesh, its initial model
            or an earlier run in the same folder; on every process, if they do not have the same
            code, configuration and data.
        FloatingPointError: if the loss stops being a finite number.
    """
    if not isinstance(config, RunConfig):
        config = RunConfig.from_config_dict(config)
    check_started()
    began, workdir = time.monotonic(), epath.Path(workdir or epath.Path("runs") / config.name)
    mesh = jax.sharding.get_mesh()
    config = resolve_mesh(config) if mesh.empty else config
    with (
        contextlib.nullcontext() if not mesh.empty else jax.set_mesh(mesh_from_config(config.mesh))
    ):
        try:
            run = _Run(config, workdir)
        except Exception as error:
            leave_word(error)
            raise
        return run.train(began)


class _Run:
    """One run's parts, made in the order in which they depend on each other."""

    def __init__(self, config: RunConfig, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        check_unclaimed(workdir, config)
        check_trackers(config, workdir)
        self.sums = loss_sums(config)
        self.tok = run_tokenizer(config)
        check_vocabulary(config, self.tok)
        if config.lora and config.lora.base != "full":
            check_blocks(config.model)
        self.packed = run_packed(config, self.tok)
        train = config.train
        self.plan = make_plan(self.packed, train.batch_size, train.epochs, train.max_steps)
        check_rows(config, self.plan)
        self.profiler = Profiler(train.profile, self.plan.train_steps, workdir)
        if jax.process_count() > 1:
            agree(run_facts(config, self.packed, workdir))
        self.schedule = make_schedule(config.optim, self.plan.train_steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        self.checkpointer = Checkpointer(workdir, train.keep_checkpoints)
        self.base: Params | None = None  # frozen parameters, where adapters are trained
        self.state, self.meta = self._restored() or self._begun()
        self.reference = None
        if config.dpo:
            parts = self.meta["reference"]
            self.reference = Reference(config, self.packed, self.plan, parts, self._initial_again)
        claim(workdir, config)  # nothing is written before everything fits
        step = int(self.state.step)
        trackers = open_trackers(config, workdir, step)
        self.metrics = MetricsFile(workdir / "metrics.jsonl", step, trackers)
        self.heart = Heartbeat(workdir, self.plan.train_steps)
        if not jax.process_index():
            self.tok.save(workdir)

    def _initial(self) -> tuple[Params, list[str]]:
        """The parameters to begin with, and what they were made from, oldest first."""
        config = self.config
        if not config.init:
            return init_params(config.model, jax.random.key(config.seed)), ["random weights"]
        model = load_model(config.init, config.data.tokenizer)
        check_same_model(config.model, model.cfg, config.init)
        return model.params, model.lineage.get("lineage", [])

    def _initial_again(self) -> Params:
        """The parameters that the run began with, after whatever steps."""
        if self.base is not None:
            return self.base
        if not int(self.state.step):
            return self.state.params
        return self._same_initial()

    def _same_initial(self) -> Params:
        params, digest = self._initial()[0], self.meta["begun_with"]
        found = params_digest(params)
        if found != digest:
            raise ValueError(
                f"{self.workdir} was begun with parameters of digest {digest}, those of "
                f"{self.config.init} now are {found}; restore them, or take another --workdir"
            )
        return params

    def _restored(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest saved state and what is saved beside it, None where nothing was saved."""
        got = self.checkpointer.restore(abstract_state(self.config, self.optimizer))
        if got is None:
            return None
        state, self.meta = got
        packed, before = self.packed.folder.name, self.meta["packed"]
        if before != packed:
            raise ValueError(
                f"{self.workdir} was begun with the packed set {before}; data, tokenizer or mesh "
                f"now make it {packed}; restore them, or take another --workdir"
            )
        if self.config.lora:
            self.base = freeze(self._same_initial(), self.config.lora.base, self.config.model.dtype)
        logging.info("going on from step %d of %s", int(state.step), self.workdir)
        return got

    def _begun(self) -> tuple[TrainState, dict[str, Any]]:
        """The state of step 0, and what will be saved beside it."""
        config = self.config
        params, lineage = self._initial()
        digest = params_digest(params)
        steps, dataset = self.plan.train_steps, self.packed.manifest["made_from"]["dataset"]
        meta: dict[str, Any] = {
            "model": dataclasses.asdict(config.model),
            "config": config.to_dict(),
            "packed": self.packed.folder.name,
            "dataset_digest": dataset,
            "total_steps": steps,
            "begun_with": digest,
            "lineage": [*lineage, stage_line(config, steps, dataset, digest)],
        }
        if config.dpo:
            # What is scored before the first step: the base as it is held.
            held = config.lora.base if config.lora else "full"
            scored = digest if held == "full" else f"{digest} in {held}"
            meta["reference"] = reference_parts(config, scored, self.packed)
            meta["reference_digest"] = reference_digest(meta["reference"])
        if config.lora:
            meta |= {
                "lora": dataclasses.asdict(config.lora),
                "base": {"source": config.init, "digest": digest},
            }
            self.base = freeze(params, config.lora.base, config.model.dtype)
            params = init_adapters(config.model, config.lora, jax.random.key(config.seed))
        zero = jax.device_put(jnp.int32(0), named_sharding(spec("")))
        state = TrainState(zero, params, jax.jit(self.optimizer.init)(params))
        if config.dpo and config.dpo.reference == "synced":
            state = state._replace(reference=jax.tree.map(jnp.copy, params))
        if config.dpo and config.dpo.bco_decay is not None:
            none = jax.device_put(jnp.float32(0), named_sharding(spec("")))
            state = state._replace(shift=RewardShift(none, jnp.copy(none)))
        return state, meta

    def batches(self, split: str, start: int, stop: int) -> Iterator[tuple[HostBatch, Any]]:
        """Each host batch with its batch on the devices."""
        seed, workers = self.config.seed, self.config.data.workers if split == "train" else 0
        for host in read_batches(self.packed, self.plan, split, start, stop, seed, workers):
            rows = device_rows(host)
            if self.reference:
                logps = self.reference.logps(host, rows, self.state)
                yield host, device_pairs(host, rows, logps)
            else:
                yield host, rows

    def train(self, began: float) -> TrainState:
        """Runs the steps that are left and returns the last state."""
        config, start, total = self.config.train, int(self.state.step), self.plan.train_steps
        log_start(self.config, self.packed, self.plan, start)
        step, evaluate = jitted_steps(self.config, self.sums, self.optimizer)
        peak = step_at_peak(self.config, self.plan.rows_per_batch)
        clock = Clock(total, began, self.metrics.before, step_at_peak=peak)
        meter, late, at = Meter(), None, start
        shown = {"desc": self.config.name, "unit": "step", "mininterval": 1}
        bar = tqdm(total=total, initial=start, disable=bool(jax.process_index()), **shown)
        with (
            bar,
            contextlib.closing(self.checkpointer),
            contextlib.closing(self.metrics),
            stop_signals() as stopping,
        ):
            self.heart.beat(start)
            if self.due(start) and not first_decides(lambda: self.metrics.has(start, "eval")):
                self.evaluate(evaluate, start, stopping)
            for at, (_, batch) in enumerate(self.batches("train", start, total), start + 1):
                clock.begin_step()
                with self.profiler.around(at):
                    self.state, now = step(self.state, batch, self.base)
                if self.reference:
                    self.state = self.reference.after(self.state, at)
                if late is not None:  # one step late, so that the device never waits for the host
                    meter.add(late)
                late = now
                bar.update()
                stops = stopping.at(at)
                saves = at == total or _every(config.checkpoint_every, at) or stops
                logs = saves or self.due(at) or _every(config.log_every, at)
                if logs:
                    meter.add(late)
                clock.end_step()
                self.profiler.after(at, self.state, last=at == total or stops)
                self.heart.beat(at)
                if logs:
                    self.log(bar, meter, clock, at)
                    meter, late = Meter(), None
                if saves:
                    self.metrics.flush()
                    self.checkpointer.save(self.state, self.meta)
                if self.due(at):
                    self.evaluate(evaluate, at, stopping)
                if saves or self.due(at):
                    clock.skip()
                if stops or stopping.asked:
                    if not saves:
                        self.checkpointer.save(self.state, self.meta)
                    break
        self.heart.beat(at, "stopped" if at < total else "done")
        if at < total:
            logging.info("stopped at step %d of %d; start again to go on from there", at, total)
            raise SystemExit(STOPPED)
        logging.info("%s: %d steps done; results in %s", self.config.name, total, self.workdir)
        return self.state

    def due(self, step: int) -> bool:
        """Whether the held-out set is evaluated after this step."""
        last = self.plan.train_steps
        return step in (0, last) or _every(self.config.train.eval_every, step)

    def log(self, bar: tqdm, meter: Meter, clock: Clock, step: int) -> None:
        """Writes the means of the steps since the last line; stops where the loss is not finite."""
        means = meter.means()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                raise FloatingPointError(
                    f"{name} is {means[name]} at step {step}; checkpoints in {self.workdir} are "
                    f"from before; try a lower optim.peak_lr in another --workdir"
                )
        rates = clock.read(meter, step, pairs=self.config.dpo is not None)
        # The rate that the last of these steps used: schedules count from 0.
        rate = float(np.asarray(self.schedule(step - 1)))
        more = {"learning_rate": rate, "target_tokens": meter.total("target_tokens")}
        self.metrics.write(step, "train", means | more | rates)
        shown = {"loss": f"{means['loss']:.4f}", "tok/s": f"{rates['target_tokens_per_s']:.0f}"}
        if self.config.dpo:
            shown["acc"] = f"{means['rewards/accuracies']:.2f}"
        bar.set_postfix(shown, refresh=False)

    def evaluate(self, evaluate: Any, step: int, stopping: Stopping) -> None:
        """Means over the whole held-out set, exact whatever the batch size."""
        shift = 0.0 if self.state.shift is None else self.state.shift.delta
        given = StepInputs(base=self.base, shift=shift)
        heldout = Heldout(self.config, self.packed)
        for host, batch in self.batches("eval", 0, self.plan.eval_steps):
            heldout.add(host, batch, evaluate(self.state.params, batch, given))
            self.heart.beat(step, "eval")
            if stopping.asked:  # the run that goes on from here evaluates first
                return
        means = heldout.means()
        heldout.save(self.workdir / "evaluations" / f"{step:06d}.npz")
        self.metrics.write(step, "eval", means)
        shown = {name: value for name, value in means.items() if "source/" not in name}
        said = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        logging.info("step %d  %s", step, said)


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
