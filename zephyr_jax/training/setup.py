"""What a run is made of before its first step: tokenizer, packed set, and whether all fits."""

from __future__ import annotations

import dataclasses

import jax
from absl import logging

from zephyr_jax.chips import peak_flops
from zephyr_jax.config.run import MistralConfig, RunConfig
from zephyr_jax.data.packing.batches import Plan
from zephyr_jax.data.packing.packed import PackedSet, build_packed, open_packed, packed_folder
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.models.flops import train_flops
from zephyr_jax.models.parameters import count_params
from zephyr_jax.sharding import axis_size
from zephyr_jax.training.optim import warmup_steps
from zephyr_jax.weights.checkpoint import find_tokenizer, resolve


def pack(config: RunConfig, shards: int) -> PackedSet:
    """The run's packed set for a mesh whose data x fsdp is `shards`, built where it is missing."""
    tok = run_tokenizer(config)
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


def stage_line(config: RunConfig, steps: int, dataset: str, begun_with: str) -> str:
    """What the model card will say of this stage."""
    sets = " + ".join(config.data.dataset_weights)
    return (
        f"{'DPO' if config.dpo else 'SFT'} by the recipe {config.name}, {steps} steps on "
        f"{sets} {config.data.train_split} (digest {dataset[:16]}), begun with "
        f"parameters of digest {begun_with[:16]}"
    )


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the configuration names, or that lies beside its initial model."""
    if not (config.data.tokenizer or config.init):
        raise ValueError("config.data.tokenizer is empty and there is no init to take it from")
    return find_tokenizer(config.data.tokenizer or resolve(config.init, weights=False))


def check_vocabulary(config: RunConfig, tok: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer has ids that the model does not."""
    if tok.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tok.vocab_size} pieces, config.model.vocab_size is only "
            f"{config.model.vocab_size}"
        )


def _rows_multiple(config: RunConfig) -> int:
    return axis_size("data", "fsdp") * config.train.micro_batches


def run_packed(config: RunConfig, tok: Tokenizer) -> PackedSet:
    """The run's packed set for the ambient mesh, built where one process finds none.

    Raises:
        FileNotFoundError: if several processes find none.
    """
    multiple = _rows_multiple(config)
    packed = open_packed(config, tok, multiple)
    if packed is None and jax.process_count() > 1:
        raise FileNotFoundError(
            f"no packed set in {packed_folder(config, tok, multiple)}; pack it on one machine "
            f"first, by the same command with --pack_for={axis_size('data', 'fsdp')}, and copy "
            f"{config.data.data_dir} to every host (rsync --archive), to a disk that all of them "
            "mount, or to a bucket (--config.data.data_dir=gs://...)"
        )
    return packed or build_packed(config, tok, multiple)


def check_rows(config: RunConfig, plan: Plan) -> None:
    """Raises a ValueError if mesh and micro-batches do not divide the rows of a batch."""
    rows, multiple = plan.rows_per_batch, _rows_multiple(config)
    if rows % multiple:
        raise ValueError(
            f"train.batch_size={rows} rows is not divisible by data x fsdp x micro_batches = "
            f"{multiple}; use {rows // multiple * multiple or multiple}"
        )


def step_at_peak(config: RunConfig, rows: int) -> float | None:
    """Seconds of a step's model FLOPs at all devices' bfloat16 peak; None where that is not known.

    Adapters beside a frozen base count two thirds: no gradients of frozen parameters.
    """
    devices = jax.devices()
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    flops = train_flops(config.model, rows, config.data.seq_len) * (2 / 3 if config.lora else 1)
    return flops / (peak * len(devices))


def log_start(config: RunConfig, packed: PackedSet, plan: Plan, start: int) -> None:
    """Says what runs where on what."""
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
