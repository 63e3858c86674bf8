"""The recipes: one literal file per run, installed as `zephyr_jax.recipes`."""
