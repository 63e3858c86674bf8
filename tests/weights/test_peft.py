"""PEFT folders: what is written and read, and what is refused."""

import dataclasses
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_adapter_runs import run_config
from test_lora import ALL, flat, random_adapters

import zephyr_jax as zj
from zephyr_jax.__main__ import main
from zephyr_jax.config.run import PROJECTIONS
from zephyr_jax.models.lora import abstract_adapters, merge
from zephyr_jax.training.setup import setup
from zephyr_jax.weights.checkpoint import params_digest
from zephyr_jax.weights.peft import export_peft, load_peft
from zephyr_jax.weights.sources import load_adapters

CONFIG = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "bias": "none",
    "target_modules": [f"{name}_proj" for name in PROJECTIONS], "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base", "init_lora_weights": True, "inference_mode": True,
    "megatron_core": "megatron.core", "qalora_group_size": 16, "rank_pattern": {},
    "loftq_config": {}, "modules_to_save": None, "use_dora": False, "peft_version": "0.21.2",
}  # fmt: skip
WET = dataclasses.replace(ALL, dropout=0.25)


def theirs(adapters):
    """The tensors of a PEFT folder, from our adapters by hand: the oracle of the table."""
    out = {}
    for path, x in flat(adapters).items():
        _, group, name, part = path.split("/")
        block = {"attention": "self_attn", "mlp": "mlp"}[group]
        for i, matrix in enumerate(x):
            # a: inputs, then R; b: R, then outputs. Theirs have outputs first, so both are turned.
            whole = matrix.reshape(-1, 3) if part == "a" else matrix.reshape(3, -1)
            prefix = f"base_model.model.model.layers.{i}.{block}.{name}_proj"
            out[f"{prefix}.lora_{part.upper()}.weight"] = np.ascontiguousarray(whole.T)
    return out


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {k: v for k, v in (CONFIG | config).items() if v != "absent"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapters(cfg):
    return random_adapters(cfg, WET)


def test_an_export_has_their_names_and_layout(cfg, adapters, tmp_path):
    more = {"base_digest": "d" * 64, "card": {"lineage": ["one", "two"]}}
    folder = export_peft(tmp_path / "out", cfg, WET, adapters, "org/base@main", **more)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "digests.json"}
    assert {path.name for path in folder.iterdir()} == names
    got, wanted = load_file(folder / "adapter_model.safetensors"), theirs(adapters)
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(got[name], x, name)
    assert got["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"].shape == (3, 80)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "main")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7, 0.25)
    assert config["target_modules"] == CONFIG["target_modules"]
    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        meta = file.metadata()
    assert meta == {"format": "pt", "writer": "zephyr_jax", "base_digest": "d" * 64}
    card = (folder / "README.md").read_text()
    for text in ("library_name: peft\n", "base_model: org/base\n", "1. one\n2. two\n", "d" * 64):
        assert text in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_exported_comes_back(cfg, adapters, tmp_path, mesh, dtype):
    lora = dataclasses.replace(WET, targets=("v", "o", "down"))
    attention, mlp = (adapters["layers"][part] for part in ("attention", "mlp"))
    attention = {name: attention[name] for name in "vo"}
    adapters = {"layers": {"attention": attention, "mlp": {"down": mlp["down"]}}}
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(cfg, lora))
    placed = jax.device_put(jax.device_get(adapters), shardings)
    export_peft(tmp_path / "out", cfg, lora, placed, "base", dtype=dtype)
    got = load_peft(tmp_path / "out", cfg)
    assert (got.lora, got.base_digest) == (lora, "")
    assert jax.tree.map(lambda x: x.sharding, got.adapters) == shardings
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    for path, x in flat(got.adapters).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, flat(adapters)[path].astype(kind).astype(np.float32))


@pytest.mark.parametrize("stabilized", [False, True])
def test_modules_of_other_ranks_and_scales_have_the_same_products(
    cfg, adapters, tmp_path, stabilized
):
    """Of a folder that others wrote: the products of what it holds, in float64, by module."""
    rng = np.random.default_rng(0)
    tensors, ranks = theirs(adapters), {"q_proj": 5, "layers.1.mlp.up_proj": 2}
    alphas = {"q_proj": 3, r"layers\.[02]\.self_attn\.o_proj": 11}
    wanted = {}
    for name in [name for name in tensors if ".lora_A." in name]:
        module, other = name.split(".lora_")[0], name.replace("_A.", "_B.")
        rank = next((r for key, r in ranks.items() if module.endswith(key)), 3)
        alpha = next((a for key, a in alphas.items() if re.search(key, module)), 7)
        a, b = tensors[name], tensors[other]
        if "layers.2" in module and "down" in module:
            del tensors[name], tensors[other]
            continue
        tensors[name] = a = rng.normal(size=(rank, a.shape[1])).astype(np.float32)
        tensors[other] = b = rng.normal(size=(b.shape[0], rank)).astype(np.float32)
        scale = alpha / (math.sqrt(rank) if stabilized else rank)
        wanted[module] = scale * b.astype(np.float64) @ a.astype(np.float64)
    changes = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": stabilized}
    changes["target_modules"] = ".*_proj"
    changes["exclude_modules"] = r".*layers\.2\.mlp\.down_proj"
    got = load_peft(write(tmp_path / "in", tensors, **changes), cfg)
    assert got.lora.rank == 5
    for path, a in flat(got.adapters).items():
        if path.endswith("/a"):
            b = np.asarray(flat(got.adapters)[path[:-1] + "b"], np.float64)
            _, group, name, _ = path.split("/")
            block = {"attention": "self_attn", "mlp": "mlp"}[group]
            for i in range(cfg.num_hidden_layers):
                whole = np.asarray(a, np.float64)[i].reshape(-1, 5) @ b[i].reshape(5, -1)
                ours = whole.T * got.lora.alpha / got.lora.rank
                module = f"base_model.model.model.layers.{i}.{block}.{name}_proj"
                expected = wanted.get(module, np.zeros_like(ours))
                np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6, err_msg=module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'; only plain LoRA is supported"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, r"shapes: .*q_proj.lora_A.* \(3, 48\) instead of \(8"),
        ({"rank_pattern": {"(q": 8}}, "config.json: it is damaged, or too new"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"some_later_invention": 1.5}, "some_later_invention=1.5"),
        ({"r": 4}, r"do not fit; shapes: .*q_proj.lora_A.weight \(3, 48\) instead of \(4, 48\)"),
        ({"r": "absent"}, r"config.json: it is damaged, or too new .*KeyError.'r'"),
        ({"lora_alpha": -1}, "alpha"),
    ],
)
def test_another_kind_of_adapter_is_refused(cfg, adapters, tmp_path, changes, message):
    folder = write(tmp_path / "in", theirs(adapters), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_peft(folder, cfg)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_broken_are_named(cfg, adapters, tmp_path):
    head = {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 48), np.float32)}
    folder = write(tmp_path / "in", theirs(adapters) | head)
    with pytest.raises(ValueError, match="do not fit; extra: base_model.model.lm_head"):
        load_peft(folder, cfg)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="lacks adapter_model.safetensors; copy"):
        load_peft(folder, cfg)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="in is not a PEFT adapter"):
        load_peft(folder, cfg)


def test_an_export_refuses_what_does_not_fit(cfg, adapters, tmp_path):
    lora = dataclasses.replace(WET, targets=("q", "k"))
    with pytest.raises(ValueError, match="parameters and configuration do not fit; extra: "):
        export_peft(tmp_path / "out", cfg, lora, adapters, "base")
    adapters["layers"]["mlp"]["up"]["b"] = jnp.full_like(adapters["layers"]["mlp"]["up"]["b"], 1e5)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.lora_B.weight has .* above 65504"):
        export_peft(tmp_path / "out", cfg, WET, adapters, "base", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_adapter_alone_is_no_model(cfg, adapters, tmp_path):
    folder = write(tmp_path / "in", theirs(adapters))
    with pytest.raises(FileNotFoundError, match="a PEFT adapter: .* --base=MODEL"):
        zj.load_model(folder)
    fields = dataclasses.asdict(cfg) | {"model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(FileNotFoundError, match="a PEFT adapter: .* --base=MODEL"):
        zj.load_hf(folder)


def port(*words):
    main(["port_weights", *map(str, words)])


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A base on disk, and a checkpoint of a run that adapts it."""
    root = tmp_path_factory.mktemp("adapters")
    config = run_config(world, "sft", root / "base")
    with runs.mesh_of(runs.ONE):
        tok = zj.Tokenizer.from_folder(world / "tokenizer")
        params = zj.init_params(config.model, jax.random.key(3))
        zj.export_hf(config.model, params, tok, root / "base")
        run = setup(config, root / "run")
        drawn = random_adapters(config.model, config.lora)
        run.checkpointer.save(run.state._replace(params=drawn), run.meta)
        run.checkpointer.close()
        tok.save(root / "run")
    return root / "run"


@pytest.fixture
def run(saved):
    """The run, on one device; do not change it."""
    with runs.mesh_of(runs.ONE):
        yield saved


def test_an_adapter_leaves_and_returns_by_the_command(run, tmp_path, refused):
    port("export", run, tmp_path / "adapter", "--format=peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.parent / "base")
    assert {"tokenizer.json", "chat_template.jinja"} <= set(os.listdir(tmp_path / "adapter"))
    again = ("port_weights", "export", run, tmp_path / "adapter", "--format=peft")
    assert "--overwrite replaces it" in refused(*again)
    hf = json.loads((run.parent / "base" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(hf | {"intermediate_size": 48}))
    words = ("--overwrite", f"--base={tmp_path / 'other'}")
    assert "other do not fit; shapes: model.layers.0.mlp." in refused(*again, *words)
    words = ("--format=peft", "--base=org/base@main", "--overwrite")
    port("export", run, tmp_path / "adapter", *words)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "main")
    assert "2. SFT by the recipe demo_sft" in (tmp_path / "adapter" / "README.md").read_text()
    port("import", tmp_path / "adapter", tmp_path / "back", f"--base={run.parent / 'base'}")
    back, whole = zj.load_model(tmp_path / "back"), zj.load_model(run)
    assert params_digest(back.params) == params_digest(whole.params)
    assert back.lineage["lineage"][-1] == f"merged with the PEFT adapter {tmp_path / 'adapter'}"
    port("export", run, tmp_path / "merged", "--dtype=float32")
    assert params_digest(zj.load_hf(tmp_path / "merged")[1]) == params_digest(whole.params)
    words = ("import", tmp_path / "adapter", tmp_path / "new", f"--base={tmp_path / 'merged'}")
    message = refused("port_weights", *words)
    assert f"has {params_digest(whole.params)}; restore the model" in message
    assert not (tmp_path / "new").exists()


def test_a_foreign_adapter_is_merged_into_the_base_that_is_named(run, tmp_path):
    cfg = load_adapters(run).cfg
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        foreign = random_adapters(cfg, ALL)
    write(tmp_path / "in", theirs(foreign))
    port("import", tmp_path / "in", tmp_path / "out", f"--base={run}")
    assert zj.load_model(tmp_path / "out").lineage["source"] == {}
    shardings = jax.tree.map(lambda x: x.sharding, abstract_adapters(cfg, ALL))
    placed = jax.device_put(jax.device_get(foreign), shardings)
    wanted = merge(zj.load_model(run).params, placed, ALL)
    assert params_digest(zj.load_model(tmp_path / "out").params) == params_digest(wanted)
