"""Our Mistral against transformers' (torch, float32, eager), and greedy text through an export."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with make parity")
transformers = pytest.importorskip("transformers", reason="transformers comes with make parity")

from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.weights.huggingface import export_hf

pytestmark = pytest.mark.parity


def model_of(tok, **changes):
    """A configuration with all dimensions unequal, and large weights."""
    cfg = dataclasses.replace(
        zj.MistralConfig.tiny(),
        **{"vocab_size": tok.vocab_size, "initializer_range": 0.2, "sliding_window": 5} | changes,
    )
    return cfg, random_params(cfg)


def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "MistralForCausalLM"
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None, "rope_theta": 1e6},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"num_key_value_heads": 8, "sliding_window": 3},
    ],
    ids=["window", "theta", "tied", "ungrouped"],
)
def test_logits_equal_transformers(tok, tmp_path, changes):
    cfg, params = model_of(tok, **changes)
    export_hf(cfg, params, tok, tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (3, 23))
    with torch.no_grad():
        want = theirs(tmp_path / "hf")(torch.tensor(tokens)).logits.numpy()
    got = zj.forward(cfg, params, jax.numpy.asarray(tokens))
    assert np.abs(want).max() > 3  # a real difference would show
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_a_float32_export_says_greedily_what_we_say(tok, tmp_path):
    cfg, params = model_of(tok)
    export_hf(cfg, params, tok, tmp_path / "hf")
    model = theirs(tmp_path / "hf")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for said in ("What color is the lorn?", "Add 2 and 3."):
        messages = [{"role": "user", "content": said}]
        ids = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == zj.render_chat(tok, messages, add_generation_prompt=True)[0]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=tok.eos_id
            )[0, len(ids) :].tolist()
        ours = zj.generate(cfg, params, tok, [messages], max_new_tokens=24)
        assert ours == [tok.decode([i for i in out if i != tok.eos_id], continuation=True)]
