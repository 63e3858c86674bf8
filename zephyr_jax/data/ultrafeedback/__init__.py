"""UltraFeedback: `schemas` turns rows into pairs, `builder` (which imports TFDS) writes them."""
