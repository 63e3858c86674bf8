"""Greedy text of an export: transformers' (torch, float32, eager) against ours."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="torch comes with make parity")
transformers = pytest.importorskip("transformers", reason="transformers comes with make parity")

from conftest import random_params

import zephyr_jax as zj
from zephyr_jax.weights.huggingface import export_hf

pytestmark = pytest.mark.parity


def test_greedy_replies_of_an_export_equal_ours(cfg, tok, tmp_path):
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size)
    params = random_params(cfg)
    export_hf(cfg, params, tok, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "MistralForCausalLM"
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("What color is the lorn?", "Add 2 and 3."):
        messages = [{"role": "user", "content": text}]
        ids = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == zj.render_chat(tok, messages, add_generation_prompt=True)[0]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=tok.eos_id
            )[0, len(ids) :].tolist()
        ours = zj.generate(cfg, params, tok, [messages], max_new_tokens=24)
        assert ours == [tok.decode([i for i in out if i != tok.eos_id], continuation=True)]
