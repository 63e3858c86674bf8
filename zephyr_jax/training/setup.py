"""`setup`: from a configuration to a run whose every part is built and checked."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import optax
from absl import logging
from etils import epath

from zephyr_jax.chips import keep_programs
from zephyr_jax.config import require
from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import DataConfig, MistralConfig, RunConfig
from zephyr_jax.data.packing import packed as packed_sets
from zephyr_jax.data.packing.batches import Plan, make_plan
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.packing.packing import LEAST_STEPS
from zephyr_jax.data.text.tokenizer import Tokenizer
from zephyr_jax.distributed import agree
from zephyr_jax.evaluation.metrics_file import check_best, check_trackers
from zephyr_jax.losses.preference import LABEL_WEIGHTS, balanced, loss_of
from zephyr_jax.models.lora import check_blocks, freeze, init_adapters
from zephyr_jax.models.mistral import init_params
from zephyr_jax.sharding import BATCH, axis_size
from zephyr_jax.training.metrics import Clock
from zephyr_jax.training.optim import make_optimizer, make_schedule, warmup_steps
from zephyr_jax.training.reference import Reference, reference_digest, reference_parts
from zephyr_jax.training.steps import abstract_state, initial_state
from zephyr_jax.training.workdir import changes, check_unclaimed, run_facts
from zephyr_jax.types import Params, TrainState
from zephyr_jax.weights import sources
from zephyr_jax.weights.checkpoint import Checkpointer, Model, params_digest, saved_steps
from zephyr_jax.weights.exports import check_exportable


@dataclasses.dataclass
class Run:
    """The parts of a run, all checked."""

    config: RunConfig  # with the sizes of its mesh
    workdir: epath.Path
    tok: Tokenizer
    packed: PackedSet
    plan: Plan
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    checkpointer: Checkpointer
    state: TrainState  # to go on from
    meta: dict[str, Any]  # saved with every checkpoint
    base: Params | None  # the frozen parameters, if adapters are trained
    reference: Reference | None
    clock: Clock

    @property
    def dpo(self) -> DpoConfig | None:
        """The preference stage, with the weights of labels that the packed set asks for."""
        dpo, counts = self.config.dpo, self.packed.manifest["splits"]["train"]
        return balanced(dpo, counts) if dpo and dpo.labeled else dpo


def setup(config: RunConfig, workdir: str | os.PathLike[str], clock: Clock | None = None) -> Run:
    """Builds and checks every part of a run, on the ambient mesh; `workdir` gets programs alone."""
    clock, workdir = clock or Clock(), epath.Path(workdir)
    clock.end("start")
    try:
        tok, packed, plan = _inputs(config, workdir, clock)
        facts = run_facts(config.to_dict(), packed, workdir) if jax.process_count() > 1 else {}
    except Exception as error:  # the other processes must not wait for this one
        agree({"setup error": f"{type(error).__name__}: {error}"})
        raise
    agree({"setup error": None})
    agree(facts)
    keep_programs(workdir / "programs" if jax.process_count() > 1 else "")  # none of a refused run
    clock.end("data")
    schedule = make_schedule(config.optim, plan.train_steps)
    optimizer = make_optimizer(config.optim, schedule)
    checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
    restored = checkpointer.restore(abstract_state(config, optimizer))
    other, held_to = config.dpo.reference_model if config.dpo else "", None
    if restored is None:
        held_to = _load_same(config, other).params if other else None
        state, meta, base = _first_state(config, optimizer, packed, plan.train_steps, held_to)
    else:
        (state, meta), base = restored, None
        check_same_packed(packed, meta["packed"], workdir)
        if config.lora:
            base = same_initial(config, workdir, meta["init_digest"])
            base = freeze(base, config.lora.base, config.model.dtype)
        logging.info("going on from step %d of %s", int(state.step), workdir)

    def scored() -> Params:
        if other:
            params = held_to
            if params is None:
                params = _load_same(config, other).params
                sources.check_base(params, meta["reference_model"]["digest"], other, str(workdir))
            return freeze(params, config.lora.base, config.model.dtype) if config.lora else params
        if base is not None:
            return base
        if not int(state.step):
            return state.params
        return same_initial(config, workdir, meta["init_digest"])

    clock.end("init" if restored is None else "restore")
    reference = None
    if config.dpo:
        reference = Reference(config, packed, plan, meta["reference"], scored)
    parts = schedule, optimizer, checkpointer, state
    return Run(config, workdir, tok, packed, plan, *parts, meta, base, reference, clock)


def check_same_packed(packed: PackedSet, before: str, workdir: epath.Path) -> None:
    """Raises a ValueError if a run began with another set, a folder next to this one."""
    if packed.folder.name == before:
        return
    folder = epath.Path(packed.home or packed.folder).parent / before
    why = "and is gone"
    if (folder / "manifest.json").is_file():
        made_from = packed_sets.read_manifest(folder)["made_from"]
        why = changes(made_from, packed.manifest["made_from"])
    raise ValueError(
        f"{workdir} began with the packed set {before}, now it is {packed.folder.name}: {why}; "
        "restore that, or take another --workdir"
    )


def _inputs(
    config: RunConfig, workdir: epath.Path, clock: Clock
) -> tuple[Tokenizer, PackedSet, Plan]:
    """What the run reads, checked by this process alone: no device waits for another."""
    model, train = config.model, config.train
    check_unclaimed(workdir, config.to_dict())
    check_trackers(train.trackers, workdir)
    if config.dpo:
        loss_of(config.dpo, train.micro_batches)
    if config.lora and config.lora.base != "full":
        check_blocks(model)
    tok = run_tokenizer(config.data, config.init, compare=not saved_steps(workdir))
    if config.dpo and config.dpo.reference_model:
        sources.check_same_tokenizer(tok, config.dpo.reference_model, "dpo.reference_model")
    rule, fits = f"at least {tok.vocab_size}, as its tokenizer", tok.vocab_size <= model.vocab_size
    require(fits, "config.model.vocab_size", model.vocab_size, rule)
    check_exportable(model, tok)
    clock.end("checks")
    packed, multiple = pack(config, tok), axis_size(*BATCH) * train.micro_batches
    plan = make_plan(packed, train.batch_size, train.epochs, train.max_steps, multiple)
    check_plan(config, packed, plan, multiple)
    if config.dpo and config.dpo.labeled:
        dpo = balanced(config.dpo, packed.manifest["splits"]["train"])
        logging.info("kto: weights of labels %g and %g", *map(dpo.option, LABEL_WEIGHTS))
    return tok, packed, plan


def check_plan(config: RunConfig, packed: PackedSet, plan: Plan, multiple: int) -> None:
    """Refuses a plan that does not fit the mesh or its set; warns of one that teaches little."""
    train, rows, steps = config.train, plan.rows_per_batch, plan.train_steps
    split, step = packed.manifest["splits"]["train"], 1 if config.dpo else multiple
    unit, examples = ("pairs", split["documents"]) if config.dpo else ("rows", split["rows"])
    if train.batch_size > examples:
        fewer = max(examples // 4 // step, 1) * step
        raise ValueError(
            f"train.batch_size={train.batch_size} is more than the {examples} {unit} of the "
            f"training set; use --config.train.batch_size={fewer} and --config.train.epochs=0"
        )
    rule = f"divisible by data x fsdp x micro_batches = {multiple}; use "
    fewer = rows // multiple * multiple or multiple
    require(rows % multiple == 0, "train.batch_size", f"{rows} rows", f"{rule}{fewer}")
    within = not train.profile or train.profile[1] - 1 <= steps
    require(within, "train.profile", train.profile, f"within the run's {steps} steps")
    if config.dpo:
        needed = packed.manifest["rows_per_batch"]
        fill = split["tokens"] * needed / (split["rows"] * rows * config.data.seq_len)
        if fill < 0.7 and rows > needed:
            logging.warning(
                f"rows are only {fill:.0%} full: pairs need {needed} of them, and data x fsdp x "
                f"micro_batches = {multiple} rounds that to {rows}; give further chips to tensor"
            )
    warmup = warmup_steps(config.optim, steps)
    if config.optim.warmup_from_zero and warmup == steps == 1:
        raise ValueError(
            "the run's one step is a warm-up that begins at 0, so nothing would be learned; use "
            "--config.optim.warmup_ratio=0, or more steps (train.epochs, train.batch_size)"
        )
    if warmup == steps:
        logging.warning("all %d steps are warm-up; use a lower optim.warmup_ratio", steps)
    if steps < LEAST_STEPS // 4 and not train.max_steps:
        logging.warning(
            f"{steps} steps over {examples} {unit} teach little; --config.train.epochs=0 takes as "
            f"many epochs as make {LEAST_STEPS} steps, or use a smaller train.batch_size"
        )
    check_best(train, plan.eval_steps and steps, config.dpo)


def run_tokenizer(data: DataConfig, init: str, compare: bool = True) -> Tokenizer:
    """The configured tokenizer, by default that of `init`; a ValueError if another by mistake."""
    if not (data.tokenizer or init):
        raise ValueError("config.data.tokenizer is empty and there is no init to take it from")
    tok = sources.find_tokenizer(data.tokenizer or sources.resolve(init, weights=False))
    if compare and init and data.tokenizer and not data.new_tokenizer:
        sources.check_same_tokenizer(tok, init)
    return tok


def pack(config: RunConfig, tok: Tokenizer | None = None) -> PackedSet:
    """The run's packed set, which is the same on every mesh; one process builds what it lacks."""
    tok = tok or run_tokenizer(config.data, config.init)
    packed = packed_sets.open_packed(config, tok)
    if packed is None and jax.process_count() > 1:
        raise FileNotFoundError(
            f"no packed set in {packed_sets.packed_folder(config, tok)}; pack it on one machine "
            "first, by the same command with --pack_only, and copy data.data_dir to every host, to "
            "a disk that all of them mount, or to a bucket"
        )
    return packed or packed_sets.build_packed(config, tok)


def _initial(config: RunConfig) -> tuple[Params, list[str], MistralConfig]:
    """The parameters to begin with, their history, oldest first, and the model as its files say."""
    cfg = config.model
    if not config.init:
        return init_params(cfg, jax.random.key(config.seed)), ["random weights"], cfg
    model = _load_same(config, config.init)
    cfg = dataclasses.replace(cfg, eos_token_id=model.cfg.eos_token_id)
    return model.params, model.lineage.get("lineage", []), cfg


def _load_same(config: RunConfig, source: str) -> Model:
    model = sources.load_model(source, config.data.tokenizer)
    check_same_model(config.model, model.cfg, source)
    sources.check_all_finite(model.params, source)
    return model


def check_same_model(wanted: MistralConfig, other: MistralConfig, source: str) -> None:
    """Raises a ValueError naming every field in which a model is of another architecture."""
    free = ("dtype", "initializer_range", "max_position_embeddings")
    if set(wanted.end_ids) <= set(other.end_ids):  # the trained model keeps all of the other's
        free += ("eos_token_id",)
    theirs = dataclasses.asdict(other)
    differing = [
        f"{name} is {theirs[name]}, config.model says {value}"
        for name, value in dataclasses.asdict(wanted).items()
        if name not in free and theirs[name] != value
    ]
    if differing:
        raise ValueError(f"{source} is another model: {'; '.join(differing)}")


def same_initial(config: RunConfig, workdir: epath.Path, digest: str) -> Params:
    """The initial parameters again; a ValueError if their digest has changed."""
    params = _initial(config)[0]
    sources.check_base(params, digest, config.init, str(workdir))
    return params


def _first_state(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    packed: PackedSet,
    steps: int,
    held_to: Params | None,
) -> tuple[TrainState, dict[str, Any], Params | None]:
    """The state of step 0 (`held_to`: the reference), what is saved with it, the frozen base."""
    (params, lineage, model), lora = _initial(config), config.lora
    digest, dataset = params_digest(params), packed.manifest["made_from"]["dataset"]
    stage, sets = "DPO" if config.dpo else "SFT", " + ".join(config.data.dataset_weights)
    line = (
        f"{stage} by the recipe {config.name}, {steps} steps on {sets} {config.data.splits[0]} "
        f"(digest {dataset[:16]}), from parameters of digest {digest[:16]}"
    )
    meta: dict[str, Any] = {
        "model": dataclasses.asdict(model),
        "config": config.to_dict(),
        "packed": packed.folder.name,
        "tokenizer": packed.manifest["made_from"]["tokenizer"],
        "dataset_digest": dataset,
        "total_steps": steps,
        "init_digest": digest,
        "lineage": [*lineage, line],
    }
    if config.dpo:
        scored = digest
        if held_to is not None:
            scored = params_digest(held_to)
            meta["reference_model"] = {"source": config.dpo.reference_model, "digest": scored}
            meta["lineage"][-1] += f", held to parameters of digest {scored[:16]}"
        # What is scored before the first step: a base as it is held.
        scored = scored if not lora or lora.base == "full" else f"{scored} in {lora.base}"
        parts = reference_parts(packed, scored, model.dtype, config.dpo.option("ld_alpha"))
        meta |= {"reference": parts, "reference_digest": reference_digest(parts)}
    base = None
    if lora:
        meta["lora"] = dataclasses.asdict(lora)
        meta["base"] = {"source": config.init, "digest": digest}
        base = freeze(params, lora.base, model.dtype)
        params = init_adapters(model, lora, jax.random.key(config.seed))
    meta["start_digest"] = params_digest(params) if lora else digest
    return initial_state(config, optimizer, params, held_to), meta, base
