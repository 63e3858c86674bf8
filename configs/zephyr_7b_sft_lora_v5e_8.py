"""zephyr_7b_sft_lora laid out for 8 v5e chips (docs/pods.md)."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_sft_lora as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_sft_lora_v5e_8"
    config.mesh.fsdp = 8
    return config
