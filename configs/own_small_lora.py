"""own_small_sft by adapters (LoRA): the demo's model itself stays as it is."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import own_small_sft as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "own_small_lora"
    config.optim.peak_lr = 1e-2
    config.lora = ConfigDict()
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.train.epochs = 60
    return config
