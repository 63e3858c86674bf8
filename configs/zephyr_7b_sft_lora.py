"""dSFT of Mistral-7B on UltraChat 200k by adapters: the handbook's numbers, our row layout."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_sft as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_sft_lora"
    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.optim.peak_lr = 2e-4
    config.train.batch_size = 8
    return config
