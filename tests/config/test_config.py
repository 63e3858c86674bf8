import pytest

from zephyr_jax.config.run import MistralConfig

HF = {"model_type": "mistral", "hidden_size": 48, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("fields", "theta", "window"),
    [
        ({}, 10_000.0, 4096),  # v0.1 by transformers' defaults
        ({"rope_theta": 10_000.0, "sliding_window": 4096}, 10_000.0, 4096),
        ({"rope_theta": 1_000_000, "sliding_window": None}, 1e6, None),  # v0.2 and later
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, 4096),
        ({"model_type": "llama", "rope_theta": 5e5, "sliding_window": 4096}, 5e5, None),
    ],
)
def test_theta_and_window_are_those_of_config_json(fields, theta, window):  # pitfall 33
    config = MistralConfig.from_hf(HF | fields)
    assert (config.rope_theta, config.sliding_window) == (theta, window)


def test_two_values_of_theta_are_refused():  # pitfall 33
    both = {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "hidden_size": 40,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_theta": 1e4},
    }
    with pytest.raises(ValueError, match="two values of rope_theta"):
        MistralConfig.from_hf(both)
    both["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    assert MistralConfig.from_hf(both).rope_theta == 1e6
