"""The configuration dataclasses and the one strict door from an ml_collections ConfigDict to them.

A config file under `configs/` spells out every knob of a recipe; `RunConfig.from_config_dict` is
its only reader. Fields that nobody declared, or that are missing, are errors that name them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import FieldReference, config_flags

ATTENTION = ("auto", "einsum", "lean", "splash", "cudnn")  # see zephyr_jax.models.attention
_DTYPES = ("float32", "bfloat16", "float16")


def _choose(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        said = ", ".join(map(str, allowed))
        raise ValueError(f"{name}={value!r} is not known; use one of {said}")


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{name}={getattr(owner, name)} must be positive")


_HF_INTEGERS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"}
_HF_INTEGERS |= {"num_attention_heads", "num_key_value_heads", "max_position_embeddings"}
_HF_INTEGERS |= {"sliding_window", "bos_token_id", "eos_token_id"}
# What transformers takes for a key that config.json lacks, where it is not what we take.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "llama": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "intermediate_size": 11008,
    },
}


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """Architecture of a Mistral model; the fields have Hugging Face's names and meanings.

    The defaults are those of Mistral-7B-v0.1. `sliding_window` counts the keys a query sees, itself
    included (None: all). `dtype` is the dtype of the computation; parameters are float32 masters.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates its two halves")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(f"sliding_window={self.sliding_window} must be positive, or None")
        _choose("dtype", self.dtype, _DTYPES)

    @classmethod
    def mistral_7b(cls) -> MistralConfig:
        """Mistral-7B-v0.1: 7,241,732,096 parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> MistralConfig:
        """A model for tests and notebooks: every dimension different, heads*head_dim != hidden."""
        return cls(
            vocab_size=104,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=10,
            max_position_embeddings=512,
            sliding_window=None,
            dtype="float32",
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> MistralConfig:
        """The configuration that a Hugging Face `config.json` (either generation) describes.

        Raises:
            ValueError: if the file describes a model that is not this architecture.
        """
        kind = config.get("model_type")
        if kind not in ("mistral", "llama"):
            raise ValueError(f"model_type={kind!r} in config.json is neither mistral nor llama")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope type {rope_type!r} is not supported; only 'default' is")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={config['hidden_act']!r} is not supported; 'silu' is")
        for bias in ("attention_bias", "mlp_bias"):
            if config.get(bias):
                raise ValueError(f"{bias}=true is not supported: this architecture has no biases")
        thetas = {float(t) for t in (rope.get("rope_theta"), config.get("rope_theta")) if t}
        if len(thetas) > 1:
            raise ValueError(f"config.json has two values of rope_theta: {sorted(thetas)}")
        names = {f.name for f in dataclasses.fields(cls)}
        taken = _HF_DEFAULTS[kind] | {k: v for k, v in config.items() if k in names}
        if isinstance(taken.get("eos_token_id"), list):  # the first of several ends a text
            taken["eos_token_id"] = (taken["eos_token_id"] or [None])[0]
        taken = {k: v for k, v in taken.items() if v is not None}
        missing = [name for name in ("hidden_size", "num_attention_heads") if name not in taken]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; copy it again")
        for name in sorted(taken.keys() & _HF_INTEGERS):
            if type(taken[name]) is not int:
                raise ValueError(f"{name}={config.get(name)!r} in config.json is no whole number")
        heads = taken["num_attention_heads"]
        # Mistral's default in transformers; null, and any number in Llama, means one for each head.
        grouped = kind == "mistral" and "num_key_value_heads" not in config and heads % 8 == 0
        assumed = 8 if grouped else heads
        taken |= {
            "head_dim": taken.get("head_dim") or taken["hidden_size"] // max(heads, 1),
            "num_key_value_heads": taken.get("num_key_value_heads") or assumed,
            "rope_theta": thetas.pop() if thetas else cls.rope_theta,
            # A missing window means Mistral's default of 4096 in transformers; Llama has none.
            "sliding_window": config.get("sliding_window", 4096) if kind == "mistral" else None,
            "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        }
        return cls(**taken)


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How messages become token ids and which of them are targets.

    The project's own choice is bos, no append_eos, no empty_system, loss on assistant turns. The
    other values exist to reproduce the published recipes (docs/recipes.md).
    """

    bos: bool  # one <s> at position 0
    append_eos: bool  # a second </s> after the template's last newline, as TRL appends
    empty_system: bool  # an empty system message where the chat has none
    legacy_specials: bool  # a literal </s> in user text becomes the token, as in Hugging Face
    loss_on: str  # "assistant": each answer and its </s>; "all": every token

    def __post_init__(self) -> None:
        _choose("chat.loss_on", self.loss_on, ("assistant", "all"))


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
        _positive(self, "seq_len")
        _choose("data.packing", self.packing, ("best_fit", "concat"))
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """The preference stage. A config without this section is supervised fine-tuning."""

    beta: float
    label_smoothing: float
    reference: str  # "precomputed": log-probs stored beside the packed set; "in_memory"
    max_length: int  # tokens of prompt and longer answer together
    max_prompt_length: int  # what a prompt is cut to (its end kept) where max_length is exceeded

    def __post_init__(self) -> None:
        _positive(self, "beta", "max_length", "max_prompt_length")
        _choose("dpo.reference", self.reference, ("precomputed", "in_memory"))
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"dpo.max_prompt_length={self.max_prompt_length} leaves no room for an answer in "
                f"dpo.max_length={self.max_length}"
            )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, then a decay to zero at the last step."""

    peak_lr: float
    schedule: str  # "cosine" or "linear"
    warmup_ratio: float  # of all steps; ceil, as Hugging Face's Trainer rounds
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_grad_norm: float  # of the averaged gradient, before Adam; inf: none

    def __post_init__(self) -> None:
        _positive(self, "peak_lr", "eps", "max_grad_norm")
        _choose("optim.schedule", self.schedule, ("cosine", "linear"))
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
    remat: str  # what the backward pass recomputes: "none", "dots" (all but matmuls), "full"
    reduce_dtype: str  # of weight gradients where they are summed across devices
    attention: str  # "auto" by machine and length, or an implementation by name

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size", "micro_batches", "keep_checkpoints", "log_every")
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 0 or more")
        _choose("train.remat", self.remat, ("none", "dots", "full"))
        _choose("train.attention", self.attention, ATTENTION)
        _choose("train.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left."""

    data: int
    fsdp: int
    tensor: int


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
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    unknown = sorted(set(tree) - set(hints))
    missing = sorted(set(hints) - set(tree) - (optional if cls is RunConfig else set()))
    if unknown or missing:
        said = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        said += [f"missing: {', '.join(missing)}"] * bool(missing)
        raise ValueError(
            f"fields of {path} ({cls.__name__}) do not fit; {'; '.join(said)}; "
            f"it has {', '.join(hints)}"
        )
    return cls(**{k: _value(hints[k], v, f"{path}.{k}") for k, v in tree.items()})


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
        # A flag takes the type of the value it replaces; this field may be None or a number.
        window = FieldReference(config.model.sliding_window, field_type=object)
        config.model["sliding_window"] = window
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
        stray = values(words)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if stray:
        raise ValueError(f"{stray[0]!r} is no --config.FIELD=VALUE; write overrides in that form")
    return RunConfig.from_config_dict(config)
