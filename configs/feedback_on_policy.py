"""On-policy AI feedback: four samples of the run's own model, rated by a judge at an endpoint."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "feedback_on_policy"
    config.seed = 0
    config.batch_size = 64

    config.prompts = ConfigDict()
    config.prompts.source = "ultrafeedback/raw"
    config.prompts.data_dir = "data"
    config.prompts.count = 20_000

    config.contestants = ConfigDict()
    for seed in range(4):
        sample = {"model": "runs/zephyr_7b_sft", "temperature": 0.8, "seed": seed}
        config.contestants[f"sample_{seed}"] = ConfigDict(sample)

    config.endpoints = ConfigDict()
    config.endpoints.judge = ConfigDict()
    config.endpoints.judge.url = "http://localhost:8000/v1"
    config.endpoints.judge.concurrency = 64

    config.judge = ConfigDict()
    config.judge.kind = "endpoint"
    config.judge.endpoint = "judge"
    config.judge.model = "judge-model"
    config.judge.aspects = ()  # one overall score a request
    return config
