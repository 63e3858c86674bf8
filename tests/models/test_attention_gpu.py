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
from zephyr_jax.sharding import axis_size, named_sharding, spec

AXES = ("BTKGH", "BSKH", "BSKH", "BTKGH")


def inputs(t, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (4, t, 2, 2, 16), (4, t, 2, 16), (4, t, 2, 16), (4, t, 2, 2, 16)
    return [jax.random.normal(k, n).astype(dtype) for k, n in zip(keys, shapes, strict=True)]


def output_and_gradients(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("window", [3, None])
def test_the_call_equals_float64_with_xlas_kernel(window, mesh):
    """The same mask and the same shapes, in float32 and without cuDNN."""
    case = cases.pairs_and_padding(38)
    *arrays, cotangent = inputs(38, jnp.float32)
    real = (case.segments > 0)[:, :, None, None, None]
    place = [
        jax.device_put(jax.device_get(x), named_sharding(spec(axes)))
        for x, axes in zip((*arrays, cotangent * real), AXES, strict=True)
    ]
    ints = [jax.device_put(x, named_sharding(spec("BT"))) for x in case]

    @jax.jit
    def run(segments, branches, positions, *arrays):
        layout = row_layout(segments, branches, positions)
        return output_and_gradients(cudnn_over(layout, window, "xla"), *arrays)

    got = jax.device_get(run(*ints, *place))
    want = cases.reference(*arrays, cases.table(case, window), cotangent * real)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (got[0] * real, *got[1:]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6, err_msg=name)


def test_the_call_lowers_for_cuda(mesh, monkeypatch):
    """The checks of JAX that need no GPU pass, and the kernel gets one mask for all heads."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def loss(q, k, v, *case):
        return cudnn_over(row_layout(*case), 100)(q, k, v).astype(jnp.float32).sum()

    def shape(sizes, axes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=named_sharding(spec(axes)))

    wide = (4, 256, 2, 4, 64), (4, 256, 2, 64), (4, 256, 2, 64)
    arrays = [shape(s, a, jnp.bfloat16) for s, a in zip(wide, AXES[:3], strict=True)]
    ints = [shape((4, 256), "BT", jnp.int32)] * 3
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, *ints)
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
    *arrays, cotangent = inputs(256, jnp.bfloat16)
    real = jnp.asarray(case.segments > 0)[:, :, None, None, None]
    arrays += [cotangent * real.astype(cotangent.dtype)]
    layout = row_layout(*map(jnp.asarray, case))
    for window in (3, 100, None):

        def of(name, window=window):
            attend = functools.partial(
                cases.attention, layout=layout, window=window, implementation=name
            )
            run = jax.jit(functools.partial(output_and_gradients, attend))
            out, *grads = run(*arrays)
            return [np.asarray(x, np.float32) for x in (jnp.where(real, out, 0), *grads)]

        for a, b in zip(of("einsum"), of("cudnn"), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(a).max())


def gpu_is_here():
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return shutil.which("nvidia-smi") and any(map(importlib.util.find_spec, plugins))


@pytest.mark.slow
@pytest.mark.skipif(not gpu_is_here(), reason="no NVIDIA GPU on this machine, or JAX without CUDA")
def test_cudnn_equals_the_reference_on_a_gpu():
    """In a process of its own: here JAX is held to the CPU."""
    code = "import test_attention_gpu; test_attention_gpu.compare_on_gpu()"
    folder = Path(__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(folder.parent)}
    env.pop("XLA_FLAGS", None)
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)
