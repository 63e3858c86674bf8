"""People's own pairs: `schemas` turns rows into records, `builder` (imports TFDS) writes them."""
