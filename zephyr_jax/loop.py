"""`fit`, the only training loop. SFT and DPO are two step functions, not two trainers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from zephyr_jax.checkpoint import Checkpointer, find_tokenizer, load_model
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
from zephyr_jax.metrics import Clock, Meter, MetricsFile
from zephyr_jax.models.mistral import count_params, init_params
from zephyr_jax.optim import make_optimizer, make_schedule, warmup_steps
from zephyr_jax.reference import ReferenceLogps, compute_reference, load_reference, reference_digest
from zephyr_jax.sharding import axis_size, mesh_from_config, spec
from zephyr_jax.steps import loss_sums, reference_logps, train_step
from zephyr_jax.types import Params, TrainState

# A resumed run may differ from its start in these fields: they do not change what is computed.
_FREE = ("mesh", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "remat")


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
        _check_unclaimed(workdir, config)
        self.tok = _tokenizer(config)
        _check_vocabulary(config, self.tok)
        self.packed = _packed(config, self.tok)
        train = config.train
        self.plan = make_plan(self.packed, train.batch_size, train.epochs, train.max_steps)
        _check_rows(config, self.plan)
        self.schedule = make_schedule(config.optim, self.plan.train_steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        _claim(workdir, config)  # nothing is written before everything fits
        self.checkpointer = Checkpointer(workdir, train.keep_checkpoints)
        self.state, self.meta = self._state()
        self.frozen, self.ref = self._reference()
        self.metrics = MetricsFile(workdir / "metrics.jsonl", int(self.state.step))
        if not jax.process_index():
            self.tok.save(workdir)

    def _initial(self) -> Params:
        if not self.config.init:
            return init_params(self.config.model, jax.random.key(self.config.seed))
        model = load_model(self.config.init, self.config.data.tokenizer)
        check_same_model(self.config.model, model.cfg, self.config.init)
        return model.params

    def _state(self) -> tuple[TrainState, dict[str, Any]]:
        """The newest saved state, or step 0; shapes alone where a saved one will replace it."""
        params = self._initial()
        zero = jnp.zeros((), jnp.int32, out_sharding=spec(""))
        like = TrainState(zero, params, jax.jit(self.optimizer.init)(params))
        meta = {
            "model": dataclasses.asdict(self.config.model),
            "config": self.config.to_dict(),
            "packed": self.packed.folder.name,
            "dataset_digest": self.packed.manifest["made_from"]["dataset"],
            "init": self.config.init,
        }
        if self.config.dpo:
            meta["reference_digest"] = reference_digest(self.config, params, self.packed)
        got = self.checkpointer.restore(like)
        if got is None:
            return like, meta
        state, saved = got
        for name in ("packed", "reference_digest"):
            if saved.get(name) != meta.get(name):
                raise ValueError(
                    f"{self.workdir} was begun with {name} {saved.get(name)}, now it is "
                    f"{meta.get(name)}; restore what it was made from, or take another workdir"
                )
        logging.info("going on from step %d of %s", int(state.step), self.workdir)
        return state, meta

    def _reference(self) -> tuple[Params | None, ReferenceLogps | None]:
        """Frozen parameters to score with on the way, or stored log-probs, or neither (SFT)."""
        if not self.config.dpo:
            return None, None
        fresh = int(self.state.step) == 0
        in_memory = self.config.dpo.reference == "in_memory"
        digest = self.meta["reference_digest"]
        stored = None if in_memory else load_reference(self.packed, digest)
        if stored:
            return None, stored
        params = self.state.params if fresh else self._initial()
        if in_memory:
            # A copy: the step donates the policy's buffers.
            cast = functools.partial(jnp.array, dtype=self.config.model.dtype, copy=True)
            return jax.tree.map(cast, params), None
        return None, compute_reference(self.config, params, self.packed, self.plan, digest)

    def batches(self, split: str, start: int, stop: int) -> Iterator[tuple[HostBatch, Any]]:
        """Each host batch with its batch on the devices."""
        n_pairs = self.packed.manifest["pairs_per_row"]
        score = jax.jit(functools.partial(reference_logps, self.config.model, n_pairs=n_pairs))
        for host in read_batches(self.packed, self.plan, split, start, stop, self.config.seed):
            if not self.config.dpo:
                yield host, device_rows(host)
            elif self.ref:
                yield host, device_pairs(host, self.ref.lookup(host.pair_ids))
            else:
                empty = np.zeros((*host.pair_ids.shape, 2), np.float32)
                batch = device_pairs(host, empty)
                yield host, batch._replace(ref_logps=score(self.frozen, batch.rows))

    def train(self) -> TrainState:
        """Runs the steps that are left and returns the last state."""
        config, start, total = self.config.train, int(self.state.step), self.plan.train_steps
        _log_start(self.config, self.packed, self.plan, start)
        sums = loss_sums(self.config)
        step = jax.jit(train_step(sums, self.optimizer, config.micro_batches), donate_argnums=0)
        evaluate = jax.jit(lambda params, batch: sums(params, batch)[1])
        if start == 0:
            self.evaluate(evaluate, 0)
        meter, clock, late, at = Meter(), Clock(total), None, start
        bar = tqdm(total=total, initial=start, desc=self.config.name, unit="step", mininterval=1)
        with bar, _stop_signals() as stopping:
            for at, (_, batch) in enumerate(self.batches("train", start, total), start + 1):
                self.state, now = step(self.state, batch)
                if late is not None:  # one step late, so that the device never waits for the host
                    meter.add(late)
                late = now
                bar.update()
                ends = at == total or bool(stopping)
                saves = ends or _every(config.checkpoint_every, at)
                evaluates = at == total or _every(config.eval_every, at)
                if saves or evaluates or _every(config.log_every, at):
                    meter.add(late)
                    self.log(bar, meter, clock, at)
                    meter, late = Meter(), None
                if evaluates:
                    self.evaluate(evaluate, at)
                if saves:
                    self.checkpointer.save(self.state, self.meta)
                if saves or evaluates:
                    clock.skip()
                if ends:
                    break
        self.checkpointer.close()
        if at < total:
            raise SystemExit(f"stopped at step {at} of {total}; start again to go on from there")
        logging.info("%s: %d steps done; results in %s", self.config.name, total, self.workdir)
        return self.state

    def log(self, bar: tqdm, meter: Meter, clock: Clock, step: int) -> None:
        """Writes the means of the steps since the last line; stops where the loss is not finite."""
        means = meter.means()
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {step}; the last checkpoint in "
                f"{self.workdir} is whole; try a lower optim.peak_lr"
            )
        rates = clock.read(meter, step, pairs=self.config.dpo is not None)
        # The rate that the last of these steps used: schedules count from 0.
        rate = float(np.asarray(self.schedule(step - 1)))
        self.metrics.write(step, "train", means | {"learning_rate": rate} | rates)
        shown = {"loss": f"{means['loss']:.4f}", "tok/s": f"{rates['target_tokens_per_s']:.0f}"}
        if self.config.dpo:
            shown["acc"] = f"{means['rewards/accuracies']:.2f}"
        bar.set_postfix(shown, refresh=False)

    def evaluate(self, evaluate: Any, step: int) -> None:
        """Means over the whole held-out set, exact whatever the batch size."""
        meter = Meter()
        for _, batch in self.batches("eval", 0, self.plan.eval_steps):
            meter.add(evaluate(self.state.params, batch))
        means = {f"eval_{name}": value for name, value in meter.means().items()}
        self.metrics.write(step, "eval", means)
        said = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        logging.info("step %d  %s", step, said)


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _check_unclaimed(workdir: Path, config: RunConfig) -> None:
    """Raises a ValueError where an earlier run in `workdir` had another configuration."""
    path = workdir / "run_config.json"
    if not path.is_file():
        return
    before, now = _flat(json.loads(path.read_text())), _flat(config.to_dict())
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not set(name.split(".")) & set(_FREE)
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds another run: {'; '.join(differing)}; take another --workdir"
        )


def _claim(workdir: Path, config: RunConfig) -> None:
    """Writes the resolved configuration of a new run."""
    path = workdir / "run_config.json"
    if jax.process_index() or path.is_file():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=1))
    os.replace(temporary, path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        whole = f"{prefix}{name}"
        out |= _flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}
    return out


def _tokenizer(config: RunConfig) -> Tokenizer:
    if not (config.data.tokenizer or config.init):
        raise ValueError("config.data.tokenizer is empty and there is no init to take it from")
    return find_tokenizer(config.data.tokenizer or config.init)


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


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying, so that a checkpoint can be written."""
    caught: list[int] = []
    try:
        old = {s: signal.signal(s, lambda n, _: caught.append(n)) for s in _SIGNALS}
    except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
        old = {}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
