"""Recipes against the table of published numbers, and `python -m zephyr_jax.recipes`."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from processes import output_of
from recipe_table import LAUNCHED, LENGTHS, RECIPES, TRAINER_DIFFERS
from zephyr_jax.recipes.__main__ import literal, main

from zephyr_jax.config.preference import DpoConfig
from zephyr_jax.config.run import load_config
from zephyr_jax.data.packing.batches import make_plan
from zephyr_jax.data.packing.packed import PackedSet
from zephyr_jax.data.packing.packing import level_batches
from zephyr_jax.training.optim import make_schedule, warmup_steps

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
VARIANTS = [name for name in NAMES if "as base" in (FOLDER / f"{name}.py").read_text()]
# How a machine works a recipe through, and where things lie: no publication speaks of these.
FREE = {"name", "data.data_dir", "data.tokenizer", "train.micro_batches"}
FREE |= {"train.remat", "train.reduce_dtype", "train.attention"}
FREE |= {"mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context"}
FREE |= {"optim.offload_optimizer", "train.trackers", "train.profile", "train.keep_best"}
FREE |= {"data.new_tokenizer", "train.compiler_options"}


def flat(config):
    """`{"optim.peak_lr": 2e-5, ...}`; a section that is None is left out."""
    found = flatten_dict(config.to_dict(), sep=".")
    return {name: x for name, x in found.items() if name not in ("dpo", "lora")}


def cosine(step, warmup, total):
    """transformers.get_cosine_schedule_with_warmup's factor, in float64."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


def linear(step, warmup, total):
    """transformers.get_linear_schedule_with_warmup's factor, in float64."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def plan_of(config, examples):
    """The plan of a run over this many pairs, or full rows of a stream."""
    manifest = {"splits": {"train": {"rows": examples}, "eval": {"rows": 1}}}
    if config.dpo:
        batches = level_batches([9] * examples, config.train.batch_size, config.seed, 0)
        assert sum(map(len, batches)) == examples
        manifest |= {"rows_per_batch": 48, "steps_per_epoch": len(batches)}
    packed = PackedSet(ROOT, manifest)
    return make_plan(packed, config.train.batch_size, config.train.epochs, config.train.max_steps)


def test_every_recipe_of_7b_is_in_the_table():
    names = {path.stem for path in ROOT.glob("configs/zephyr_7b_*.py")}
    assert {name for name in names if "_v5e_" not in name} == set(RECIPES)


def test_a_recipe_laid_out_for_a_slice_is_the_recipe():
    names = [path.stem for path in ROOT.glob("configs/*_v5e_*.py")]
    assert len(names) == 6
    for name in names:
        recipe, chips = name.split("_v5e_")
        found, wanted = (flat(load_config(x)) for x in (name, recipe))
        laid = {"name", "train.micro_batches", "mesh.data", "mesh.fsdp", "mesh.tensor"}
        differing = {key for key in found if found[key] != wanted[key]}
        assert {"name", "mesh.fsdp"} <= differing <= laid
        mesh = load_config(name).mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == int(chips)


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_is_the_published_one(name):
    found, wanted = flat(load_config(name)), RECIPES[name]
    defaults = {f"dpo.{f.name}": f.default for f in dataclasses.fields(DpoConfig)}
    unsaid = set(found) - set(wanted) - FREE
    assert unsaid == {key for key in found if key in defaults} - set(wanted)
    assert {key: found[key] for key in unsaid} == {key: defaults[key] for key in unsaid}
    assert {key: found.get(key) for key in wanted} == wanted


def test_the_page_names_every_recipe_and_its_steps():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert not [name for name in RECIPES if f"`{name}`" not in page]
    rows = [line for line in page.splitlines() if line.startswith("| `zephyr")]
    for length in LENGTHS.values():
        several = length.steps != length.per_epoch
        shown = f"| {length.steps:,}" + f" ({length.per_epoch:,} an epoch)" * several
        assert any(line.endswith(f"{shown} | {length.warmup:,} |") for line in rows), shown


def test_preferences_of_the_paper_are_kept_apart():
    folders = {name: load_config(name).data.data_dir for name in RECIPES}
    apart = {name for name, folder in folders.items() if folder == "data/paper"}
    assert apart == {name for name in RECIPES if load_config(name).train.epochs == 3}
    assert set(folders.values()) == {"data", "data/paper"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_dpo_recipe_goes_on_from_the_sft_recipe_of_its_family(name):
    config = load_config(name)
    if config.dpo is None:
        assert name.removesuffix("_lora").removesuffix("_qlora").endswith("_sft")
        return
    before = load_config(config.init.removeprefix("runs/"))
    assert before.name == name.replace("_dpo", "_sft")
    assert before.dpo is None
    assert (before.model, before.lora is None) == (config.model, config.lora is None)


@pytest.mark.parametrize("name", LENGTHS)
def test_steps_and_warm_up(name):
    config, length = load_config(name), LENGTHS[name]
    plan = plan_of(config, length.examples)
    assert (plan.steps_per_epoch, plan.train_steps) == (length.per_epoch, length.steps)
    assert length.steps == config.train.epochs * math.ceil(
        length.examples / config.train.batch_size
    )
    assert warmup_steps(config.optim, length.steps) == length.warmup


@pytest.mark.parametrize("name", LAUNCHED)
def test_batches_are_those_of_the_original_launch(name):
    each, devices, accumulated = LAUNCHED[name]
    config, length = load_config(name), LENGTHS[name]
    assert config.train.batch_size == each * devices * accumulated
    loaded = math.ceil(length.examples / (each * devices))  # the last batch is kept
    planned = max(loaded // accumulated, 1)
    assert planned == TRAINER_DIFFERS.get(name, length.per_epoch)


@pytest.mark.parametrize("name", LENGTHS)
def test_the_learning_rate_of_every_step(name):
    """That of update i is the factor at i: 0 at first; in ours a warm-up is one update ahead."""
    optim, length = load_config(name).optim, LENGTHS[name]
    steps = jnp.arange(length.steps + 1)
    rates = np.asarray(jax.vmap(make_schedule(optim, length.steps))(steps), np.float64)
    factor = {"cosine": cosine, "linear": linear}[optim.schedule_and_share[0]]
    ahead = 0 if optim.warmup_from_zero else 1
    wanted = [
        optim.peak_lr * factor(i + ahead * (i < length.warmup), length.warmup, length.steps)
        for i in steps.tolist()
    ]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6, atol=2e-7 * optim.peak_lr)
    first = ahead / length.warmup if length.warmup else 1.0
    np.testing.assert_allclose(
        rates[[0, length.warmup]] / optim.peak_lr, [first, 1], rtol=1e-6, atol=1e-7
    )
    assert (np.diff(rates[: length.warmup + 1 - ahead]) > 0).all()
    assert (np.diff(rates[length.warmup :]) <= 0).all()
    assert rates[-1] <= 1e-9 * optim.peak_lr


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.1, 30, 3), (0.07, 100, 8), (0.1, 1, 1)])
def test_warm_up_is_rounded_up_as_the_trainer_does(ratio, steps, warmup):
    optim = dataclasses.replace(load_config("zephyr_7b_sft").optim, warmup_ratio=ratio)
    assert warmup_steps(optim, steps) == math.ceil(steps * ratio) == warmup


def test_list_names_every_file_and_what_it_is(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 3 for line in lines), lines


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("feedback")])
def test_the_literal_text_is_the_same_run_without_a_base(name, tmp_path):
    text, config = literal(name), load_config(name)
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    assert load_config(str(path)) == load_config(str(FOLDER / path.name)) == config
    assert config.name == name
    assert "zephyr_jax" not in text.split('"""')[2]
    if name not in VARIANTS:
        assert text == (FOLDER / f"{name}.py").read_text()


def test_copy_gives_a_file_that_stands_alone(capsys, tmp_path):
    main(["copy", "zephyr_7b_dpo_qlora", str(tmp_path / "new")])
    copied = tmp_path / "new" / "zephyr_7b_dpo_qlora.py"
    assert capsys.readouterr().out.strip() == str(copied)
    main(["show", "zephyr_7b_dpo_qlora"])
    assert copied.read_text() == capsys.readouterr().out
    assert list(copied.parent.iterdir()) == [copied]


def test_diff_prints_the_fields_that_differ(capsys):
    main(["diff", "zephyr_7b_sft", "zephyr_7b_sft_v5e_16"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["name", "zephyr_7b_sft", "->", "zephyr_7b_sft_v5e_16"],
        ["mesh.fsdp", "-1", "->", "16"],
    ]
    main(["diff", "zephyr_7b_sft_lora", "zephyr_7b_dpo_lora"])
    assert "\ndpo.beta" in capsys.readouterr().out
    main(["diff", "demo_sft", "demo_sft"])
    assert capsys.readouterr().out == ""


def test_bad_input_is_one_line(capsys, tmp_path):
    (tmp_path / "demo_sft.py").write_text("mine")
    for words, message in (
        (["show", "zephyr"], "no recipe 'zephyr'; there are demo_dpo, "),
        (["diff", "demo_sft", "zephyr"], "no recipe 'zephyr'; there are demo_dpo, "),
        (["copy", "demo_sft", str(tmp_path)], "exists; remove it"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "demo_sft.py").read_text() == "mine"


def test_it_is_a_module_that_starts_without_jax():
    code = "import runpy, sys; sys.argv[1:] = ['list']\n"
    code += "runpy.run_module('zephyr_jax.recipes', run_name='__main__')\n"
    code += "assert 'jax' not in sys.modules"
    assert "zephyr_7b_sft" in output_of([sys.executable, "-c", code])
