"""zephyr_7b_sft laid out for 16 v5e chips (docs/pods.md)."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_sft as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_sft_v5e_16"
    config.mesh.fsdp = 16
    return config
