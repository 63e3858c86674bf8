"""Makes tests/data/mistral_oracle.npz: what transformers and torch compute on a tiny Mistral.

Run where torch and transformers are installed (`make parity` installs them); the file is committed,
so that `make test` needs neither. Weights are drawn by NumPy, by name, and not stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 104,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
FILE = Path(__file__).parent / "data" / "mistral_oracle.npz"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Large matrices and norm scales that are not 1, float32, by the sorted names."""
    rng = np.random.default_rng(0)
    out = {}
    for name in sorted(shapes):
        drawn = rng.standard_normal(shapes[name])
        out[name] = (1 + 0.3 * drawn if "norm" in name else 0.2 * drawn).astype(np.float32)
    return out


def tokens() -> np.ndarray:
    """Three rows, almost five windows long."""
    return np.random.default_rng(1).integers(3, CONFIG["vocab_size"], (3, 23))


def main() -> None:
    """Writes the file."""
    import torch
    import transformers

    skipped = ("model_type", "torch_dtype", "rope_theta")
    fields = {k: v for k, v in CONFIG.items() if k not in skipped}
    rope = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    config = transformers.MistralConfig(**fields, rope_parameters=rope)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager")
    drawn = weights({k: tuple(v.shape) for k, v in model.named_parameters()})
    model.load_state_dict({k: torch.tensor(v) for k, v in drawn.items()})
    ids = torch.tensor(tokens())
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {f"grad/{k}": v.grad.numpy() for k, v in model.named_parameters()}
    logits = out.logits.detach().numpy()
    np.savez_compressed(FILE, logits=logits, loss=out.loss.item(), **grads)


if __name__ == "__main__":
    main()
