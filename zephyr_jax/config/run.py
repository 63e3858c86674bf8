"""The configuration of a run: its sections, and the file or recipe that describes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from zephyr_jax.config import build, choose, positive, read_file, require, weighted
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.preference import DpoConfig

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("auto", "einsum", "tiled", "splash", "cudnn")  # see zephyr_jax.models.attention
REMATS = ("none", "dots", "full", "offload", "auto")
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")  # outputs of a layer's parts
TRACKERS = ("tensorboard", "wandb", "trackio")
BAD_STEPS = ("skip", "spike")
OPTIMIZERS = ("adamw", "adam", "nadamw", "adafactor", "lion", "muon", "rmsprop", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "wsd")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How messages become token ids and which of them are targets.

    The project's own choice is bos, loss on assistant turns and False for all else; the other
    values reproduce the published recipes.
    """

    bos: bool  # one <s> at position 0
    append_eos: bool  # a second </s> after the template's last newline, as TRL appends
    empty_system: bool  # an empty system message where the chat has none
    parse_special: bool  # a literal </s> in user text becomes the token, as in Hugging Face
    loss_on: str  # "assistant": each answer and its </s>; "all": every token
    score_header: bool  # pairs: <|assistant|>\n is part of both answers, as in the handbook

    def __post_init__(self) -> None:
        choose("chat.loss_on", self.loss_on, ("assistant", "all"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which prepared set is packed into rows of how many tokens."""

    data_dir: str  # where prepare_data.py put the TFDS sets; packed sets go to data_dir/packed
    # A prepared set, or the weights of several: {"ultrachat/200k": 1.0, "messages/own": 0.5}
    dataset: str | dict[str, float]
    splits: tuple[str, ...]  # that train, and the one held out, "" for none: ("train_sft", "")
    tokenizer: str  # a tokenizer file, or a folder that holds one; "": that of `init`
    seq_len: int  # T, tokens in a row
    packing: str  # "best_fit": documents whole, cut at T; "concat": end to end, then cut (SFT)
    new_tokenizer: bool = False  # on purpose another tokenizer than that of `init`

    def __post_init__(self) -> None:
        positive(self, "seq_len")
        choose("data.packing", self.packing, ("best_fit", "concat"))
        weighted("data.dataset", self.dataset)
        holds = len(self.splits) == 2 and self.splits[0] not in ("", self.splits[1])
        require(holds, "data.splits", self.splits, "(TRAINING, HELD_OUT), or ('train_sft', '')")

    @property
    def dataset_weights(self) -> dict[str, float]:
        """The prepared sets, and how many times the training documents of each are taken."""
        return weighted("data.dataset", self.dataset)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with linear warm-up of its rate, then a schedule."""

    name: str  # one of OPTIMIZERS: optax's; "rmsprop" is torch's, without momentum
    peak_lr: float  # after the warm-up
    # One of SCHEDULES; {"wsd": 0.2} falls over the last 20% of all steps, "wsd" over 10%
    schedule: str | dict[str, float]
    warmup_ratio: float  # of all steps; ceil, as Hugging Face's Trainer rounds
    # Shares of the old mean (sgd's and muon's momentum; rmsprop: 0) and of the old mean square in
    # the new, torch's alpha for rmsprop; for adafactor the exponent of its growth, 1 - t^-b2
    betas: tuple[float, ...]
    eps: float  # added to the root of the mean square; for adafactor to the square: 1e-30
    weight_decay: float  # decoupled; adam, rmsprop and sgd have none: 0
    max_grad_norm: float  # of the averaged gradient, before the optimizer sees it; inf: none
    mu_dtype: str = "float32"  # of the first moment; "bfloat16" halves it
    offload_optimizer: bool = False  # moments wait in pinned host memory between updates
    warmup_from_zero: bool = False  # the first update of a warm-up has rate 0, as Hugging Face's

    def __post_init__(self) -> None:
        choose("optim.name", self.name, OPTIMIZERS)
        choose("optim.mu_dtype", self.mu_dtype, ("float32", "bfloat16"))
        positive(self, "peak_lr", "eps")
        require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "above 0")
        decay = self.weight_decay
        require(0 <= decay < math.inf, "optim.weight_decay", decay, "finite, and not below 0")
        drowned = self.name == "adafactor" and self.eps > 1e-16
        require(not drowned, "optim.eps", self.eps, "1e-30 or so: adafactor adds it to squares")
        holds = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(holds, "optim.betas", self.betas, "two numbers in [0, 1), as (0.9, 0.999)")
        rule = f"0: {self.name} has none; or take adamw"
        if self.name in ("adam", "sgd", "rmsprop"):
            require(not decay, "optim.weight_decay", decay, rule)
        if self.name == "rmsprop":
            require(not self.betas[0], "optim.betas[0]", self.betas[0], rule)
            require(self.mu_dtype == "float32", "optim.mu_dtype", self.mu_dtype, "float32: unused")
        require(0 <= self.warmup_ratio <= 1, "optim.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        name, share = self.schedule_and_share
        choose("optim.schedule", name, SCHEDULES)
        holds = share <= 1 and self.schedule in (name, {"wsd": share})
        require(holds, "optim.schedule", self.schedule, "a name, or {'wsd': SHARE <= 1} alone")
        rule = "0 under optim.schedule=constant; or take constant_with_warmup"
        holds = name != "constant" or not self.warmup_ratio
        require(holds, "optim.warmup_ratio", self.warmup_ratio, rule)

    @property
    def schedule_and_share(self) -> tuple[str, float]:
        """The schedule's name, and over which share of all steps wsd falls."""
        if isinstance(self.schedule, str):
            return self.schedule, 0.1
        return next(iter(weighted("optim.schedule", self.schedule).items()))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a frozen model (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int  # R, the inner size of an adapter
    alpha: float  # an adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # of what an adapter reads, in training
    # The projections that have an adapter, kept in the order of PROJECTIONS
    targets: tuple[str, ...] = PROJECTIONS
    base: str = "full"  # how the frozen projections are held: "full", or "int8", "nf4" (QLoRA)

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        require(bool(self.targets), "lora.targets", "()", f"some of {', '.join(PROJECTIONS)}")
        choose("lora.targets", self.targets, PROJECTIONS)
        ordered = tuple(name for name in PROJECTIONS if name in self.targets)
        object.__setattr__(self, "targets", ordered)
        choose("lora.base", self.base, ("full", "int8", "nf4"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of a run, how its steps are computed, and when it logs, evaluates and saves."""

    epochs: int  # passes over the data; 0: as many as make 100 steps, for a small set
    max_steps: int  # stop here, schedule included; 0: all epochs
    batch_size: int  # a step's rows (SFT) or preference pairs (DPO), over all devices
    micro_batches: int  # a step's rows are computed in so many parts, one after another
    eval_every: int  # steps; 0: only after the last
    checkpoint_every: int  # steps; 0: only after the last
    keep_checkpoints: int  # the newest that stay
    log_every: int  # steps between two lines of metrics.jsonl
    # What the backward pass recomputes: "none", "dots" (all but matmuls), "full", "offload" (full,
    # with the layers' inputs in host memory), all but the outputs in a tuple: ("q", "k", "v"), or
    # "auto": as little as the device's memory allows
    remat: str | tuple[str, ...]
    reduce_dtype: str  # of weight gradients where they are summed across devices
    attention: str  # "auto" by machine and length, or an implementation by name
    # The held-out metric whose best step is kept too ("loss": lowest, "rewards/accuracies":
    # highest; or "min:NAME", "max:NAME"); "": none. {"loss": 3} also ends the run, after three
    # evaluations in a row that are no better
    keep_best: str | dict[str, float] = ""
    trackers: tuple[str, ...] = ()  # that get every line of metrics.jsonl too; some of TRACKERS
    # {"skip": N}: at most N steps whose loss or gradient is not finite are left out, else the first
    # ends the run; {"spike": Z}: also losses Z robust deviations above the median of the 32 before
    bad_steps: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={"options": BAD_STEPS}
    )
    profile: tuple[int, ...] = ()  # (10, 13) traces steps 10 to 12 into the workdir, for XProf
    # Of the compiler of a step on TPU: "auto", those of the chip (zephyr_jax.chips); more of them,
    # as {"xla_tpu_scoped_vmem_limit_kib": "65536"}; or "none"
    compiler_options: str | dict[str, str] = "auto"

    def __post_init__(self) -> None:
        positive(self, "batch_size", "micro_batches", "keep_checkpoints", "log_every")
        for name in ("epochs", "max_steps", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "0 or more")
        metric, patience = self.best_and_patience
        holds = patience % 1 == 0 and self.keep_best in (metric, {metric: patience})
        rule = "a metric, or {'METRIC': EVALUATIONS} of one metric"
        require(holds, "train.keep_best", self.keep_best, rule)
        choose("train.remat", self.remat, REMATS if isinstance(self.remat, str) else SAVED)
        choose("train.trackers", self.trackers, TRACKERS)
        for name, value in self.bad_steps.items():
            choose("train.bad_steps", name, BAD_STEPS)
            holds = 0 < value < math.inf and (name == "spike" or value % 1 == 0)
            require(holds, f"train.bad_steps.{name}", value, "above 0, and whole for skip")
        if self.profile:
            span = len(self.profile) == 2 and 0 < self.profile[0] < self.profile[1]
            require(span, "train.profile", self.profile, "(FIRST, STOP), counted from 1")
        if isinstance(self.compiler_options, str):
            choose("train.compiler_options", self.compiler_options, ("auto", "none"))
        choose("train.attention", self.attention, ATTENTION)
        choose("train.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))

    @property
    def best_and_patience(self) -> tuple[str, float]:
        """The metric of `keep_best`, and after how many worse evaluations the run ends; 0: none."""
        if isinstance(self.keep_best, str):
            return self.keep_best, 0
        return next(iter(weighted("train.keep_best", self.keep_best).items()))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left.

    All 0: sizes, and micro-batches, follow from the devices (`training.sizes.fitted`).
    """

    data: int  # replicas of the model, each with its own rows
    fsdp: int  # shards of parameters and rows
    tensor: int  # shards of heads, inner width and vocabulary
    context: int = 1  # shards the tokens of long rows

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes and any((*sizes, self.context > 1)):
            raise ValueError(f"mesh sizes {sizes}, context={self.context}: all are 0, or none is")
        positive(self, "context")

    @property
    def auto(self) -> bool:
        """Whether the sizes follow from the devices."""
        return not (self.data or self.fsdp or self.tensor)

    @property
    def axes(self) -> dict[str, int]:
        """Size by axis, in the order of the mesh; without `context` where that is 1."""
        sizes = dataclasses.asdict(self)
        return sizes if self.context != 1 else {k: n for k, n in sizes.items() if k != "context"}

    def sized(self, devices: int, where: str = "here") -> MeshConfig:
        """The mesh with a number for -1; a ValueError if it does not multiply to the devices."""
        known = math.prod(size for size in dataclasses.astuple(self) if size != -1)
        named = dataclasses.asdict(self).items()
        sizes = {name: devices // max(known, 1) if n == -1 else n for name, n in named}
        if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
            listed = ", ".join(f"{name}={size}" for name, size in named)
            raise ValueError(
                f"mesh sizes {listed} do not multiply to the {devices} devices {where}; use "
                "positive ones, and -1 for at most one of them"
            )
        return MeshConfig(**sizes)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that one run of `fit` depends on, except for the data it names."""

    name: str  # of the run, in its folder, log and model card
    seed: int  # of random weights, dropout and the order of the data
    init: str  # "": random weights; else a workdir, a checkpoint, a Hugging Face folder or hub id
    model: MistralConfig
    chat: ChatConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig
    dpo: DpoConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, and below 2^32")
        mode, other = (self.dpo.reference, self.dpo.reference_model) if self.dpo else ("", "")
        if self.lora and not self.init:
            raise ValueError("config.lora adapts a trained model; name one as config.init")
        problems = {
            ("adapter_off", False, bool(other)): "needs adapters, as by --config.lora.rank=16 "
            "--config.lora.alpha=16; or use precomputed",
            ("in_memory", True, False): "would copy the base of config.lora; use adapter_off",
            ("synced", True, True): "moves adapters of the run's own base, not of another model; "
            "leave out dpo.reference_model, or use precomputed",
        }
        if problem := problems.get((mode, bool(self.lora), bool(other))):
            raise ValueError(f"dpo.reference={mode} {problem}")
        length, over = self.data.seq_len, self.mesh.context
        longest = self.dpo.max_length if self.dpo else length
        limit, rule = self.model.max_position_embeddings, f"{longest} (seq_len, max_length) or more"
        require(limit >= longest, "model.max_position_embeddings", limit, rule)
        require(length % over == 0, "data.seq_len", length, f"divisible by mesh.context={over}")

    @classmethod
    def from_config_dict(cls, config: Any) -> RunConfig:
        """The run that a ConfigDict or nested dict describes; a ValueError names what is wrong."""
        tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        tree.pop("sha256", None)  # of the file run_config.json
        return build(cls, tree)

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values, for JSON; `from_config_dict` reads it back."""
        return dataclasses.asdict(self)


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a file, or of a recipe of the package, with overrides: as of `read_file`."""
    return RunConfig.from_config_dict(read_file(name, overrides))
