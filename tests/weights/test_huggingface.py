"""Hugging Face folders: tensors made by hand, both directions, bit for bit, and what is refused."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import port_files
import pytest
import runs
from port_files import assert_same_tree, random_tree
from safetensors.numpy import load_file, save_file

import zephyr_jax as zj
from zephyr_jax.config.model import MistralConfig
from zephyr_jax.data.text.chat import CHAT_TEMPLATE
from zephyr_jax.models.parameters import param_shardings
from zephyr_jax.sharding import make_mesh
from zephyr_jax.training.setup import setup
from zephyr_jax.weights.gguf import export_gguf
from zephyr_jax.weights.huggingface import export_hf, hf_layout, load_hf
from zephyr_jax.weights.safetensors import SafetensorsReader

SIZES = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 60}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 8}
tok, cfg, params = port_files.tok, port_files.cfg, port_files.params


def theirs(cfg: MistralConfig, params: dict) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, from our parameters by hand: the oracle of the table."""
    heads = cfg.num_attention_heads * cfg.head_dim
    d = cfg.hidden_size
    out = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    if not cfg.tie_word_embeddings:
        out["lm_head.weight"] = params["head"].T
    layers = params["layers"]
    for i in range(cfg.num_hidden_layers):
        name = f"model.layers.{i}."
        attention = {k: x[i] for k, x in layers["attention"].items()}
        mlp = {k: x[i] for k, x in layers["mlp"].items()}
        out[name + "input_layernorm.weight"] = layers["attention_norm"][i]
        out[name + "post_attention_layernorm.weight"] = layers["mlp_norm"][i]
        for proj in "qkv":
            out[name + f"self_attn.{proj}_proj.weight"] = attention[proj].reshape(d, -1).T
        out[name + "self_attn.o_proj.weight"] = attention["o"].reshape(heads, d).T
        for proj in ("gate", "up", "down"):
            out[name + f"mlp.{proj}_proj.weight"] = mlp[proj].T
    return {k: np.ascontiguousarray(x) for k, x in out.items()}


def hf_folder(folder, cfg, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    fields = dataclasses.asdict(cfg) | {"model_type": "mistral"} | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def files_of(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_import_reads_a_checkpoint_made_by_hand(tmp_path, cfg, tied):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=tied)
    params = random_tree(cfg)
    tensors = theirs(cfg, params)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    loaded_cfg, loaded = load_hf(hf_folder(tmp_path, cfg, tensors))
    assert loaded_cfg == cfg
    assert_same_tree(loaded, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_import_of_an_export_is_bit_identical_sharded_or_not(tmp_path, cfg, tok, tied):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=tied)
    params = jax.tree.map(jnp.asarray, random_tree(cfg))
    for name, limit in (("one", 10**9), ("many", 100_000)):
        export_hf(cfg, params, tok, tmp_path / name, max_shard_bytes=limit)
        loaded_cfg, loaded = load_hf(tmp_path / name)
        assert loaded_cfg == cfg
        assert_same_tree(loaded, params)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    export_hf(cfg, params, tok, tmp_path / "again", max_shard_bytes=100_000)
    many, again = files_of(tmp_path / "many"), files_of(tmp_path / "again")
    assert many.keys() == again.keys()
    assert [k for k in many if many[k] != again[k]] == ["README.md"]  # whose title is the folder's


def test_arrays_are_created_with_their_sharding(tmp_path, cfg, params, tok, monkeypatch):
    """A device reads only its own slices, and an export gathers them."""
    sizes, read = [], SafetensorsReader.read

    def spy(self, name, index=()):
        array = read(self, name, index)
        sizes.append((name, array.size))
        return array

    monkeypatch.setattr(SafetensorsReader, "read", spy)
    hf_folder(tmp_path / "in", cfg, theirs(cfg, params))
    with jax.set_mesh(make_mesh(1, 2, 4)):
        _, loaded = load_hf(tmp_path / "in")
        assert jax.tree.map(lambda x: x.sharding, loaded) == param_shardings(cfg)
        assert not loaded["embed"].sharding.is_fully_replicated
        q = cfg.hidden_size * cfg.num_attention_heads * cfg.head_dim
        assert {n for name, n in sizes if "q_proj" in name or "o_proj" in name} == {q // 8}
        assert_same_tree(loaded, params)
        export_hf(cfg, loaded, tok, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == hf_layout(cfg).shapes.keys()
    assert_same_tree(tensors, theirs(cfg, params))


def test_all_that_does_not_fit_is_listed_at_once(tmp_path, cfg, params):
    tensors = theirs(cfg, params)
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = np.zeros(80, np.float32)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    with pytest.raises(ValueError, match=r"tensors and config.json do not fit") as error:
        load_hf(hf_folder(tmp_path, cfg, tensors))
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; " in message
    assert "extra: model.layers.0.self_attn.q_proj.bias, model.layers.1.self" in message
    assert "shapes: lm_head.weight (48, 424) instead of (424, 48)" in message
    assert "\n" not in message
    norm = {"model.norm.weight": np.ones(48, np.int64)}
    with pytest.raises(ValueError, match="norm.weight has dtype I64"):
        load_hf(hf_folder(tmp_path, cfg, theirs(cfg, params) | norm))


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path, cfg):
    cfg = dataclasses.replace(cfg, tie_word_embeddings=True)
    params = random_tree(cfg)
    tensors = theirs(cfg, params)
    tensors["lm_head.weight"] = params["embed"].copy()
    _, loaded = load_hf(hf_folder(tmp_path, cfg, tensors))
    assert_same_tree(loaded, params)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(ValueError, match=r"do not fit; extra: lm_head.weight"):
        load_hf(hf_folder(tmp_path, cfg, tensors))


def test_config_errors_are_one_line(tmp_path, cfg, params):
    tensors = theirs(cfg, params)
    with pytest.raises(FileNotFoundError, match="is not a Hugging Face model"):
        load_hf(tmp_path)
    for config, match in (
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "x"}}, "type 'x'"),
        ({"rope_scaling": "x"}, "rope_scaling='x' must be of type dict or"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be of type float"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be of type float"),
        ({"sliding_window": True}, "sliding_window=True must be of type int or"),
        ({"tie_word_embeddings": []}, r"tie_word_embeddings=\[\] must be of type bool"),
        ({"num_hidden_layers": 10**9}, "000, but there are only 30 tensors"),
        ({"hidden_size": 10**9}, "do not fit; shapes: "),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000 is no number"),
    ):
        with pytest.raises(ValueError, match=match):
            load_hf(hf_folder(tmp_path, cfg, tensors, **config))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ValueError, match="lacks hidden_size, num_attention_heads"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_hf(tmp_path)


def test_an_export_has_every_file_and_both_generations_of_keys(tmp_path, cfg, params, tok):
    cfg = dataclasses.replace(cfg, rope_theta=12345.0)
    export_hf(cfg, params, tok, tmp_path / "x" / "m", dtype="bfloat16", max_shard_bytes=100_000)
    files = files_of(tmp_path / "x" / "m")
    assert {k for k in files if not k.endswith(".safetensors")} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md"),
        *("model.safetensors.index.json", "digests.json"),
    }
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["m"]
    config = json.loads(files["config.json"])
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["sliding_window"], config["head_dim"]) == (64, 10)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 2
    assert files["tokenizer.model"] == tok.files["tokenizer.model"]
    assert files["chat_template.jinja"].decode() == CHAT_TEMPLATE
    tokenizer = json.loads(files["tokenizer_config.json"])
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["legacy"] is True
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<s>", "</s>")
    assert tokenizer["pad_token"] != tokenizer["eos_token"]
    index = json.loads(files["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(params))
    assert MistralConfig.from_hf(config) == dataclasses.replace(cfg, dtype="bfloat16")


def test_only_an_export_is_ever_replaced(tmp_path, cfg, params, tok):
    target = tmp_path / "m"
    target.mkdir()
    export_hf(cfg, params, tok, target)  # an empty folder is nobody's
    export_hf(cfg, params, tok, target, dtype="bfloat16", max_shard_bytes=100_000)
    assert not (target / "model.safetensors").exists()
    (target / "notes.txt").write_text("mine")
    before = files_of(target)
    with pytest.raises(FileExistsError, match="not an export of zephyr_jax .it holds notes.txt"):
        export_hf(cfg, params, tok, target)
    assert files_of(target) == before
    other = hf_folder(tmp_path / "theirs", cfg, theirs(cfg, params))
    with pytest.raises(FileExistsError, match="it holds config.json"):
        export_hf(cfg, params, tok, other)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="it holds file"):
        export_hf(cfg, params, tok, tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "m", "theirs"]
    (tmp_path / "link").symlink_to(tmp_path / "big")  # a link stays, and its target is replaced
    for _ in range(2):
        export_hf(cfg, params, tok, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "config.json").is_file()


@pytest.mark.parametrize("export", [export_hf, export_gguf])
def test_what_does_not_fit_is_not_exported(export, tmp_path, cfg, params, tok):
    large, headless = dict(params, head=params["head"] * 1e6), dict(params)
    del headless["head"]
    small = dataclasses.replace(cfg, vocab_size=100)
    other = dataclasses.replace(cfg, eos_token_id=7)
    for model, options, message in (
        ((cfg, params), {"card": {"nmae": "x"}}, "unknown fields of the model card: nmae; it has"),
        ((cfg, params), {"dtype": "int8"}, "dtype='int8' is not supported; use one of float32"),
        ((cfg, headless), {}, "parameters and configuration do not fit; missing: head"),
        ((cfg, large), {"dtype": "float16"}, "weight has weights above 65504, .*; use bfloat16"),
        ((small, random_tree(small)), {}, "has 420 tokens, .* vocab_size=100"),
        ((other, params), {}, "has 420 tokens, .* 1 and 7; export"),
    ):
        with pytest.raises(ValueError, match=message):
            export(*model, tok, tmp_path / "m.gguf", **options)
    assert not os.listdir(tmp_path)


def test_absent_keys_are_what_transformers_takes_for_them():
    mistral = MistralConfig.from_hf({"model_type": "mistral", **SIZES})
    llama = MistralConfig.from_hf({"model_type": "llama", **SIZES})
    assert mistral.rms_norm_eps == llama.rms_norm_eps == 1e-6
    assert (mistral.max_position_embeddings, llama.max_position_embeddings) == (131072, 2048)
    assert (mistral.num_key_value_heads, llama.num_key_value_heads) == (8, 8)
    assert (mistral.sliding_window, llama.sliding_window) == (4096, None)
    assert (llama.end_ids, mistral.end_ids, mistral.head_dim) == ((2,), (2,), 6)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (7, 8, (7, 8)), ([7, 8], [8, 9, 7], (7, 8, 9)), (None, [9], (9,)), (5, None, (5,)),
        (None, None, ()), ([], "absent", ()), ("absent", [8], (8,)), ("absent", "absent", (2,)),
        ([], 420, "eos_token_id=420 must be ids below vocab_size=420"),
        ([2, -1], [], r"eos_token_id=\(2, -1\) must be ids below"),
        ("</s>", [], r"eos_token_id='</s>' must be of type int"),
    ],
)  # fmt: skip
def test_every_end_token_of_both_files_is_read(
    config, generation, ends, tmp_path, cfg
):  # pitfall 47
    cfg = dataclasses.replace(cfg, vocab_size=420)
    hf_folder(tmp_path, cfg, theirs(cfg, random_tree(cfg)))
    (tmp_path / "generation_config.json").write_text("{}")
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        fields = json.loads((tmp_path / name).read_text()) | {"eos_token_id": value}
        if value == "absent":
            del fields["eos_token_id"]
        (tmp_path / name).write_text(json.dumps(fields))
    if isinstance(ends, str):
        with pytest.raises(ValueError, match=f"config.json: {ends}"):
            load_hf(tmp_path)
    else:
        assert load_hf(tmp_path)[0].end_ids == ends


def test_end_tokens_outlive_a_checkpoint_and_a_run(world, tmp_path):
    """In every file of the export: the tokenizer's, then the others of the initial model."""
    config = runs.config_of(world, "sft")
    tok = zj.Tokenizer.from_folder(config.data.tokenizer)
    cfg = dataclasses.replace(config.model, eos_token_id=[7, 2, 9])
    export_hf(cfg, random_tree(cfg), tok, tmp_path / "hf")
    assert load_hf(tmp_path / "hf")[0].end_ids == (2, 7, 9)
    zj.save_model(zj.load_model(tmp_path / "hf"), tmp_path / "ours")
    model = zj.load_model(tmp_path / "ours")
    for name in ("config.json", "generation_config.json"):
        export_hf(*model[:3], tmp_path / "again")
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [2, 7, 9]
    with runs.mesh_of(runs.ONE):
        run = setup(dataclasses.replace(config, init=str(tmp_path / "ours")), tmp_path / "run")
    assert run.meta["model"]["eos_token_id"] == (2, 7, 9)
