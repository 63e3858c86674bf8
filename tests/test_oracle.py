"""Logits, loss and every gradient against the stored values of transformers and torch."""

import json

import jax
import numpy as np
import pytest
from make_oracles import CONFIG, FILE, tokens, weights
from safetensors.numpy import save_file

import zephyr_jax as zj
from zephyr_jax.interop.huggingface import hf_specs, hf_tensors, read_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    specs = hf_specs(read_config(folder), "float32")
    save_file(weights({k: v.shape for k, v in specs.items()}), folder / "model.safetensors")
    return zj.load_hf(folder)


def test_logits_equal_transformers(model):  # pitfalls 29, 32, 33, 35
    with np.load(FILE) as oracle:
        want = oracle["logits"]
    assert np.abs(want).max() > 3
    np.testing.assert_allclose(zj.forward(*model, tokens()), want, atol=5e-5)


def test_loss_and_gradients_equal_torch(model):
    cfg, params = model
    mask = np.ones(tokens().shape, bool)

    @jax.jit
    def loss(params):
        logps = zj.token_logps(zj.forward(cfg, params, tokens()), tokens(), mask)
        return zj.sft_loss(logps, mask)[0]

    value, grads = jax.value_and_grad(loss)(params)
    ours = dict(hf_tensors(cfg, grads, "float32"))
    with np.load(FILE) as oracle:
        np.testing.assert_allclose(value, oracle["loss"], rtol=1e-5)
        assert len(ours) == len(oracle.files) - 2
        for name, got in ours.items():
            want = oracle[f"grad/{name}"]
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=name)
