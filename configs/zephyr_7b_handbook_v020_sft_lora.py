"""SFT of the Alignment Handbook v0.2.0 with adapters of the attention alone."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_handbook_v020_sft as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_handbook_v020_sft_lora"
    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.dropout = 0.1
    config.lora.targets = ("q", "k", "v", "o")
    return config
