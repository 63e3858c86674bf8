"""cuDNN attention: its inputs, checked without a GPU; its results, if there is a GPU."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zephyr_jax.models.attention import cudnn_over
from zephyr_jax.models.masks import row_layout
from zephyr_jax.sharding import axis_size


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.usefixtures("sharded_mesh")
def test_the_call_equals_float64_with_xlas_kernel(window):
    """The same mask and the same shapes, in float32 and without cuDNN."""
    run = functools.partial(cudnn_over, window=window, kernel="xla")
    cases.check_rows(run, cases.pairs_and_padding(38), window, h=16)


@pytest.mark.usefixtures("sharded_mesh")
def test_the_call_lowers_for_cuda(monkeypatch):
    """The checks of JAX that need no GPU pass, and the kernel gets one mask for all heads."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def loss(q, k, v, *case):
        return cudnn_over(row_layout(*case), 100)(q, k, v).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*cases.shapes(256, 64, "bfloat16"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows = 4 // axis_size("data", "fsdp")
    for name in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        call = next(line for line in text.splitlines() if name in line)
        assert f"tensor<{rows}x1x256x256xbf16>" in call
        assert "CAUSAL" in call


def compare_on_gpu():
    """cuDNN against the reference, both in bfloat16, with branches, padding and a window."""
    assert jax.default_backend() == "gpu"
    case = cases.pairs_and_padding(256)
    layout, real = cases.layout_of(case), (case.segments > 0)[:, None, None, :, None]
    arrays = [x.astype(jnp.bfloat16) for x in cases.inputs(4, 256, h=16)]
    arrays[3] = arrays[3] * real.astype(jnp.bfloat16)
    for window in (3, 100, None):
        want, got = (
            cases.results(cases.named(name, window), arrays, layout) for name in ("einsum", "cudnn")
        )
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            a, b = (np.float32(x) * (1 if i else real) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(a).max())


def gpu_is_here():
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return shutil.which("nvidia-smi") and any(map(importlib.util.find_spec, plugins))


@pytest.mark.slow
@pytest.mark.skipif(not gpu_is_here(), reason="no NVIDIA GPU on this machine, or JAX without CUDA")
def test_cudnn_equals_the_reference_on_a_gpu():
    """In a process of its own: here JAX is held to the CPU."""
    code = "import test_attention_gpu; test_attention_gpu.compare_on_gpu()"
    paths = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    env = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": paths}
    env.pop("XLA_FLAGS", None)
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
