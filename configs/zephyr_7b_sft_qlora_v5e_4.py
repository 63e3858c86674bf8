"""zephyr_7b_sft_qlora laid out for 4 v5e chips (docs/pods.md)."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_sft_qlora as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_sft_qlora_v5e_4"
    config.mesh.fsdp = 4
    return config
