"""DPO of the Alignment Handbook v0.3.0 with adapters beside the merged SFT, 16 pairs a step."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_handbook_dpo as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_handbook_dpo_lora"
    config.init = "runs/zephyr_7b_handbook_sft_lora"
    config.lora = ConfigDict()
    config.lora.rank = 128
    config.lora.alpha = 128.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.optim.peak_lr = 5e-6
    config.train.batch_size = 16
    return config
