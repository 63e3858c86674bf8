"""Tiled attention against the einsum one: seconds in turns, and temporary memory.

Prints, for rows of packed documents, how many times as fast the tiled one is (medians, forward
alone and with the backward pass) and the temporary memory of both programs with the backward
pass. It is what `TILED_FROM` in zephyr_jax/models/attention.py goes by.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zephyr_jax.models.attention import attention_over
from zephyr_jax.models.masks import row_layout

K, G, H = 2, 4, 32
SHAPES = [(4, 128), (4, 256), (4, 512), (4, 1024), (2, 2048), (1, 4096)]


def program(name: str, backward: bool) -> Callable[..., Any]:
    """The sum of squares of one implementation's result, or its gradients."""

    def loss(q, k, v, segments, positions):
        layout = row_layout(segments, None, positions)
        out = attention_over(layout, None, name, q.shape[-1], str(q.dtype))(q, k, v)
        return (out**2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)) if backward else loss)


def arguments(b: int, t: int, documents: int) -> list[jax.Array]:
    """Random q `B K G T H`, k and v `B K T H`, and rows of so many documents."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, documents + 1, (b, t)), axis=1)
    starts = [[np.flatnonzero(row == s)[0] for s in row] for row in segments]
    positions = np.arange(t) - np.array(starts)
    wide = [rng.standard_normal(s) for s in ((b, K, G, t, H), (b, K, t, H), (b, K, t, H))]
    return [jnp.asarray(a, jnp.float32) for a in wide] + [
        jnp.asarray(a, jnp.int32) for a in (segments, positions)
    ]


def main() -> None:
    """Measures every shape."""
    for b, t in SHAPES:
        for documents in (1, 4):
            given, told = arguments(b, t, documents), []
            for backward in (False, True):
                runs = {name: program(name, backward) for name in ("einsum", "tiled")}
                seconds: dict[str, list[float]] = {name: [] for name in runs}
                for _ in range(max(4, min(16, 40_000_000 // (b * t * t)))):
                    for name, run in runs.items():
                        start = time.perf_counter()
                        jax.block_until_ready(run(*given))
                        seconds[name].append(time.perf_counter() - start)
                medians = [statistics.median(took[1:]) for took in seconds.values()]
                told.append(medians[0] / medians[1])
            peaks = [
                run.lower(*given).compile().memory_analysis().temp_size_in_bytes / 1e6
                for run in runs.values()
            ]
            sys.stdout.write(
                f"{b} x {t:<5} {documents} documents   forward {told[0]:5.2f}   with backward "
                f"{told[1]:5.2f}   MB: einsum {peaks[0]:7.1f}, tiled {peaks[1]:7.1f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
