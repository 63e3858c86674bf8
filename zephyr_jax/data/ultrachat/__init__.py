"""UltraChat: `schemas` turns raw rows into records, `builder` (which imports TFDS) writes them."""
