"""The architecture of a model, and how a Hugging Face `config.json` describes it."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from zephyr_jax.config import choose, positive, require, typed

_DTYPES = ("float32", "bfloat16", "float16")
# What transformers takes for a key that config.json lacks, where it is not what we take.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "intermediate_size": 11008},
}


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """Architecture of a Mistral model by Hugging Face's names; defaults: Mistral-7B-v0.1's."""

    vocab_size: int = 32000  # rows of the embedding and of the head; at least the tokenizer's size
    hidden_size: int = 4096  # width of the residual stream
    intermediate_size: int = 14336  # inner width of the SwiGLU block
    num_hidden_layers: int = 32  # decoder layers
    num_attention_heads: int = 32  # query heads
    num_key_value_heads: int = 8  # key and value heads, which divide the query heads (GQA)
    head_dim: int = 128  # of one head
    max_position_embeddings: int = 32768  # longest sequence in generation
    rms_norm_eps: float = 1e-5  # added to the mean square
    rope_theta: float = 10000.0  # base of the rotary frequencies
    sliding_window: int | None = 4096  # keys that a query sees, itself included; None: all
    tie_word_embeddings: bool = False  # the head is the embedding, transposed
    initializer_range: float = 0.02  # standard deviation of random weights
    bos_token_id: int = 1  # begins a text
    eos_token_id: int | tuple[int, ...] = 2  # several: each of them ends a text
    dtype: str = "bfloat16"  # of the computation; parameters are float32

    spelled_out = True  # a config file names every field

    def __post_init__(self) -> None:
        positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"),
            *("max_position_embeddings", "initializer_range"),
        )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        rule = f"a multiple of num_key_value_heads={groups}"
        require(heads % groups == 0, "num_attention_heads", heads, rule)
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for RoPE's two halves")
        window = self.sliding_window
        holds = window is None or 0 < window < 1 << 31
        require(holds, "sliding_window", window, "positive and below 2**31, or None")
        choose("dtype", self.dtype, _DTYPES)
        if isinstance(self.eos_token_id, list | tuple):  # JSON has lists; one stands for itself
            ends = tuple(self.eos_token_id)
            object.__setattr__(self, "eos_token_id", ends[0] if len(ends) == 1 else ends)
        rule = f"ids below vocab_size={self.vocab_size}"
        for name, ids in (("eos_token_id", self.end_ids), ("bos_token_id", (self.bos_token_id,))):
            fits = all(type(i) is int and 0 <= i < self.vocab_size for i in ids)
            require(fits, name, getattr(self, name), rule)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids of every token that ends a text, by the model's files."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else (ends,)

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
        """What a Hugging Face `config.json` describes; a ValueError for another architecture."""
        kind = config.get("model_type")
        if kind not in ("mistral", "llama"):
            raise ValueError(f"model_type={kind!r} in config.json is neither mistral nor llama")
        rope = {}
        for name in ("rope_parameters", "rope_scaling"):
            rope |= typed(dict | None, config.get(name), name) or {}
        for rope_type in (rope.get("rope_type", "default"), rope.get("type", "default")):
            if rope_type != "default":
                raise ValueError(f"rope type {rope_type!r} is not supported; only 'default' is")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act={config['hidden_act']!r} is not supported; 'silu' is")
        for bias in ("attention_bias", "mlp_bias"):
            if config.get(bias):
                raise ValueError(f"{bias}=true is not supported: this architecture has no biases")
        thetas = {typed(float | None, x.get("rope_theta"), "rope_theta") for x in (rope, config)}
        thetas -= {None}
        if len(thetas) > 1:
            raise ValueError(f"config.json has two values of rope_theta: {sorted(thetas)}")
        hints = get_type_hints(cls)
        taken = _HF_DEFAULTS[kind] | {k: v for k, v in config.items() if k in hints}
        if taken.get("eos_token_id", 0) is None:  # the tokenizer's alone ends a text
            taken["eos_token_id"] = ()
        taken = {k: typed(hints[k], v, k) for k, v in taken.items() if v is not None}
        if missing := [key for key in ("hidden_size", "num_attention_heads") if key not in taken]:
            raise ValueError(f"config.json lacks {', '.join(missing)}; copy it again")
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
