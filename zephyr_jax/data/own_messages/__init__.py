"""People's own dialogues: `schemas` turns rows into records, `builder` (imports TFDS) writes."""
