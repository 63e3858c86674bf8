"""Meshes and micro-batches for the devices at hand."""

import dataclasses

import pytest

from zephyr_jax.config.run import MeshConfig, load_config
from zephyr_jax.training.steps import Devices, resolve_sizes

AUTO = MeshConfig(0, 0, 0)


def auto(name):
    return dataclasses.replace(load_config(name), mesh=AUTO)


def test_a_mesh_with_sizes_is_left_alone():
    config = load_config("zephyr_7b_sft")
    assert resolve_sizes(config, Devices(4096, 1, 1.0)) is config


@pytest.mark.parametrize(
    ("name", "devices", "sizes", "n_micro"),
    [
        ("zephyr_7b_sft", Devices(16, 1, 15.75), (1, 16, 1), 8),
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


@pytest.mark.parametrize("sizes", [(0, 1, 1), (0, 0, 1), (-1, 0, 0), (0, 0, 0, 2)])
def test_some_sizes_cannot_be_left_open(sizes):
    with pytest.raises(ValueError, match="either all are 0, or none is"):
        MeshConfig(*sizes)
