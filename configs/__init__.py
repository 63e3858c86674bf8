"""The recipes, installed as `zephyr_jax.recipes`: literal files, and variants of them."""
