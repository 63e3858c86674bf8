"""zephyr_jax: from raw dialogues and preferences to an aligned Mistral, in JAX.

The names below are the public interface; everything else may move. Each is imported when it is
first used, so that the commands that need no JAX start without it.
"""
# ruff: noqa: F401 - names of the interface are imported for others

import importlib
from typing import TYPE_CHECKING, Any

from zephyr_jax._version import __version__

if TYPE_CHECKING:  # for editors and type checkers
    from zephyr_jax.config.run import MistralConfig, RunConfig, load_config
    from zephyr_jax.data.text.chat import render_chat, render_text
    from zephyr_jax.data.text.tokenizer import Tokenizer
    from zephyr_jax.inference.generate import generate, stream
    from zephyr_jax.losses.tokens import dpo_loss, pair_logps, sft_loss, token_logps
    from zephyr_jax.models.mistral import ForwardOptions, Mistral, forward, init_params
    from zephyr_jax.models.parameters import count_params
    from zephyr_jax.reports.fit import fit
    from zephyr_jax.sharding import make_mesh
    from zephyr_jax.weights.checkpoint import save_model
    from zephyr_jax.weights.gguf import export_gguf
    from zephyr_jax.weights.gguf_reader import load_gguf
    from zephyr_jax.weights.huggingface import export_hf, load_hf
    from zephyr_jax.weights.sources import load_model

_HOMES = {
    "weights.checkpoint": ("save_model",),
    "config.run": ("MistralConfig", "RunConfig", "load_config"),
    "data.text.chat": ("render_chat", "render_text"),
    "data.text.tokenizer": ("Tokenizer",),
    "inference.generate": ("generate", "stream"),
    "weights.gguf": ("export_gguf",),
    "weights.gguf_reader": ("load_gguf",),
    "weights.huggingface": ("export_hf", "load_hf"),
    "weights.sources": ("load_model",),
    "reports.fit": ("fit",),
    "losses.tokens": ("dpo_loss", "pair_logps", "sft_loss", "token_logps"),
    "models.mistral": ("ForwardOptions", "Mistral", "forward", "init_params"),
    "models.parameters": ("count_params",),
    "sharding": ("make_mesh",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__"]
__all__ += list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zephyr_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zephyr_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
