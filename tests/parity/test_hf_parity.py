"""Exported folders in the installed transformers and peft, and theirs here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from port_files import random_tree, small_config
from safetensors.numpy import load_file
from sample_tokenizers import fuzz_texts, golden
from test_lora import ALL, random_adapters
from test_token_ids import tok

import zephyr_jax as zj
from zephyr_jax.config.run import PROJECTIONS, MistralConfig
from zephyr_jax.data.text.chat import render_chat, render_text
from zephyr_jax.models.lora import adapter_shapes
from zephyr_jax.weights.huggingface import export_hf, load_hf
from zephyr_jax.weights.peft import export_peft, load_peft

transformers = pytest.importorskip("transformers", reason="`make parity` installs transformers")
torch = pytest.importorskip("torch", reason="`make parity` installs torch")
peft = pytest.importorskip("peft", reason="`make parity` installs peft")
pytestmark = pytest.mark.parity
__all__ = ["tok"]


@pytest.fixture(scope="module")
def cfg(tok) -> MistralConfig:
    return small_config(vocab_size=tok.vocab_size, sliding_window=96)


@pytest.fixture(scope="module")
def params(cfg) -> dict:
    return jax.tree.map(lambda x: np.float32(0.2) * x, random_tree(cfg))


@pytest.fixture(scope="module")
def folder(cfg, params, tok, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "exported"
    return export_hf(cfg, params, tok, path, max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_their_tokenizer_gives_the_recorded_ids(tok, theirs):
    for case in golden("tokenizer_cases"):
        ids = theirs(case["text"], add_special_tokens=False)["input_ids"]
        assert ids == tok.encode(case["text"], parse_special=True), case["text"]
        if tok.vocab_size == 32000:
            assert ids == case["ids"], case["text"]
        assert theirs(case["text"])["input_ids"] == [1, *ids]


def test_their_template_gives_the_recorded_chats(tok, theirs):
    for case in golden("chat_cases"):
        messages, prompted = case["messages"], case["add_generation_prompt"]
        options = {"add_generation_prompt": prompted}
        text = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert text == "<s>" + render_text(messages, prompted) == "<s>" + case["text"]
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert ids == render_chat(tok, messages, prompted, parse_special=True)[0]
        if tok.vocab_size == 32000:
            assert ids == [1, *case["ids"]]


def test_their_template_refuses_unknown_roles(theirs):
    with pytest.raises(Exception, match="role tool is not system, user or assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_their_decoding_of_an_answer_is_ours(tok, theirs):
    header = len(tok.encode("x\n"))
    for text in fuzz_texts(300, seed=21):
        answer = tok.encode("x\n" + text.replace("▁", "_"))[header:]
        both = theirs.decode([*tok.encode("x\n"), *answer, tok.eos_id], skip_special_tokens=True)
        assert both == "x\n" + tok.decode([*answer, tok.eos_id], continuation=True)


def test_special_tokens_and_vocabulary(tok, theirs):
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.pad_token_id == 0
    assert len(theirs) == tok.vocab_size  # nothing was added


def test_their_configuration_is_ours(cfg, folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    for name in (field.name for field in dataclasses.fields(MistralConfig)):
        if name not in ("rope_theta", "dtype"):
            assert getattr(config, name) == getattr(cfg, name), name
    assert config.rope_parameters["rope_theta"] == cfg.rope_theta
    assert config.dtype == torch.float32
    assert MistralConfig.from_hf(json.loads(config.to_json_string(use_diff=False))) == cfg


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_go_both_ways_byte_for_byte(cfg, params, tok, tmp_path, dtype):
    export_hf(cfg, params, tok, tmp_path / "ours", dtype=dtype)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == getattr(torch, dtype)
    assert model.generation_config.eos_token_id == tok.eos_id
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        bits = tensor.contiguous().view(torch.int32 if dtype == "float32" else torch.int16)
        assert bits.numpy().tobytes() == ours[name].tobytes(), name
    for limit in ("1GB", "200KB"):
        model.save_pretrained(tmp_path / limit, max_shard_size=limit)
        got_cfg, got = load_hf(tmp_path / limit)
        assert got_cfg == dataclasses.replace(cfg, dtype=dtype)
        export_hf(got_cfg, got, tok, tmp_path / f"{limit}-again", dtype=dtype)
        again = tmp_path / f"{limit}-again" / "model.safetensors"
        assert again.read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()


def test_a_tied_model_goes_both_ways(cfg, params, tok, tmp_path):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=True)
    tied = {k: v for k, v in params.items() if k != "head"}
    export_hf(cfg, tied, tok, tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model.save_pretrained(tmp_path / "theirs")
    got_cfg, got = load_hf(tmp_path / "theirs")
    assert got_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, got, tied)


def test_greedy_replies_of_an_export_equal_ours(cfg, params, tok, folder, theirs):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "MistralForCausalLM"
    for text in ("What color is the lorn?", "Add 2 and 3."):
        messages = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == render_chat(tok, messages, True)[0]
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0]
        answer = [i for i in out[len(ids) :].tolist() if i != tok.eos_id]
        ours = zj.generate(cfg, params, tok, [messages], max_new_tokens=24)
        assert ours == [tok.decode(answer, continuation=True)]


TARGETS = [ALL.targets, ("q", "o", "down"), ("v", "gate")]


@pytest.fixture
def base(tok, tmp_path):
    """Our parameters, and transformers' model of them."""
    sizes = {"sliding_window": 5, "initializer_range": 0.2, "vocab_size": tok.vocab_size}
    cfg = dataclasses.replace(MistralConfig.tiny(), **sizes)
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
