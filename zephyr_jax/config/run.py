"""The configuration dataclasses, and the one strict door from a ConfigDict to them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.resources
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zephyr_jax.config import choose, positive, require, weighted
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.optim import OptimConfig
from zephyr_jax.config.preference import OPTIONS, DpoConfig

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("auto", "einsum", "tiled", "splash", "cudnn")  # see zephyr_jax.models.attention
REMATS = ("none", "dots", "full", "offload")
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")  # outputs of a layer's parts
TRACKERS = ("tensorboard", "wandb", "trackio")
# What other trainers call a field
_ELSEWHERE = {"lr": "peak_lr", "learning_rate": "peak_lr", "lr_scheduler_type": "schedule"}
_ELSEWHERE |= {"r": "rank", "lora_r": "rank", "num_train_epochs": "epochs", "bs": "batch_size"}
_ELSEWHERE |= {"per_device_train_batch_size": "batch_size", "max_seq_length": "seq_len"}
_ELSEWHERE |= {"gradient_accumulation_steps": "micro_batches", "save_steps": "checkpoint_every"}
_ELSEWHERE |= {"logging_steps": "log_every", "gradient_checkpointing": "remat"}
_ELSEWHERE |= {"save_total_limit": "keep_checkpoints", "report_to": "trackers"}


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
        rule = "(TRAINING, HELD_OUT); without evaluation ('train_sft', '')"
        require(len(self.splits) == 2 and self.splits[0] != "", "data.splits", self.splits, rule)

    @property
    def dataset_weights(self) -> dict[str, float]:
        """The prepared sets, and how many times the training documents of each are taken."""
        return weighted("data.dataset", self.dataset)


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
        if not self.targets:
            raise ValueError(f"lora.targets is empty; name some of {', '.join(PROJECTIONS)}")
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
    # with the layers' inputs in host memory), or all but the outputs in a tuple: ("q", "k", "v")
    remat: str | tuple[str, ...]
    reduce_dtype: str  # of weight gradients where they are summed across devices
    attention: str  # "auto" by machine and length, or an implementation by name
    # The held-out metric whose best step is kept too ("loss": lowest, "rewards/accuracies":
    # highest; or "min:NAME", "max:NAME"); "": none
    keep_best: str = ""
    early_stopping: int = 0  # evaluations in a row without a better one that end the run; 0: off
    trackers: tuple[str, ...] = ()  # that get every line of metrics.jsonl too; some of TRACKERS
    profile: tuple[int, ...] = ()  # (10, 13) traces steps 10 to 12 into the workdir, for XProf

    def __post_init__(self) -> None:
        positive(self, "batch_size", "micro_batches", "keep_checkpoints", "log_every")
        for name in ("epochs", "max_steps", "eval_every", "checkpoint_every", "early_stopping"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "0 or more")
        if self.early_stopping and not self.keep_best:
            raise ValueError("train.early_stopping needs train.keep_best, such as loss")
        choose("train.remat", self.remat, REMATS if isinstance(self.remat, str) else SAVED)
        choose("train.trackers", self.trackers, TRACKERS)
        if self.profile:
            span = len(self.profile) == 2 and 0 < self.profile[0] < self.profile[1]
            require(span, "train.profile", self.profile, "(FIRST, STOP), counted from 1")
        choose("train.attention", self.attention, ATTENTION)
        choose("train.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left.

    All 0: sizes, and micro-batches, follow from the devices (zephyr_jax.training.auto_mesh).
    """

    data: int  # replicas of the model, each with its own rows
    fsdp: int  # shards of parameters and rows
    tensor: int  # shards of heads, inner width and vocabulary
    context: int = 1  # shards the tokens of long rows

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes and any((*sizes, self.context > 1)):
            raise ValueError(
                f"mesh sizes {sizes} with context={self.context}: either all are 0, or none is"
            )
        positive(self, "context")

    @property
    def auto(self) -> bool:
        """Whether the sizes follow from the devices."""
        return not (self.data or self.fsdp or self.tensor)


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
        mode = self.dpo.reference if self.dpo else ""
        if self.lora and not self.init:
            raise ValueError("config.lora adapts a trained model; name one as config.init")
        if mode == "adapter_off" and not self.lora:
            raise ValueError(
                "dpo.reference=adapter_off needs adapters: add --config.lora.rank=16 "
                "--config.lora.alpha=16, or use precomputed"
            )
        if mode == "in_memory" and self.lora:
            raise ValueError(
                "dpo.reference=in_memory would copy the frozen base of config.lora; use adapter_off"
            )
        length, over = self.data.seq_len, self.mesh.context
        if length % over:
            raise ValueError(f"mesh.context={over} does not divide data.seq_len={length}")

    @classmethod
    def from_config_dict(cls, config: Any) -> RunConfig:
        """The run that a ConfigDict or nested dict describes; a ValueError names what is wrong."""
        tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return _build(cls, tree, "config")

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values, for JSON; `from_config_dict` reads it back."""
        return dataclasses.asdict(self)


def _build(cls: Any, tree: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    required = set(hints)
    if cls is not MistralConfig:  # architectures are spelled out
        # Both are the same, MISSING, where a field has no default.
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory}
    problems = [
        f"{path}.{name}: no such field; {_nearest(path, name) or 'it has ' + ', '.join(hints)}"
        for name in sorted(set(tree) - set(hints))
    ]
    if absent := [name for name in hints if name in required - set(tree)]:
        problems.append(
            f"{path} ({cls.__name__}) lacks {', '.join(absent)}; add {path}.{absent[0]} = ... to "
            f"the file, --{path}.{absent[0]}=... to the command, or begin with a recipe"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**{k: _value(hints[k], v, f"{path}.{k}") for k, v in tree.items()})


def _paths(cls: Any, path: str = "config") -> list[str]:
    """`config.seed`, `config.optim`, `config.optim.name`: every section and field."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths.append(f"{path}.{name}")
        for section in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            paths += _paths(section, paths[-1])
        if hint == dict[str, float]:
            paths += [f"{paths[-1]}.{option}" for option in OPTIONS]
    return paths


def _nearest(path: str, name: str) -> str:
    """Which field may be meant by an unknown one: of that name elsewhere, or of a like name."""
    name, paths = _ELSEWHERE.get(name, name), _paths(RunConfig)
    here = [found for found in paths if found.rpartition(".")[0] == path]
    for group, cutoff in ((here, 1.0), (paths, 1.0), (here, 0.6), (paths, 0.7)):
        last = {found.rpartition(".")[2]: found for found in reversed(group)}
        for match in difflib.get_close_matches(name, last, 1, cutoff):
            return f"did you mean {match if group is here else last[match]}?"
    return ""


class _Word(str):
    """What stands behind the = of an override; the field's type says how it is read."""


def _value(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, _Word):
        value = str(value) if hint is str else _literal(value)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            return _build(choice, value, path)
        if choice is float and type(value) in (int, float):
            return float(value)
        origin, item = typing.get_origin(choice), (*typing.get_args(choice), None)
        if origin is tuple:  # JSON has lists only; one value stands for a tuple of one
            entries = value if isinstance(value, tuple | list) else (value,)
            return tuple(_value(item[0], entry, path) for entry in entries)
        if origin is dict and isinstance(value, dict):
            return {key: _value(item[1], entry, f"{path}.{key}") for key, entry in value.items()}
        if type(value) is choice:
            return value
    names = " or ".join(str(c) if typing.get_args(c) else c.__name__ for c in choices)
    raise ValueError(f"{path}={value!r} must be of type {names}")


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a file with `get_config()`, or of a recipe of the package ("zephyr_7b_sft").

    `overrides` are words such as `--config.optim.peak_lr=1e-5`; a section that the file lacks is
    added by its fields. A FileNotFoundError, whose note lists the recipes, if there is neither such
    a file nor such a recipe, a ValueError if the file or an override does not fit.
    """
    path, shipped = Path(name), Path(str(importlib.resources.files("zephyr_jax.recipes")))
    if not path.is_file() and str(path.parent) in (".", "configs"):
        path = shipped / f"{path.stem}.py"
    if not path.is_file():
        raise importlib.import_module("zephyr_jax.recipes.__main__").missing(name)
    try:
        tree = runpy.run_path(str(path))["get_config"]().to_dict()
    except Exception as error:  # running the file may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a config file with get_config() ({problem})") from error
    for word in overrides:
        field, equals, text = word.removeprefix("--config.").partition("=")
        if not (word.startswith("--config.") and equals):
            raise ValueError(f"{word!r} is not --config.FIELD=VALUE; write overrides in that form")
        *sections, last = field.split(".")
        section = tree
        for key in sections:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[last] = _Word(text)
    return RunConfig.from_config_dict(tree)


def _literal(text: str) -> Any:
    """What a word on the command line spells: a Python literal, true, false, inf, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return read(text)
    return str(text)
