"""AI feedback as UltraFeedback collected it: four models of different strength and a judge."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "feedback_ultrafeedback"
    config.seed = 0

    config.prompts = ConfigDict()
    config.prompts.source = "ultrachat/200k"
    config.prompts.data_dir = "data"
    config.prompts.count = 64_000
    config.prompts.decontaminate = ()

    # Servers with OpenAI's interface. A key comes from the environment variable that is named here.
    config.endpoints = ConfigDict()
    config.endpoints.local = ConfigDict()
    config.endpoints.local.url = "http://localhost:8000/v1"
    config.endpoints.local.concurrency = 64
    config.endpoints.judge = ConfigDict()
    config.endpoints.judge.url = "https://api.openai.com/v1"
    config.endpoints.judge.key_variable = "OPENAI_API_KEY"
    config.endpoints.judge.concurrency = 32
    config.endpoints.judge.requests_per_minute = 2_000

    config.contestants = ConfigDict()
    config.contestants.sft = ConfigDict({"model": "runs/zephyr_7b_sft"})
    config.contestants.mistral = ConfigDict({"model": "mistralai/Mistral-7B-Instruct-v0.1"})
    config.contestants.small = ConfigDict({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    config.contestants.served = ConfigDict({"endpoint": "local", "model": "served-model"})

    # A fourth of the answers under each principle, as a system prompt
    config.principles = ConfigDict()
    config.principles.helpfulness = 0.25
    config.principles.honesty = 0.25
    config.principles.truthfulness = 0.25
    config.principles.verbalized_calibration = 0.25

    config.judge = ConfigDict()
    config.judge.kind = "endpoint"
    config.judge.endpoint = "judge"
    config.judge.model = "gpt-4.1"
    return config
