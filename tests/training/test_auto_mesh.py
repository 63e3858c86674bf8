"""Meshes and micro-batches for the devices at hand."""

import dataclasses

import jax
import pytest
from conftest import with_fields

from zephyr_jax.chips import CHIPS
from zephyr_jax.config.run import MeshConfig, load_config
from zephyr_jax.sharding import compiler_options, usable_options
from zephyr_jax.training.sizes import Devices, estimated_gib, resolve_sizes

AUTO = MeshConfig(0, 0, 0)


def auto(name):
    return dataclasses.replace(load_config(name), mesh=AUTO)


def test_a_mesh_with_sizes_is_left_alone():
    config = load_config("zephyr_7b_beta_sft")
    assert resolve_sizes(config, Devices(4096, 1, 1.0)) is config


@pytest.mark.parametrize(
    ("name", "devices", "sizes", "n_micro"),
    [
        ("zephyr_7b_sft", Devices(16, 1, 15.75), (1, 16, 1), 1),
        ("zephyr_7b_sft", Devices(16, 1, 95.0), (1, 16, 1), 1),
        ("zephyr_7b_sft", Devices(128, 2, 31.25), (8, 16, 1), 1),
        ("zephyr_7b_dpo", Devices(256, 1, 15.75), (2, 16, 8), 1),
        ("zephyr_7b_dpo", Devices(16, 1, 15.75), (1, 16, 1), 1),
        ("zephyr_7b_sft", Devices(4, 1, 15.75), (1, 4, 1), 32),
        ("demo_sft", Devices(1, 1, None), (1, 1, 1), 1),
        ("demo_sft", Devices(8, 1, None), (1, 8, 1), 1),
        ("demo_sft", Devices(12, 1, None), (3, 2, 2), 1),
    ],
)
def test_sizes_for_devices(name, devices, sizes, n_micro):
    config = resolve_sizes(auto(name), devices)
    mesh = config.mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == sizes
    assert config.train.micro_batches == n_micro


@pytest.mark.parametrize(
    ("usable", "first_kept"),
    [(95.7, "gate"), (31.25, "o"), (27.0, "q"), (15.75, "full"), (None, "full")],
)
def test_remat_auto_recomputes_as_little_as_fits(usable, first_kept):
    """By libtpu's count the 7B with 8 rows a chip holds 15 GiB (full) and 57 (all but down)."""
    run = dataclasses.replace(load_config("zephyr_7b_sft"), mesh=MeshConfig(1, -1, 1))
    config = resolve_sizes(run, Devices(16, 1, usable))
    remat = config.train.remat
    assert first_kept == remat or first_kept in remat
    assert config.train.micro_batches == load_config("zephyr_7b_sft").train.micro_batches
    assert "gate" not in resolve_sizes(run, Devices(16, 1, usable, False)).train.remat
    if usable and remat != "full":
        assert estimated_gib(dataclasses.replace(config, mesh=MeshConfig(1, 16, 1)), 128) <= usable


@pytest.mark.parametrize(
    ("remat", "rows", "micro_batches", "counted"),
    [  # the peak of zephyr_7b_sft, fsdp 16, by libtpu 0.0.42.1 (docs/speed.md)
        ("full", 128, 8, 11.5),  # v5e:4x4
        ("full", 128, 4, 12.36),
        ("full", 128, 2, 14.34),
        ("full", 128, 1, 14.73),
        (("q", "k", "v", "attention"), 128, 4, 14.77),
        ("full", 128, 1, 14.99),  # v6e:4x4
        (("q", "k", "v", "attention", "o"), 128, 1, 28.94),
        (("q", "k", "v", "attention", "o", "gate", "up"), 128, 1, 56.57),  # v5p:2x2x4
    ],
)
def test_the_memory_formula_is_near_the_compilers_count(remat, rows, micro_batches, counted):
    config = dataclasses.replace(load_config("zephyr_7b_sft"), mesh=MeshConfig(1, 16, 1))
    config = with_fields(config, train={"remat": remat, "micro_batches": micro_batches})
    assert estimated_gib(config, rows) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (0, 0, 1), (-1, 0, 0), (0, 0, 0, 2)])
def test_some_sizes_cannot_be_left_open(sizes):
    with pytest.raises(ValueError, match="all are 0, or none is"):
        MeshConfig(*sizes)


def on_tpu(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((16,), ("fsdp",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_a_steps_compiler_options_are_those_of_the_chip_and_the_configs():
    vmem = "xla_tpu_scoped_vmem_limit_kib"
    assert compiler_options() == {}  # on CPU
    with on_tpu("TPU v5"):
        assert compiler_options() == CHIPS["v5p"].compiler
        assert int(CHIPS["v5p"].compiler[vmem]) < 64 * 1024  # what a core has
        assert compiler_options({vmem: "20000"}) == CHIPS["v5p"].compiler | {vmem: "20000"}
        assert compiler_options("none") == {}
    with on_tpu("TPU v4"):
        assert compiler_options() == {}


def test_an_option_that_the_compiler_does_not_know_is_dropped_with_a_line(caplog):
    known = {"xla_dump_to": ""}  # XLA's own, for any machine
    options = tuple((known | {"xla_tpu_no_such": "true"}).items())
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(2):  # as for the step and for the reference's pass
            assert usable_options(options, "cpu") == known
    assert [r.getMessage() for r in caplog.records] == [
        "this compiler does not take xla_tpu_no_such=true: it is left out"
    ]
