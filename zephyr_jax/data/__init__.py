"""From raw records to batches: cleaning, TFDS sets, chat template, packing, reading."""
