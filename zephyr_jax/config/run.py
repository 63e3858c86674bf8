"""The configuration dataclasses and the one strict door from an ml_collections ConfigDict to them.

A config file under `configs/` spells out every knob of a recipe; `RunConfig.from_config_dict` is
its only reader. Fields that nobody declared, or that are missing, are errors that name them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from zephyr_jax.config.checks import choose, names_in, positive
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.config.preference import DpoConfig

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("auto", "einsum", "tiled", "splash", "cudnn")  # see zephyr_jax.models.attention
REMATS = ("none", "dots", "full", "offload")
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")  # outputs of a layer's parts
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How messages become token ids and which of them are targets.

    The project's own choice is bos, loss on assistant turns and False for all else. The other
    values exist to reproduce the published recipes (docs/recipes.md).
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
    dataset: str  # "ultrachat/raw"; several with weights: "ultrachat/200k, messages/own=0.5"
    train_split: str
    eval_split: str
    tokenizer: str  # a tokenizer file, or a folder that holds one; "": the one beside `init`
    seq_len: int  # T, tokens in a row
    packing: str  # "best_fit": documents whole, cut at T; "concat": end to end, then cut (SFT)
    workers: int  # processes that pack and that read ahead; 0: all cores pack, threads read

    def __post_init__(self) -> None:
        positive(self, "seq_len")
        choose("data.packing", self.packing, ("best_fit", "concat"))
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside a frozen model (Hu et al. 2021, arXiv:2106.09685).

    A config without this section trains every parameter.
    """

    rank: int  # R, the inner size of an adapter
    alpha: float  # an adapter's output is multiplied by alpha / rank
    dropout: float  # of what an adapter reads, in training
    targets: str  # projections that have one: "q, k, v, o, gate, up, down", or some of these
    base: str = "full"  # how the frozen projections are held: "full", or "int8", "nf4" (QLoRA)

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")
        if not self.projections:
            raise ValueError(f"lora.targets is empty; name some of {', '.join(PROJECTIONS)}")
        for name in self.projections:
            choose("lora.targets", name, PROJECTIONS)
        choose("lora.base", self.base, ("full", "int8", "nf4"))

    @property
    def projections(self) -> tuple[str, ...]:
        """The names in `targets`, in the order of PROJECTIONS as far as they are known."""
        named = names_in(self.targets)
        known = [name for name in PROJECTIONS if name in named]
        return (*known, *(name for name in named if name not in known))


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with linear warm-up of its rate, then a decay to zero at the last step."""

    name: str  # "adamw"; "rmsprop", torch's, without momentum; "adafactor"
    peak_lr: float
    schedule: str  # "cosine" or "linear"
    warmup_ratio: float  # of all steps; ceil, as Hugging Face's Trainer rounds
    b1: float  # share of the old mean in the new; rmsprop has no mean: 0
    # Share of the old mean square in the new, torch's alpha for rmsprop; for adafactor the exponent
    # of that share's growth, 1 - t^-b2
    b2: float
    eps: float  # beside the root of the mean square; for adafactor beside the square: 1e-30
    weight_decay: float  # decoupled; rmsprop has none: 0
    max_grad_norm: float  # of the averaged gradient, before the optimizer sees it; inf: none
    mu_dtype: str = "float32"  # of the first moment; "bfloat16" halves it
    memory: str = "device"  # where the moments wait for the update: "device", or "host" (pinned)

    def __post_init__(self) -> None:
        choose("optim.name", self.name, ("adamw", "rmsprop", "adafactor"))
        choose("optim.mu_dtype", self.mu_dtype, ("float32", "bfloat16"))
        choose("optim.memory", self.memory, ("device", "host"))
        positive(self, "peak_lr", "eps", "max_grad_norm")
        if self.name == "adafactor" and self.eps > 1e-16:
            raise ValueError(
                f"optim.eps={self.eps} is added to squares by adafactor and would drown them; "
                "use 1e-30"
            )
        if self.name == "rmsprop" and (self.b1 or self.weight_decay or self.mu_dtype != "float32"):
            raise ValueError(
                f"optim.name=rmsprop has neither momentum nor weight decay: optim.b1={self.b1} and "
                f"optim.weight_decay={self.weight_decay} must be 0; or take adamw"
            )
        choose("optim.schedule", self.schedule, ("cosine", "linear"))
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optim.warmup_ratio={self.warmup_ratio} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what is done on the way."""

    epochs: int
    max_steps: int  # stop here, schedule included; 0: all epochs
    batch_size: int  # a step's rows (SFT) or preference pairs (DPO), over all devices
    micro_batches: int  # portions that a step's rows are worked through in, one after another
    eval_every: int  # steps; 0: only after the last
    checkpoint_every: int  # steps; 0: only after the last
    keep_checkpoints: int
    log_every: int
    # What the backward pass recomputes: "none", "dots" (all but matmuls), "full"; "offload" is full
    # with the layers' inputs in host memory; or all but outputs named as in SAVED: "q, k, v"
    remat: str
    reduce_dtype: str  # of weight gradients where they are summed across devices
    attention: str  # "auto" by machine and length, or an implementation by name
    trackers: str = ""  # beside metrics.jsonl: "tensorboard, wandb, trackio", or some of these
    profile: str = ""  # "10:13" traces steps 10 to 12 into the workdir, for XProf

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "micro_batches", "keep_checkpoints", "log_every")
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 0 or more")
        if self.remat not in REMATS:
            for name in names_in(self.remat):
                choose("train.remat", name, (*REMATS, *SAVED))
        for name in self.trackers_used:
            choose("train.trackers", name, TRACKERS)
        _ = self.profiled_steps
        choose("train.attention", self.attention, ATTENTION)
        choose("train.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))

    @property
    def trackers_used(self) -> tuple[str, ...]:
        """The names in `trackers`."""
        return names_in(self.trackers)

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first step that `profile` traces, and the first that it no longer does."""
        if not self.profile:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(
                f"train.profile={self.profile!r} must be FIRST:LAST+1, steps counted from 1: 10:13"
            )
        return int(found[1]), int(found[2])


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left.

    All 0: sizes, and micro-batches, are chosen for the devices (zephyr_jax.training.auto_mesh).
    """

    data: int
    fsdp: int
    tensor: int
    context: int = 1  # divides the tokens of long rows

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes and any((*sizes, self.context > 1)):
            said = f"mesh sizes {sizes}" + f" with context={self.context}" * (self.context > 1)
            raise ValueError(f"{said}: either all are 0, to be chosen, or none is")
        positive(self, "context")

    @property
    def auto(self) -> bool:
        """Whether the sizes are still to be chosen."""
        return not (self.data or self.fsdp or self.tensor)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that one run of `fit` depends on, beside the data it names."""

    name: str
    seed: int
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
            raise ValueError("dpo.reference=adapter_off needs config.lora; use precomputed")
        if mode == "in_memory" and self.lora:
            raise ValueError(
                "dpo.reference=in_memory would copy the frozen base of config.lora; use adapter_off"
            )

        length, over = self.data.seq_len, self.mesh.context
        if length % over:
            raise ValueError(f"mesh.context={over} does not divide data.seq_len={length}")

    @classmethod
    def from_config_dict(cls, config: Any) -> RunConfig:
        """The run that a ConfigDict (or nested dict) describes.

        Raises:
            ValueError: naming every unknown or missing field, or the field with a wrong type.
        """
        tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return _build(cls, tree, "config")

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values, for JSON; `from_config_dict` reads it back."""
        return dataclasses.asdict(self)


def _build(cls: Any, tree: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(tree) - set(hints))
    optional = {} if cls is MistralConfig else _defaults(cls)  # architectures are spelled out
    missing = sorted(set(hints) - set(tree) - set(optional))
    if unknown or missing:
        said = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        said += [f"missing: {', '.join(missing)}"] * bool(missing)
        raise ValueError(
            f"fields of {path} ({cls.__name__}) do not fit; {'; '.join(said)}; "
            f"it has {', '.join(hints)}"
        )
    return cls(**{k: _value(hints[k], v, f"{path}.{k}") for k, v in tree.items()})


def _defaults(cls: Any) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _value(hint: Any, value: Any, path: str) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            return _build(choice, value, path)
        if choice is float and type(value) in (int, float):
            return float(value)
        if type(value) is choice:
            return value
    names = " or ".join(getattr(c, "__name__", str(c)) for c in choices)
    raise ValueError(f"{path}={value!r} must be of type {names}")


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a config file describes, with command-line overrides.

    Args:
        name: path of a file with `get_config()`, or the name of a recipe that ships with the
            package ("zephyr_7b_sft").
        overrides: `--config.a.b=value` words; the types of the file's values are kept.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a recipe.
        ValueError: if the file or an override does not fit.
    """
    path = Path(name)
    if not path.is_file():
        package = importlib.util.find_spec("zephyr_jax.recipes")
        folders = package.submodule_search_locations or [] if package else []
        shipped = [Path(folder) / f"{path.stem}.py" for folder in folders]
        found = [file for file in shipped if file.is_file()]
        if not found or str(path.parent) not in (".", "configs"):
            raise FileNotFoundError(
                f"no config file {name}, and no recipe of that name ships with the package"
            )
        path = found[0]
    values, words = flags.FlagValues(), ["config", *overrides]
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:  # whatever a file that is no config does
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no config file with get_config() ({said})") from error
    try:
        _prepare_overrides(config)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
        stray = values(words)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if stray:
        raise ValueError(f"{stray[0]!r} is no --config.FIELD=VALUE; write overrides in that form")
    return RunConfig.from_config_dict(config)


def _prepare_overrides(config: ConfigDict) -> None:
    """What a config file may leave out becomes a field that the command line can set."""
    sections = {"dpo": DpoConfig, "lora": LoraConfig, "optim": OptimConfig}
    sections |= {"train": TrainConfig, "mesh": MeshConfig}
    for section, cls in sections.items():
        own: Any = config.get(section)
        if own is not None:
            own.update({k: v for k, v in _defaults(cls).items() if k not in own})
    for section, name in (("model", "sliding_window"), ("dpo", "bco_decay")):
        fields: Any = config.get(section)
        if fields is not None:  # a flag takes the type of its value; these are None or a number
            fields[name] = FieldReference(fields[name], field_type=object)
