"""An HTTP server with OpenAI's interface in front of `zephyr_jax.inference`."""
