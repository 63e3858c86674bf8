"""dSFT of Mistral-7B on UltraChat 200k: the handbook's numbers (v0.3.0), our row layout.

Documents are kept apart by segments, and only assistant turns carry loss; docs/recipes.md says how
this differs from the published recipes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "zephyr_7b_sft"
    config.seed = 42
    config.init = "mistralai/Mistral-7B-v0.1"

    config.model = ConfigDict()
    config.model.vocab_size = 32000
    config.model.hidden_size = 4096
    config.model.intermediate_size = 14336
    config.model.num_hidden_layers = 32
    config.model.num_attention_heads = 32
    config.model.num_key_value_heads = 8
    config.model.head_dim = 128
    config.model.max_position_embeddings = 32768
    config.model.rms_norm_eps = 1e-5
    config.model.rope_theta = 10000.0
    config.model.sliding_window = 4096
    config.model.tie_word_embeddings = False
    config.model.initializer_range = 0.02
    config.model.bos_token_id = 1
    config.model.eos_token_id = 2
    config.model.dtype = "bfloat16"

    config.chat = ConfigDict()
    config.chat.bos = True
    config.chat.append_eos = False
    config.chat.empty_system = False
    config.chat.parse_special = False
    config.chat.loss_on = "assistant"
    config.chat.score_header = False

    config.data = ConfigDict()
    config.data.data_dir = "data"
    config.data.dataset = "ultrachat/200k"
    config.data.splits = ("train_sft", "test_sft")
    config.data.tokenizer = ""
    config.data.seq_len = 2048
    config.data.packing = "best_fit"

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.peak_lr = 2e-5
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.max_grad_norm = 1.0

    config.train = ConfigDict()
    config.train.epochs = 1
    config.train.max_steps = 0
    config.train.batch_size = 128
    config.train.micro_batches = 1
    config.train.eval_every = 500
    config.train.checkpoint_every = 100
    config.train.keep_checkpoints = 2
    config.train.log_every = 5
    config.train.remat = "auto"
    config.train.reduce_dtype = "float32"
    config.train.attention = "auto"

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    return config
