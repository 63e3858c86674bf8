"""zephyr_jax: the road from raw dialogues and preferences to an aligned Mistral, in JAX.

The names below are the public interface; everything else may move.
"""

from zephyr_jax._version import __version__
from zephyr_jax.checkpoint import load_model, save_model
from zephyr_jax.config import MistralConfig, RunConfig, load_config
from zephyr_jax.data.chat import render_chat, render_text
from zephyr_jax.data.tokenizer import Tokenizer
from zephyr_jax.generation import generate, stream
from zephyr_jax.interop.gguf import export_gguf, load_gguf
from zephyr_jax.interop.huggingface import export_hf, load_hf
from zephyr_jax.loop import fit
from zephyr_jax.losses import dpo_loss, pair_logps, sft_loss, token_logps
from zephyr_jax.models.mistral import Mistral, count_params, forward, init_params
from zephyr_jax.sharding import make_mesh

__all__ = [
    "Mistral",
    "MistralConfig",
    "RunConfig",
    "Tokenizer",
    "__version__",
    "count_params",
    "dpo_loss",
    "export_gguf",
    "export_hf",
    "fit",
    "forward",
    "generate",
    "init_params",
    "load_config",
    "load_gguf",
    "load_hf",
    "load_model",
    "make_mesh",
    "pair_logps",
    "render_chat",
    "render_text",
    "save_model",
    "sft_loss",
    "stream",
    "token_logps",
]
