"""DPO of the embedded default: the SFT model learns which of two answers is better."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "demo_dpo"
    config.seed = 0
    config.init = "runs/demo_sft"

    config.model = ConfigDict()
    config.model.vocab_size = 768
    config.model.hidden_size = 128
    config.model.intermediate_size = 400
    config.model.num_hidden_layers = 4
    config.model.num_attention_heads = 4
    config.model.num_key_value_heads = 2
    config.model.head_dim = 32
    config.model.max_position_embeddings = 512
    config.model.rms_norm_eps = 1e-5
    config.model.rope_theta = 10000.0
    config.model.sliding_window = None
    config.model.tie_word_embeddings = False
    config.model.initializer_range = 0.08
    config.model.bos_token_id = 1
    config.model.eos_token_id = 2
    config.model.dtype = "float32"

    config.chat = ConfigDict()
    config.chat.bos = True
    config.chat.append_eos = False
    config.chat.empty_system = False
    config.chat.parse_special = False
    config.chat.loss_on = "assistant"
    config.chat.score_header = False

    config.data = ConfigDict()
    config.data.data_dir = "data"
    config.data.dataset = "ultrafeedback/raw"
    config.data.splits = ("train_prefs", "test_prefs")
    config.data.tokenizer = ""
    config.data.seq_len = 128
    config.data.packing = "best_fit"

    config.dpo = ConfigDict()
    config.dpo.beta = 0.1
    config.dpo.label_smoothing = 0.0
    config.dpo.reference = "precomputed"
    config.dpo.max_length = 192
    config.dpo.max_prompt_length = 96

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.peak_lr = 1e-4
    config.optim.schedule = "linear"
    config.optim.warmup_ratio = 0.1
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.max_grad_norm = 1.0

    config.train = ConfigDict()
    config.train.epochs = 1
    config.train.max_steps = 0
    config.train.batch_size = 32
    config.train.micro_batches = 1
    config.train.eval_every = 10
    config.train.checkpoint_every = 20
    config.train.keep_checkpoints = 1
    config.train.log_every = 5
    config.train.remat = "none"
    config.train.reduce_dtype = "float32"
    config.train.attention = "auto"

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    return config
