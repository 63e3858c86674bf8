"""The cells of the parity matrix: small Mistrals and rows, without torch and without pytest.

`parity/matrix.py` compares every cell with transformers; `test_oracle.py` a dozen with what it
stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

import zephyr_jax as zj
from zephyr_jax.weights.exports import config_json
from zephyr_jax.weights.huggingface import hf_layout

FACTORS: dict[str, tuple[Any, ...]] = {
    "groups": (1, 2, 4, 8),  # query heads per key-value head
    "head_dim": (4, 6),  # hidden_size / num_attention_heads is 4
    "window": (3, 8, None, 64),  # 64 is longer than every sequence
    "theta": (1e4, 1e6),
    "tied": (False, True),
    "layout": ("full", "right", "left", "packed"),  # where a row has its padding
    "length": (9, 16, 24),  # three windows of 3 and of 8, and two of 8
}
HEADS = 8
ORACLE = Path(__file__).parent / "stored" / "mistral_oracle.npz"  # of transformers and torch


@dataclasses.dataclass(frozen=True)
class Cell:
    """One value of every factor."""

    groups: int
    head_dim: int
    window: int | None
    theta: float
    tied: bool
    layout: str
    length: int

    def __str__(self) -> str:
        window = "none" if self.window is None else self.window
        name = f"g{self.groups}-h{self.head_dim}-w{window}-t1e{len(str(int(self.theta))) - 1}"
        return f"{name}-{'tied' if self.tied else 'untied'}-{self.layout}-{self.length}"

    @property
    def cfg(self) -> zj.MistralConfig:
        """The architecture: unequal sizes, two layers."""
        return zj.MistralConfig(
            vocab_size=56, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=HEADS // self.groups,
            head_dim=self.head_dim, max_position_embeddings=128, rope_theta=self.theta,
            sliding_window=self.window, tie_word_embeddings=self.tied, dtype="float32",
        )  # fmt: skip


class Batch(NamedTuple):
    """Rows as `zj.forward` takes them; all `B T`."""

    tokens: np.ndarray
    segments: np.ndarray
    loss_mask: np.ndarray


class Outputs(NamedTuple):
    """What both sides compute; logits are 0 at padding, log-probs 0 where there is no target."""

    logits: np.ndarray
    logps: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]  # by Hugging Face's name


def covering(strength: int) -> list[Cell]:
    """Cells in which every combination of the values of `strength` factors occurs, greedily few."""
    names = list(itertools.combinations(FACTORS, strength))
    cells = [Cell(*values) for values in itertools.product(*FACTORS.values())]
    random.Random(0).shuffle(cells)
    held = {c: {(n, *(getattr(c, name) for name in n)) for n in names} for c in cells}
    left, few = set().union(*held.values()), []
    while left:
        few.append(max(cells, key=lambda cell: len(held[cell] & left)))
        left -= held[few[-1]]
    return few


DOZEN = covering(2)[:12]


def every_cell() -> list[Cell]:
    """The dozen, and the cells in which every three values of different factors meet."""
    return [*DOZEN, *(cell for cell in covering(3) if cell not in DOZEN)]


def weights(cell: Cell) -> dict[str, np.ndarray]:
    """Matrices of standard deviation 0.2 and norm scales that are not 1, float32."""
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in sorted(hf_layout(cell.cfg).shapes.items()):
        drawn = rng.standard_normal(shape)
        out[name] = (1 + 0.3 * drawn if "norm" in name else 0.2 * drawn).astype(np.float32)
    return out


def sample(gradient: np.ndarray) -> np.ndarray:
    """The stored entries of a parameter's gradient; no row, head or layer is left out."""
    return gradient.reshape(-1)[::7]


def batch(cell: Cell) -> Batch:
    """Two rows. Padding holds tokens like any other; one target in five is left out of the loss."""
    t = cell.length
    short = t - t // 3
    layouts = {
        "full": [[1] * t] * 2,
        "right": [[1] * t, [1] * short + [0] * (t - short)],
        "left": [[1] * t, [0] * (t - short) + [1] * short],
        "packed": [
            [1] * (t // 2) + [2] * (t // 4) + [3] * (t - 1 - t // 2 - t // 4) + [0],
            [1] * 3 + [2] + [3] * (t - 6) + [0] * 2,
        ],
    }
    segments = np.array(layouts[cell.layout], np.int32)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, cell.cfg.vocab_size, segments.shape).astype(np.int32)
    follows = np.diff(segments, axis=1, prepend=-1) == 0
    return Batch(tokens, segments, follows & (segments > 0) & (rng.random(tokens.shape) < 0.8))


def ours(cell: Cell, gradients: bool = True, **options: Any) -> Outputs:
    """Our side, the weights read from a folder; `options` are those of `zj.ForwardOptions`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_json(cell.cfg, "float32")))
        save_file(weights(cell), folder / "model.safetensors")
        cfg, params = zj.load_hf(folder)
    tokens, segments, mask = batch(cell)

    def loss(params):
        logits = zj.forward(cfg, params, tokens, segments, options=zj.ForwardOptions(**options))
        logps = zj.token_logps(logits, tokens, mask)
        return zj.sft_loss(logps, mask)[0], (logits, logps)

    run = jax.value_and_grad(loss, has_aux=True) if gradients else lambda p: (loss(p), None)
    (value, (logits, logps)), grads = jax.jit(run)(params)
    assert np.isfinite(logits).all(), f"{cell}: logits of padding are not finite"
    seen = np.where(segments[:, :, None] > 0, logits, 0)
    named = {}
    if gradients:
        named = dict(hf_layout(cfg).write(jax.tree.map(np.asarray, grads), "float32"))
    return Outputs(seen, np.asarray(logps), float(value), named)
