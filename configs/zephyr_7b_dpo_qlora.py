"""dDPO by QLoRA (nf4) beside the merged SFT model: the handbook's numbers, our row layout."""

from ml_collections import ConfigDict
from zephyr_jax.recipes import zephyr_7b_dpo_lora as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "zephyr_7b_dpo_qlora"
    config.init = "runs/zephyr_7b_sft_qlora"
    config.lora.base = "nf4"
    return config
