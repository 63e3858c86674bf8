"""Floating-point operations of the matrix products: one multiplication and one addition each.

Norms, rotations, softmax, activations and the lookup of embeddings are left out: they are below one
percent of a model of useful size, and no accelerator's peak is quoted for them.
"""

from __future__ import annotations

from zephyr_jax.config.run import MistralConfig


def matmul_flops(cfg: MistralConfig, batch: int, seq_len: int) -> int:
    """FLOPs of one forward pass as it is written down: scores and values over all T x T pairs.

    That is what the dots of the unrolled program (einsum attention, logits at every token) add up
    to. A backward pass without recomputation has twice as many.
    """
    return batch * (seq_len * _token_flops(cfg) + _pair_flops(cfg) * seq_len**2)


def model_flops_per_token(cfg: MistralConfig, seq_len: int) -> float:
    """FLOPs of training on one token of a row of `seq_len`, by the convention of MFU figures.

    Three times the forward pass, without recomputation. Causal attention counts half of T x T, and
    where the window W is shorter than the row, only what is inside it: W T - W^2 / 2 pairs a row
    (a window of T or none gives the T^2 / 2). Documents inside a row are ignored, so the figure is
    that of one long document; padding counts like any token.
    """
    window = seq_len if cfg.sliding_window is None else min(cfg.sliding_window, seq_len)
    pairs = window - window**2 / (2 * seq_len)  # keys that a query sees, on average
    return 3 * (_token_flops(cfg) + _pair_flops(cfg) * pairs)


def train_flops(cfg: MistralConfig, batch: int, seq_len: int) -> float:
    """FLOPs of one training step on `batch` rows of `seq_len`; see `model_flops_per_token`."""
    return batch * seq_len * model_flops_per_token(cfg, seq_len)


def _token_flops(cfg: MistralConfig) -> int:
    """Of the weight matrices, for one token: each weight is multiplied and added once."""
    queries = cfg.num_attention_heads * cfg.head_dim
    keys = cfg.num_key_value_heads * cfg.head_dim
    attention = cfg.hidden_size * (2 * queries + 2 * keys)  # q and o, k and v
    mlp = 3 * cfg.hidden_size * cfg.intermediate_size  # gate, up and down
    head = cfg.hidden_size * cfg.vocab_size  # tied or not
    return 2 * (cfg.num_hidden_layers * (attention + mlp) + head)


def _pair_flops(cfg: MistralConfig) -> int:
    """Of the attention, for one query and one key in all layers: the score, and the value."""
    return 2 * 2 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
