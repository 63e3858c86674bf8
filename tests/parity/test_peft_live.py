"""Our adapters in the installed peft and transformers, and theirs here."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with make parity")
transformers = pytest.importorskip("transformers", reason="transformers comes with make parity")
peft = pytest.importorskip("peft", reason="peft comes with make parity")

from conftest import random_params
from test_lora import ALL, random_adapters

import zephyr_jax as zj
from zephyr_jax.config.run import PROJECTIONS
from zephyr_jax.models.lora import adapter_shapes
from zephyr_jax.weights.huggingface import export_hf
from zephyr_jax.weights.peft import export_peft, load_peft

pytestmark = pytest.mark.parity
TARGETS = [ALL.targets, ("q", "o", "down"), ("v", "gate")]


@pytest.fixture
def base(cfg, tok, tmp_path):
    """Our parameters, and transformers' model of them."""
    cfg = dataclasses.replace(cfg, vocab_size=tok.vocab_size)
    params = random_params(cfg)
    export_hf(cfg, params, tok, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    return cfg, params, model.eval()


def tokens_of(cfg):
    return np.random.default_rng(0).integers(3, cfg.vocab_size, (3, 23))


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(cfg, params, lora, adapters, tokens):
    options = zj.ForwardOptions(adapters=adapters, lora=lora)
    return zj.forward(cfg, params, jnp.asarray(tokens), options=options)


@pytest.mark.parametrize("targets", TARGETS)
def test_our_adapter_computes_the_same_in_peft_which_finds_its_base(base, tok, tmp_path, targets):
    cfg, params, model = base
    lora = dataclasses.replace(ALL, targets=targets, dropout=0.25)
    adapters, tokens = random_adapters(cfg, lora), tokens_of(cfg)
    export_peft(tmp_path / "adapter", cfg, lora, adapters, str(tmp_path / "base"), tok=tok)
    chat = [{"role": "user", "content": "Hi there"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == zj.render_chat(tok, chat, True)[0]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32
    )
    want = logits(loaded.eval(), tokens)
    assert np.abs(want - logits(model, tokens)).max() > 0.3  # a real difference would show
    np.testing.assert_allclose(our_logits(cfg, params, lora, adapters, tokens), want, atol=5e-5)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("targets", [*TARGETS, "all-linear"])
def test_an_adapter_of_peft_computes_the_same_here(base, tmp_path, targets, stabilized):
    cfg, params, model = base
    names = PROJECTIONS if targets == "all-linear" else targets
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.25,
        target_modules=targets if targets == "all-linear" else [f"{n}_proj" for n in names],
        use_rslora=stabilized,
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # neither matrix is zero
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    got = load_peft(tmp_path / "theirs", cfg)
    assert sorted(got.lora.targets) == sorted(names)
    assert {k.split("/")[2] for k in adapter_shapes(cfg, got.lora)} == set(names)
    tokens = tokens_of(cfg)
    ours = our_logits(cfg, params, got.lora, got.adapters, tokens)
    want = logits(theirs, tokens)
    with theirs.disable_adapter():
        assert np.abs(want - logits(theirs, tokens)).max() > 0.3
    np.testing.assert_allclose(ours, want, atol=5e-5)
