"""The published recipes by their numbers, written from the publications and not from `configs/`.

Sources: the paper (arXiv:2310.16944) with the model card of zephyr-7b-beta, and the recipes of the
Alignment Handbook at its tags v0.2.0 and v0.3.0; docs/recipes.md says which of them says what.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Fields = dict[str, Any]  # "optim.peak_lr" -> 2e-5

# config.json of mistralai/Mistral-7B-v0.1, in bfloat16
MISTRAL_7B: Fields = {
    "model.vocab_size": 32_000,
    "model.hidden_size": 4096,
    "model.intermediate_size": 14_336,
    "model.num_hidden_layers": 32,
    "model.num_attention_heads": 32,
    "model.num_key_value_heads": 8,
    "model.head_dim": 128,
    "model.max_position_embeddings": 32_768,
    "model.rms_norm_eps": 1e-5,
    "model.rope_theta": 10_000.0,
    "model.sliding_window": 4096,
    "model.tie_word_embeddings": False,
    "model.initializer_range": 0.02,
    "model.bos_token_id": 1,
    "model.eos_token_id": 2,
    "model.dtype": "bfloat16",
}
ADAMW: Fields = {  # transformers' TrainingArguments, where a recipe names nothing else
    "optim.name": "adamw",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "optim.mu_dtype": "float32",
}
RMSPROP = ADAMW | {"optim.name": "rmsprop", "optim.betas": (0.0, 0.99)}  # torch's defaults
EVERY: Fields = MISTRAL_7B | ADAMW | {"seed": 42, "train.max_steps": 0, "data.seq_len": 2048}
EVERY |= {"optim.warmup_from_zero": True}  # transformers' schedules
SFT: Fields = EVERY | {
    "init": "mistralai/Mistral-7B-v0.1",
    "chat.score_header": False,
    "data.dataset": "ultrachat/200k",
    "data.splits": ("train_sft", "test_sft"),
    "optim.peak_lr": 2e-5,
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.1,
    "train.epochs": 1,
    "train.log_every": 5,
    "train.checkpoint_every": 100,
}
DPO: Fields = EVERY | {
    "data.dataset": "ultrafeedback/binarized",
    "data.splits": ("train_prefs", "test_prefs"),
    "data.packing": "best_fit",
    "dpo.loss": "sigmoid",
    "dpo.label_smoothing": 0.0,
    "dpo.reference": "precomputed",
    "dpo.max_length": 1024,
    "dpo.max_prompt_length": 512,
    "chat.loss_on": "assistant",
    "optim.peak_lr": 5e-7,
    "optim.warmup_ratio": 0.1,
    "train.log_every": 10,
    "train.checkpoint_every": 100,
    "train.eval_every": 100,
}
# What the originals feed to the model, and what we do.
ENDS: Fields = {"chat.append_eos": True, "chat.empty_system": True, "chat.parse_special": True}
ENDS |= {"train.keep_checkpoints": 1}
STREAM = ENDS | {"chat.bos": True, "train.eval_every": 0}
STREAM |= {"chat.loss_on": "all", "data.packing": "concat"}
OURS: Fields = dict.fromkeys(("chat.append_eos", "chat.empty_system", "chat.parse_special"), False)
OURS |= {"chat.bos": True, "chat.score_header": False}
OURS |= {"train.keep_checkpoints": 2, "optim.warmup_from_zero": False}
OURS_SFT = OURS | {"chat.loss_on": "assistant", "data.packing": "best_fit"}
OURS_SFT |= {"train.eval_every": 500}
# TRL before 0.7.5 or so: no BOS, the header in the prompt; three epochs at beta 0.1
OLD_DPO = ENDS | {"chat.bos": False, "chat.score_header": False}
OLD_DPO |= {"dpo.beta": 0.1, "optim.schedule": "linear", "train.epochs": 3}
NEW_DPO = ENDS | {"chat.bos": True, "chat.score_header": True}
NEW_DPO |= {"dpo.beta": 0.01, "optim.schedule": "cosine", "train.epochs": 1}
ATTENTION_LORA: Fields = {"lora.rank": 64, "lora.alpha": 16.0, "lora.dropout": 0.1}
ATTENTION_LORA |= {"lora.targets": ("q", "k", "v", "o"), "lora.base": "full"}
SFT_LORA: Fields = {
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "lora.dropout": 0.05,
    "lora.targets": ("q", "k", "v", "o", "gate", "up", "down"),
    "lora.base": "full",
    "optim.peak_lr": 2e-4,
    "train.batch_size": 8,  # 4 on one device, 2 of them a step
}
DPO_LORA = SFT_LORA | {
    "lora.rank": 128,
    "lora.alpha": 128.0,
    "optim.peak_lr": 5e-6,
    "train.batch_size": 16,  # 4 on one device, 4 of them a step
}
ROWS_128: Fields = {"train.batch_size": 128}
NF4: Fields = {"lora.base": "nf4"}  # load_in_4bit, as the handbook's qlora files have it
V020_SFT = SFT | STREAM | {"train.batch_size": 512, "optim.warmup_ratio": 0.0}
V020_DPO = DPO | OLD_DPO | RMSPROP | {"train.batch_size": 64}


def after(name: str) -> Fields:
    """A DPO run begins where the recipe of this name ended."""
    return {"init": f"runs/{name}"}


RECIPES: dict[str, Fields] = {
    # 16 devices
    "zephyr_7b_beta_sft": SFT | STREAM | {"train.batch_size": 512},
    "zephyr_7b_beta_dpo": DPO | OLD_DPO | after("zephyr_7b_beta_sft") | {"train.batch_size": 32},
    # 32 rows x 2 x 8 devices, and no line about warm-up; 8 pairs x 8 devices
    "zephyr_7b_handbook_v020_sft": V020_SFT,
    "zephyr_7b_handbook_v020_dpo": V020_DPO | after("zephyr_7b_handbook_v020_sft"),
    # 4 rows x 128; 2 pairs x 32
    "zephyr_7b_handbook_v020_sft_lora": V020_SFT | ATTENTION_LORA,
    "zephyr_7b_handbook_v020_dpo_lora": V020_DPO
    | ATTENTION_LORA
    | after("zephyr_7b_handbook_v020_sft_lora"),
    # 16 rows x 8 devices; 8 pairs x 2 x 8 devices
    "zephyr_7b_handbook_sft": SFT | STREAM | ROWS_128,
    "zephyr_7b_handbook_dpo": DPO | NEW_DPO | after("zephyr_7b_handbook_sft") | ROWS_128,
    "zephyr_7b_handbook_sft_lora": SFT | STREAM | SFT_LORA,
    "zephyr_7b_handbook_dpo_lora": DPO | NEW_DPO | DPO_LORA | after("zephyr_7b_handbook_sft_lora"),
    "zephyr_7b_sft": SFT | OURS_SFT | ROWS_128,
    "zephyr_7b_dpo": DPO | NEW_DPO | OURS | after("zephyr_7b_sft") | ROWS_128,
    "zephyr_7b_sft_lora": SFT | OURS_SFT | SFT_LORA,
    "zephyr_7b_dpo_lora": DPO | NEW_DPO | DPO_LORA | OURS | after("zephyr_7b_sft_lora"),
    "zephyr_7b_sft_qlora": SFT | OURS_SFT | SFT_LORA | NF4,
    "zephyr_7b_dpo_qlora": DPO | NEW_DPO | DPO_LORA | OURS | after("zephyr_7b_sft_qlora") | NF4,
}


class Length(NamedTuple):
    """How long a run is: examples, updates in an epoch and in all, of which warm-up."""

    examples: int
    per_epoch: int
    steps: int
    warmup: int


PAPER_PAIRS, PAIRS = 61_966, 61_135
# About as many rows of 2,048 as ultrachat_200k's stream gives, as handbook issue 27 counted them.
STREAM_ROWS = 139_000
LENGTHS = {
    "zephyr_7b_beta_sft": Length(STREAM_ROWS, 272, 272, 28),
    "zephyr_7b_beta_dpo": Length(PAPER_PAIRS, 1937, 5811, 582),
    "zephyr_7b_handbook_v020_sft": Length(STREAM_ROWS, 272, 272, 0),
    "zephyr_7b_handbook_v020_dpo": Length(PAPER_PAIRS, 969, 2907, 291),
    "zephyr_7b_handbook_v020_sft_lora": Length(STREAM_ROWS, 272, 272, 0),
    "zephyr_7b_handbook_v020_dpo_lora": Length(PAPER_PAIRS, 969, 2907, 291),
    "zephyr_7b_handbook_sft": Length(STREAM_ROWS, 1086, 1086, 109),
    "zephyr_7b_handbook_dpo": Length(PAIRS, 478, 478, 48),
    "zephyr_7b_handbook_sft_lora": Length(STREAM_ROWS, 17_375, 17_375, 1738),
    "zephyr_7b_handbook_dpo_lora": Length(PAIRS, 3821, 3821, 383),
    # Best-fit rows are not the stream's: theirs are counted when the set is packed.
    "zephyr_7b_dpo": Length(PAIRS, 478, 478, 48),
    "zephyr_7b_dpo_lora": Length(PAIRS, 3821, 3821, 383),
    "zephyr_7b_dpo_qlora": Length(PAIRS, 3821, 3821, 383),
}
# per device, devices, accumulated: what the originals were launched with
LAUNCHED = {
    "zephyr_7b_beta_dpo": (2, 16, 1),
    "zephyr_7b_handbook_v020_sft": (32, 8, 2),
    "zephyr_7b_handbook_v020_dpo": (8, 8, 1),
    "zephyr_7b_handbook_v020_sft_lora": (4, 1, 128),
    "zephyr_7b_handbook_v020_dpo_lora": (2, 1, 32),
    "zephyr_7b_handbook_sft": (16, 8, 1),
    "zephyr_7b_handbook_dpo": (8, 8, 2),
    "zephyr_7b_handbook_sft_lora": (4, 1, 2),
    "zephyr_7b_handbook_dpo_lora": (4, 1, 4),
}
# Updates of an epoch as transformers' Trainer plans them; only these differ from ours.
TRAINER_DIFFERS = {
    "zephyr_7b_handbook_v020_sft": 271,
    "zephyr_7b_handbook_v020_sft_lora": 271,
    "zephyr_7b_handbook_v020_dpo_lora": 968,
}
