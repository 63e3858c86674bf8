"""`fit`, the only training loop. SFT and DPO are two step functions, not two trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from zephyr_jax.checkpoint import Checkpointer, find_tokenizer, load_model, resolve
from zephyr_jax.config import MistralConfig, RunConfig
from zephyr_jax.data.packed import PackedSet, build_packed, open_packed, packed_folder
from zephyr_jax.data.pipeline import (
    HostBatch,
    Plan,
    device_pairs,
    device_rows,
    make_plan,
    read_batches,
)
from zephyr_jax.data.tokenizer import Tokenizer
from zephyr_jax.distributed import Stopping, check_started, stop_signals
from zephyr_jax.metrics import Clock, Meter, MetricsFile
from zephyr_jax.models.mistral import abstract_params, count_params, init_params
from zephyr_jax.optim import make_optimizer, make_schedule, warmup_steps
from zephyr_jax.reference import (
    ReferenceLogps,
    compute_reference,
    load_reference,
    params_digest,
    reference_digest,
)
from zephyr_jax.sharding import axis_size, mesh_from_config, named, spec
from zephyr_jax.steps import eval_step, loss_sums, reference_logps, train_step
from zephyr_jax.types import Params, TrainState
from zephyr_jax.workdir import check_unclaimed, claim


def fit(config: Any, workdir: str | Path | None = None) -> TrainState:
    """Trains as the configuration says, or goes on where an earlier run in `workdir` stopped.

    Packs the set first where that has not been done. Leaves checkpoints, `metrics.jsonl`,
    `run_config.json` and the tokenizer in `workdir` (None: `runs/NAME`).

    Args:
        config: a RunConfig, or the ConfigDict of a config file.
        workdir: the run's folder.

    Raises:
        ValueError: if the configuration does not fit itself, its data, its mesh, its initial model
            or an earlier run in the same folder.
        FloatingPointError: if the loss stops being a finite number.
    """
    if not isinstance(config, RunConfig):
        config = RunConfig.from_config_dict(config)
    check_started()
    workdir = Path(workdir or Path("runs") / config.name)
    mesh = jax.sharding.get_mesh()
    with (
        contextlib.nullcontext() if not mesh.empty else jax.set_mesh(mesh_from_config(config.mesh))
    ):
        return _Run(config, workdir).train()


def pack(config: RunConfig, shards: int) -> PackedSet:
    """The run's packed set for a mesh whose data x fsdp is `shards`, built where it is missing."""
    tok = _tokenizer(config)
    multiple = shards * config.train.micro_batches
    return open_packed(config, tok, multiple) or build_packed(config, tok, multiple)


def check_same_model(wanted: MistralConfig, found: MistralConfig, source: str) -> None:
    """Raises a ValueError naming every field in which the initial model is another architecture."""
    free = ("dtype", "initializer_range", "max_position_embeddings")
    fields = [f.name for f in dataclasses.fields(wanted) if f.name not in free]
    differing = [
        f"{name} is {getattr(found, name)}, config.model says {getattr(wanted, name)}"
        for name in fields
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(f"{source} is another model: {'; '.join(differing)}")


class _Run:
    """One run's parts, made in the order in which they depend on each other."""

    def __init__(self, config: RunConfig, workdir: Path):
        self.config, self.workdir = config, workdir
        check_unclaimed(workdir, config)
        self.tok = _tokenizer(config)
        _check_vocabulary(config, self.tok)
        self.packed = _packed(config, self.tok)
        train = config.train
        self.plan = make_plan(self.packed, train.batch_size, train.epochs, train.max_steps)
        _check_rows(config, self.plan)
        self.schedule = make_schedule(config.optim, self.plan.train_steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        self.checkpointer = Checkpointer(workdir, train.keep_checkpoints)
        self.state, self.meta = self._state()
        self.frozen, self.ref = self._reference()
        n_pairs = self.packed.manifest["pairs_per_row"]
        shape = {"n_pairs": n_pairs, "n_micro": train.micro_batches, "attention": train.attention}
        self.score = jax.jit(functools.partial(reference_logps, config.model, **shape))
        claim(workdir, config)  # nothing is written before everything fits
        self.metrics = MetricsFile(workdir / "metrics.jsonl", int(self.state.step))
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

    def _state(self) -> tuple[TrainState, dict[str, Any]]:
        """The newest saved state, or one of step 0, and what is saved beside it."""
        got = self.checkpointer.restore(self._abstract_state())
        packed = self.packed.folder.name
        if got is not None:
            state, meta = got
            if meta["packed"] != packed:
                raise ValueError(
                    f"{self.workdir} was begun with the packed set {meta['packed']}; data, "
                    f"tokenizer or mesh now make it {packed}; restore them, or take another "
                    f"--workdir"
                )
            logging.info("going on from step %d of %s", int(state.step), self.workdir)
            return state, meta
        params, lineage = self._initial()
        steps, dataset = self.plan.train_steps, self.packed.manifest["made_from"]["dataset"]
        stage = _stage_line(self.config, steps, dataset, params_digest(params))
        meta = {
            "model": dataclasses.asdict(self.config.model),
            "config": self.config.to_dict(),
            "packed": packed,
            "dataset_digest": dataset,
            "total_steps": steps,
            "lineage": [*lineage, stage],
        }
        if self.config.dpo:
            meta["reference_digest"] = reference_digest(self.config, params, self.packed)
        zero = jax.device_put(jnp.int32(0), named(spec("")))
        return TrainState(zero, params, jax.jit(self.optimizer.init)(params)), meta

    def _abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated."""
        params = abstract_params(self.config.model)
        opt_state = jax.tree.map(
            # A moment is divided like its parameter; a counter has no sharding of its own.
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=named(x.sharding.spec if x.sharding else spec(""))
            ),
            jax.eval_shape(self.optimizer.init, params),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=named(spec("")))
        return TrainState(step, params, opt_state)  # type: ignore[arg-type]  # shapes of arrays

    def _reference(self) -> tuple[Params | None, ReferenceLogps | None]:
        """Frozen parameters to score with on the way, or stored log-probs, or neither (SFT)."""
        if not self.config.dpo:
            return None, None
        in_memory = self.config.dpo.reference == "in_memory"
        digest = self.meta["reference_digest"]
        stored = None if in_memory else load_reference(self.packed, digest)
        if stored:
            return None, stored
        params = self.state.params
        if int(self.state.step):
            params = self._initial()[0]
            found = reference_digest(self.config, params, self.packed)
            if found != digest:
                raise ValueError(
                    f"{self.workdir} was begun with reference {digest}, {self.config.init} now is "
                    f"{found}; restore it, or take another --workdir"
                )
        if in_memory:
            # A copy: the step donates the policy's buffers.
            cast = functools.partial(jnp.array, dtype=self.config.model.dtype, copy=True)
            return jax.tree.map(cast, params), None
        return None, compute_reference(self.config, params, self.packed, self.plan, digest)

    def batches(self, split: str, start: int, stop: int) -> Iterator[tuple[HostBatch, Any]]:
        """Each host batch with its batch on the devices."""
        seed, workers = self.config.seed, self.config.data.workers if split == "train" else 0
        for host in read_batches(self.packed, self.plan, split, start, stop, seed, workers):
            if not self.config.dpo:
                yield host, device_rows(host)
            elif self.ref:
                yield host, device_pairs(host, self.ref.lookup(host.pair_ids))
            else:
                empty = np.zeros((*host.pair_ids.shape, 2), np.float32)
                batch = device_pairs(host, empty)
                yield host, batch._replace(ref_logps=self.score(self.frozen, batch.rows))

    def train(self) -> TrainState:
        """Runs the steps that are left and returns the last state."""
        config, start, total = self.config.train, int(self.state.step), self.plan.train_steps
        _log_start(self.config, self.packed, self.plan, start)
        sums = loss_sums(self.config)
        step = jax.jit(train_step(sums, self.optimizer, config.micro_batches), donate_argnums=0)
        evaluate = jax.jit(eval_step(sums, config.micro_batches))
        meter, clock, late, at = Meter(), Clock(total), None, start
        shown = {"desc": self.config.name, "unit": "step", "mininterval": 1}
        bar = tqdm(total=total, initial=start, disable=bool(jax.process_index()), **shown)
        with bar, contextlib.closing(self.checkpointer), stop_signals() as stopping:
            if self.due(start) and not self.metrics.has(start, "eval"):
                self.evaluate(evaluate, start, stopping)
            for at, (_, batch) in enumerate(self.batches("train", start, total), start + 1):
                self.state, now = step(self.state, batch)
                if late is not None:  # one step late, so that the device never waits for the host
                    meter.add(late)
                late = now
                bar.update()
                stops = stopping.at(at)
                saves = at == total or _every(config.checkpoint_every, at) or stops
                if saves or self.due(at) or _every(config.log_every, at):
                    meter.add(late)
                    self.log(bar, meter, clock, at)
                    meter, late = Meter(), None
                if saves:
                    self.checkpointer.save(self.state, self.meta)
                if self.due(at):
                    self.evaluate(evaluate, at, stopping)
                if saves or self.due(at):
                    clock.skip()
                if stops or stopping.asked:
                    if not saves:
                        self.checkpointer.save(self.state, self.meta)
                    break
        if at < total:
            raise SystemExit(f"stopped at step {at} of {total}; start again to go on from there")
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
        self.metrics.write(step, "train", means | {"learning_rate": rate} | rates)
        shown = {"loss": f"{means['loss']:.4f}", "tok/s": f"{rates['target_tokens_per_s']:.0f}"}
        if self.config.dpo:
            shown["acc"] = f"{means['rewards/accuracies']:.2f}"
        bar.set_postfix(shown, refresh=False)

    def evaluate(self, evaluate: Any, step: int, stopping: Stopping) -> None:
        """Means over the whole held-out set, exact whatever the batch size."""
        meter = Meter()
        for _, batch in self.batches("eval", 0, self.plan.eval_steps):
            meter.add(evaluate(self.state.params, batch))
            if stopping.asked:  # the run that goes on from here evaluates first
                return
        means = {f"eval_{name}": value for name, value in meter.means().items()}
        self.metrics.write(step, "eval", means)
        said = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        logging.info("step %d  %s", step, said)


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _stage_line(config: RunConfig, steps: int, dataset: str, begun_with: str) -> str:
    """What the model card will say of this stage."""
    return (
        f"{'DPO' if config.dpo else 'SFT'} by the recipe {config.name}, {steps} steps on "
        f"{config.data.dataset} {config.data.train_split} (digest {dataset[:16]}), begun with "
        f"parameters of digest {begun_with[:16]}"
    )


def _tokenizer(config: RunConfig) -> Tokenizer:
    if not (config.data.tokenizer or config.init):
        raise ValueError("config.data.tokenizer is empty and there is no init to take it from")
    return find_tokenizer(config.data.tokenizer or resolve(config.init, weights=False))


def _check_vocabulary(config: RunConfig, tok: Tokenizer) -> None:
    if tok.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size} pieces, config.model.vocab_size is only "
            f"{config.model.vocab_size}"
        )


def _rows_multiple(config: RunConfig) -> int:
    return axis_size("data", "fsdp") * config.train.micro_batches


def _packed(config: RunConfig, tok: Tokenizer) -> PackedSet:
    multiple = _rows_multiple(config)
    packed = open_packed(config, tok, multiple)
    if packed is None and jax.process_count() > 1:
        raise FileNotFoundError(
            f"no packed set in {packed_folder(config, tok, multiple)}; pack it on one machine "
            f"first, by the same command with --pack_for={axis_size('data', 'fsdp')}"
        )
    return packed or build_packed(config, tok, multiple)


def _check_rows(config: RunConfig, plan: Plan) -> None:
    rows, multiple = plan.rows_per_batch, _rows_multiple(config)
    if rows % multiple:
        raise ValueError(
            f"train.batch_size={rows} rows is not divisible by data x fsdp x micro_batches = "
            f"{multiple}; use {rows // multiple * multiple or multiple}"
        )


def _log_start(config: RunConfig, packed: PackedSet, plan: Plan, start: int) -> None:
    mesh = jax.sharding.get_mesh()
    logging.info(
        "%s: jax %s on %d %s device(s), mesh %s; %s parameters in %s; packed set %s",
        *(config.name, jax.__version__, jax.device_count(), jax.default_backend()),
        *(dict(mesh.shape), f"{count_params(config.model):,}", config.model.dtype, packed.folder),
    )
    logging.info(
        "steps %d to %d (%d an epoch, %d warm-up), %d rows of %d tokens a batch",
        *(start, plan.train_steps, plan.steps_per_epoch),
        *(warmup_steps(config.optim, plan.train_steps), plan.rows_per_batch, config.data.seq_len),
    )
