"""Splash attention for real TPUs: traced and lowered here, compiled where libtpu is installed."""

import re

import attention_cases as cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from test_configs import abstract_run

from zephyr_jax.config.run import load_config
from zephyr_jax.models import attention as module
from zephyr_jax.models.masks import row_layout
from zephyr_jax.planning.compiling import ENVIRONMENT
from zephyr_jax.sharding import AXES


def gradient(window, branched):
    """A function of `cases.shapes`, with everything that training computes."""

    def loss(q, k, v, segments, branches, positions):
        layout = row_layout(segments, branches if branched else None, positions)
        out = cases.attention(q, k, v, layout, window, "splash")
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize("branched", [False, True])
def test_the_kernel_lowers_for_tpu(branched, monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    traced = jax.jit(gradient(100, branched)).trace(*cases.shapes(256, 80, "bfloat16"))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") >= 3  # forward, dk with dv, and dq


@pytest.fixture
def v5e(monkeypatch):
    """A function from a topology's name and mesh sizes to a mesh of chips that are not here."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")
    from jax.experimental import topologies

    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)

    def mesh(topology, sizes):
        described = topologies.get_topology_desc(f"v5e:{topology}", platform="tpu")
        devices = topologies.make_mesh(described, sizes, AXES).devices
        return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 3)

    # Mosaic refuses products of bfloat16 in the precision that the other tests ask for.
    with jax.default_matmul_precision("default"):
        yield mesh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("t", "head_dim", "dtype", "window", "branched"),
    [
        (512, 128, "bfloat16", None, True),
        (1000, 80, "bfloat16", 256, True),
        (384, 64, "bfloat16", 100, False),
        (256, 10, "float32", None, False),
    ],
)
def test_the_kernel_compiles_for_v5e(v5e, t, head_dim, dtype, window, branched):
    with jax.set_mesh(v5e("2x2", (1, 2, 2))):
        traced = jax.jit(gradient(window, branched)).trace(*cases.shapes(t, head_dim, dtype))
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    # forward, dk with dv, and dq; twice where there are branches and a window
    assert text.count('custom_call_target="tpu_custom_call"') == (6 if branched and window else 3)
    assert not re.findall(r" (?:all-gather|all-reduce|all-to-all|collective-permute)\S*\(", text)


@pytest.mark.slow
def test_a_preference_step_compiles_for_sixteen_v5e_chips(v5e):
    """Two layers of an eighth of the 7B's width; the window makes the rows' parts change places."""
    small = ("hidden_size=512", "intermediate_size=1792", "num_hidden_layers=2", "vocab_size=2048")
    small += ("num_attention_heads=8", "num_key_value_heads=4", "sliding_window=256")
    words = ("data.seq_len=384", "train.micro_batches=1", "train.remat=full")
    words += tuple(f"model.{word}" for word in small)
    config = load_config("zephyr_7b_dpo", [f"--config.{word}" for word in words])
    with jax.set_mesh(v5e("4x4", (1, 4, 4))):
        step, state, batch, _ = abstract_run(config, rows=16)
        traced = step.trace(state, batch)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    # a scanned layer: forward, forward again, dk with dv, dq; each without one of the branches
    assert text.count('custom_call_target="tpu_custom_call"') == 8
    assert not re.search(r"\b384,384\b", text)  # nothing of T x T is ever built
